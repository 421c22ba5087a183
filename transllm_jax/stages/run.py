"""One run of the pipeline: what every stage is given."""

from __future__ import annotations

import hashlib
import json
import tempfile
from datetime import date
from functools import cached_property
from pathlib import Path

from transllm_jax.config import Config
from transllm_jax.disk import FileHashes
from transllm_jax.evaluation.likelihood import Teacher
from transllm_jax.hosts.interrupt import Interrupt
from transllm_jax.hosts.runtime import Peers
from transllm_jax.hosts.site import Site
from transllm_jax.progress import Progress
from transllm_jax.stages.bad_rows import BadRows
from transllm_jax.stages.inputs import Inputs
from transllm_jax.stages.models import Models
from transllm_jax.stages.points import markers_of
from transllm_jax.tokenizer.chain import Markers
from transllm_jax.training.record.ledger import LEDGER, Ledger

# The hashes of files, in the work directory.
HASHES = "hashes.json"


def seed_for(seed: int, purpose: str) -> int:
    """31 bits that are a function of both, the same in every process: Python's own hash of a text is not."""
    digest = hashlib.sha256(json.dumps([seed, purpose]).encode()).digest()
    return int.from_bytes(digest[:4]) >> 1


class Run:
    """The config; where the run happens (`site`); its models and tokenizers (`models`) and its files (`inputs`)."""

    def __init__(
        self,
        config: Config,
        workdir: Path | Site,
        progress: Progress,
        interrupt: Interrupt,
        *,
        since: float | None = None,
        profile: int = 0,
    ) -> None:
        """workdir: a directory for one process alone, or the site of several.

        since: when the process began, by `time.monotonic`. profile: steps of each training stage that are traced.
        """
        self.config = config
        self.site = workdir if isinstance(workdir, Site) else Site.of(workdir)
        self.progress, self.interrupt = progress, interrupt
        # The day that chat templates are told. The pipeline fills it in when a run begins.
        self.today = config.date or date.today()
        self.models = Models(config, self.workdir, self.today)
        self.bad_rows = BadRows(self.record_directory, self.workdir, progress.say)
        hash_of = FileHashes(self.workdir / HASHES, keep=self.primary)
        self.inputs = Inputs(config, self.models, hash_of, self.bad_rows, progress)
        # The original model with its answers to held-out questions: made by the first evaluation, used by all.
        self.teacher: Teacher | None = None
        self.profile = profile
        self._since = since

    @property
    def workdir(self) -> Path:
        """The work directory, or this process's mirror of it."""
        return self.site.workdir

    @property
    def peers(self) -> Peers:
        """The processes of this run."""
        return self.site.peers

    @property
    def primary(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.site.peers.primary

    @property
    def markers(self) -> Markers:
        """The chain's markers."""
        return markers_of(self.config)

    def seed_for(self, purpose: str) -> int:
        """The seed of one purpose, such as a stage's name: a hash of it and of the run's seed.

        No two purposes share a seed, nor do neighbouring seeds of the config.
        """
        return seed_for(self.config.seed, purpose)

    @cached_property
    def ledger(self) -> Ledger:
        """The account of this process's time."""
        return Ledger(self.record_directory(self.workdir) / LEDGER, since=self._since)

    def record_directory(self, directory: Path) -> Path:
        """Where this process writes its records of a step: the step's directory, or a temporary one that nobody reads.

        The primary's records alone count.
        """
        if self.primary:
            return directory
        place = self._scratch / directory.name
        place.mkdir(exist_ok=True)
        return place

    @cached_property
    def _scratch(self) -> Path:
        self._temporary = tempfile.TemporaryDirectory(prefix="transllm-")
        return Path(self._temporary.name)

    def push(self, *steps: str) -> None:
        """Copy these steps and the ledger to the run's store, if it has one, so that they outlive this host."""
        if self.primary and self.site.mirrored:
            with self.ledger.still():
                self.site.push(LEDGER, *steps)
