"""The tables of docs/speed.md are those that bench/hours.py prints."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hours() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hours", ROOT / "bench" / "hours.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks up its module there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_tables_of_the_script(hours: ModuleType) -> None:
    found = hours.read(ROOT / "bench" / "hours.json")
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    for table in (hours.tpu_table(found), hours.gpu_table(found), hours.disk_table()):
        assert "\n\n" + "\n".join(table) + "\n\n" in page


def test_a_gpus_memory_and_hours_by_hand(hours: ModuleType) -> None:
    """Of 10 million frozen values and 1 million trained ones, compiled with 4 rows on 2 chips."""
    model = hours.Counts(frozen=20_000_000, trained=1_000_000, flops=8e7, gathered=3_000_000)
    entry = {"temporary_bytes": 9e6, "kept_bytes": 4e6, "chips": 2}
    activations = hours.activations
    # 4 bytes of gradients for each of the half million values of a chip are not counted as activations.
    assert [activations(entry, model, 1, devices) for devices in (1, 8)] == [7e6, 7e6]
    assert activations(entry, model, 0.25, 1) == 1e6 + 3e6
    assert activations(entry, model, 2, 1) == 14e6
    # Compiled on one chip, nothing was gathered.
    entry = {"temporary_bytes": 11e6, "kept_bytes": 4e6, "chips": 1}
    assert [activations(entry, model, 1, devices) for devices in (1, 8)] == [7e6, 10e6]
    assert hours.gpu_memory(model, 4, 7e6) == (20e6 + 16e6) / 4 + 7e6
    fast = hours.Gpu("GPU", memory=24, peak=1e14, link=1e15)
    assert hours.gpu_hours(model, fast, 2, 1.25, 4, 0.5) == pytest.approx(1e9 * 8e7 * 1.25 / (2 * 1e14 * 0.5) / 3600)
    # A part of 2 x 4 x 512 tokens gathers half the weights twice.
    slow = hours.Gpu("GPU", memory=24, peak=1e18, link=1e6)
    assert hours.gpu_hours(model, slow, 2, 1.25, 4, 0.5) == pytest.approx(1e9 / 4096 * 20 / 3600)
