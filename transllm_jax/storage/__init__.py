"""A run's work directory on an object store: a local mirror, push and pull, and a lease that lets one run use it."""

from transllm_jax.storage.workdir import Workdir, open_workdir

__all__ = ["Workdir", "open_workdir"]
