#!/usr/bin/env python3
"""Starts a run on a TPU slice of GKE: renders jobset.yaml.j2 and passes it to kubectl.

Needs Python 3.11 with jinja2, kubectl for the cluster, and JobSet 0.10.1 or later in the cluster: earlier versions
cannot tell exit code 2 from a preemption, and refuse the manifest.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import jinja2

TEMPLATE = Path(__file__).with_name("jobset.yaml.j2")
# Generation -> the value of the node label, and the topologies. None: any three numbers with a product divisible by 4.
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
GENERATIONS: dict[str, tuple[str, tuple[str, ...] | None]] = {
    "v4": ("tpu-v4-podslice", None),
    "v5e": ("tpu-v5-lite-podslice", FLAT),
    "v5p": ("tpu-v5p-slice", None),
    "v6e": ("tpu-v6e-slice", FLAT),
}
# JobSet appends -hosts-0-INDEX and a hash to make the name of a pod, which may have at most 63 characters.
NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")


class WrongInput(Exception):
    """One line that says what is wrong; exit code 2."""


@dataclass(frozen=True)
class Slice:
    """A slice's names on GKE, and its division into hosts."""

    accelerator: str
    topology: str
    chips_per_host: int
    hosts: int


def slice_of(name: str, chips_per_host: int | None = None) -> Slice:
    """The slice with a topology name such as v5e:4x4. Raises WrongInput if GKE does not have it."""
    generation, _, topology = name.partition(":")
    if generation not in GENERATIONS or not topology:
        raise WrongInput(f"topology '{name}' is unknown; write it as v5e:4x4 ({', '.join(GENERATIONS)})")
    accelerator, listed = GENERATIONS[generation]
    numbers = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", topology)
    if listed is not None:
        if topology not in listed:
            raise WrongInput(f"topology '{name}' does not exist; {generation} has {', '.join(listed)}")
    elif numbers is None or math.prod(map(int, numbers.groups())) % 4:
        raise WrongInput(f"topology '{name}' does not exist; {generation} has three numbers, from 2x2x1")
    chips = math.prod(map(int, topology.split("x")))
    if chips_per_host is None:
        chips_per_host = min(chips, 4)
    elif chips_per_host != min(chips, 4) and not (chips_per_host == 8 and topology == "2x4"):
        raise WrongInput(f"hosts of {name} have {min(chips, 4)} chips{' or 8' if topology == '2x4' else ''}")
    return Slice(accelerator, topology, chips_per_host, chips // chips_per_host)


def quoted(value: str | Sequence[str]) -> str:
    """YAML for a string (in double quotes, with unprintable characters escaped), or for a list of strings."""
    if not isinstance(value, str):
        return f"[{', '.join(map(quoted, value))}]"
    escapes = {"\n": "\\n", '"': '\\"', "\\": "\\\\"}
    return '"' + "".join(escapes.get(c) or (c if c.isprintable() else f"\\U{ord(c):08x}") for c in value) + '"'


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise WrongInput(f"{message}; see gke_jobset.py --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gke_jobset.py", description="Run transllm on a TPU slice of GKE, as a JobSet.")
    parser.add_argument("--name", required=True, help="name of the JobSet; up to 40 lower-case letters, digits and -")
    parser.add_argument("--topology", required=True, help="v4:2x2x4, v5e:4x4, v5p:2x2x1, v6e:4x4 ...")
    parser.add_argument("--image", required=True, help="the image that launch/Dockerfile builds")
    parser.add_argument("--workdir", required=True, help="gs://bucket/path, for everything that must outlive a pod")
    config = parser.add_mutually_exclusive_group(required=True)
    config.add_argument("--config", type=Path, metavar="FILE", help="a local config file, passed as a ConfigMap")
    config.add_argument("--config-in-image", metavar="PATH", help="a config file in the image")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the config")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--service-account", help="Kubernetes service account that may write to the bucket")
    parser.add_argument(
        "--mount", action="append", default=[], metavar="BUCKET:/PATH", help="a bucket to read text from"
    )
    parser.add_argument("--on-demand", action="store_true", help="use on-demand nodes instead of spot nodes")
    parser.add_argument("--max-restarts", type=int, default=10, help="after failures (10); preemptions do not count")
    parser.add_argument("--grace", type=int, default=600, metavar="SECONDS", help="time to save when stopped (600)")
    parser.add_argument("--chips-per-host", type=int, help="8 for a 2x4 slice on one host; otherwise 4 (or 1)")
    parser.add_argument("--run-as", type=int, default=0, metavar="UID", help="user id of the process (0)")
    parser.add_argument("--dry-run", action="store_true", help="print the manifest without applying it")
    return parser


def render(given: argparse.Namespace) -> str:
    """The manifest, as YAML. Raises WrongInput for an invalid value."""
    if not NAME.fullmatch(given.name):
        raise WrongInput(
            f"--name '{given.name}': use up to 40 lower-case letters, digits and -, starting with a letter"
        )
    if not re.fullmatch(r"gs://[^/]+/.+", given.workdir):
        raise WrongInput(f"--workdir {given.workdir}: a pod's disk is lost with it; give gs://bucket/path")
    for override in given.overrides:
        if not re.match(r"[^-=][^=]*=", override):
            raise WrongInput(f"'{override}' is neither an option nor key=value; see gke_jobset.py --help")
    if given.max_restarts < 0 or given.grace < 1:
        raise WrongInput("--max-restarts must be 0 or more, and --grace 1 or more")
    mounts = []
    for mount in given.mount:
        bucket, _, path = mount.partition(":")
        if not bucket or not path.startswith("/"):
            raise WrongInput(f"--mount {mount}: write it as BUCKET:/PATH")
        mounts.append((bucket, path))
    text = None
    if given.config is not None:
        if not given.config.is_file():
            raise WrongInput(f"--config {given.config}: no such file")
        text = given.config.read_text(encoding="utf-8")
    path = given.config_in_image if text is None else "/etc/transllm/config.yaml"
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters["quoted"] = quoted
    rendered = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=given.name,
        namespace=given.namespace,
        image=given.image,
        slice=slice_of(given.topology, given.chips_per_host),
        spot=not given.on_demand,
        arguments=["run", path, *given.overrides, "--workdir", given.workdir, "--distributed", "auto"],
        config_text=text,
        mounts=mounts,
        max_restarts=given.max_restarts,
        grace=given.grace,
        service_account=given.service_account,
        run_as=given.run_as,
    )
    return rendered.lstrip("\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    try:
        given = _parser().parse_args(arguments)
        manifest = render(given)
        if given.dry_run:
            print(manifest, end="")
            return 0
        if shutil.which("kubectl") is None:
            raise WrongInput("kubectl is missing; install it, and get the cluster's credentials")
    except WrongInput as error:
        print(f"gke_jobset.py: {error}", file=sys.stderr)
        return 2
    return subprocess.run(["kubectl", "apply", "-f", "-"], input=manifest, text=True, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
