"""The devices that jax computes on: what has to happen before a command uses them."""

from __future__ import annotations

import glob
import logging
import os
from typing import NoReturn

from transllm_jax.errors import UserError

# A TPU's device files: the first up to v5e, the second since then.
_TPUS = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")


def prepare_jax() -> None:
    """Keep compiled programs between runs (compilation takes most of a short run), and keep libraries silent."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        from transllm_jax.disk import cache_directory

        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    # Orbax logs the traceback of every error that it raises; the user gets one line instead.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    _pass_over_absent_tpu()


def require_devices() -> None:
    """Raises UserError if jax has no device: none is of the kind asked for, or another process holds it."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        reason = (str(error) or "there is none of that kind").splitlines()[0]
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise UserError(
            f"jax finds no device: {reason} (JAX_PLATFORMS={asked}); correct JAX_PLATFORMS, install the jax of this "
            "hardware, or end the process that holds the device"
        ) from error


def _pass_over_absent_tpu() -> None:
    """Keep jax from loading libtpu on a machine without a TPU.

    libtpu comes with the extra `tpu`, which `preflight` needs on any machine. jax tries it before other devices, and it
    prints half a page of warnings before it fails. `preflight` does not use this backend: it asks libtpu directly.
    """
    import jax
    from jax.extend.backend import register_backend_factory

    # jax.config has a platform if the user chose one, or if jax itself saw a TPU when it was imported. A TPU that is
    # too new for that has device files.
    if jax.config.values["jax_platforms"] or any(glob.glob(pattern) for pattern in _TPUS):
        return
    register_backend_factory("tpu", _no_tpu, fail_quietly=True)


def _no_tpu() -> NoReturn:
    raise RuntimeError("this machine has no TPU")
