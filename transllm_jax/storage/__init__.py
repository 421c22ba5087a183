"""A run's work directory on an object store: a local mirror, what is pushed and pulled, and one run at a time."""

from transllm_jax.storage.workdir import Workdir, open_workdir

__all__ = ["Workdir", "open_workdir"]
