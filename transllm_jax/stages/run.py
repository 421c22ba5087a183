"""One run of the pipeline: the object that every stage gets."""

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

# The file of hashes in the work directory.
HASHES = "hashes.json"


def seed_for(seed: int, purpose: str) -> int:
    """31 bits that are a function of both, and the same in every process (unlike Python's `hash` of a string)."""
    digest = hashlib.sha256(json.dumps([seed, purpose]).encode()).digest()
    return int.from_bytes(digest[:4]) >> 1


class Run:
    """The config, the place of the run (`site`), its models and tokenizers (`models`), and its files (`inputs`)."""

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
        """workdir: a directory for a single process, or the site of several.

        since: when the process began, by `time.monotonic`. profile: how many steps of each training stage are traced.
        """
        self.config = config
        self.site = workdir if isinstance(workdir, Site) else Site.of(workdir)
        self.progress, self.interrupt = progress, interrupt
        # The date for chat templates. The pipeline puts that of the run's beginning into the config.
        self.today = config.date or date.today()
        self.models = Models(config, self.workdir, self.today)
        self.bad_rows = BadRows(self.record_directory, self.workdir, progress.say)
        hash_of = FileHashes(self.workdir / HASHES, keep=self.primary)
        self.inputs = Inputs(config, self.models, hash_of, self.bad_rows, progress)
        # The original model and its answers to held-out questions. The first evaluation makes it, all use it.
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
        """Whether this process is the one that writes files and prints."""
        return self.site.peers.primary

    @property
    def markers(self) -> Markers:
        """The chain's markers."""
        return markers_of(self.config)

    def seed_for(self, purpose: str) -> int:
        """The seed for a purpose, such as a stage's name: a hash of it and of the run's seed.

        So different purposes get different seeds, and so do neighbouring seeds of the config.
        """
        return seed_for(self.config.seed, purpose)

    @cached_property
    def ledger(self) -> Ledger:
        """The record of how this process spends its time."""
        return Ledger(self.record_directory(self.workdir) / LEDGER, since=self._since)

    def record_directory(self, directory: Path) -> Path:
        """Where this process writes its records of a step: the step's directory if it is the primary, whose records
        alone count; otherwise a temporary directory."""
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
        """Copy these steps and the ledger to the run's store, if it has one, so that they survive this host."""
        if self.primary and self.site.mirrored:
            with self.ledger.still():
                self.site.push(LEDGER, *steps)
