"""Files that come to harm on the disk, and what is read of them then."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transllm_jax.errors import UserError
from transllm_jax.training.checkpoint import Checkpoints
from transllm_jax.training.optimizer import OptimizerConfig, make_optimizer
from transllm_jax.training.step import TrainState, initial_state


def damages(data: bytes, places: int) -> Iterator[tuple[str, bytes | None]]:
    """What may become of a file: removed (None), cut off, or one bit of it changed, in so many places.

    The places are among the bytes that are not 0, which is what a file is filled up with.
    """
    yield "removed", None
    for size in sorted({0, 1, len(data) // 2, len(data) - 1} - {len(data), -1}):
        yield f"cut to {size}", data[:size]
    filled = np.flatnonzero(np.frombuffer(data, np.uint8))
    last = len(filled) - 1
    chosen = sorted({round(part * last / max(places - 1, 1)) for part in range(places)}) if len(filled) else []
    for number, place in enumerate(filled[chosen].tolist()):
        changed = bytearray(data)
        changed[place] ^= 1 << (number * 5 + 1) % 8
        yield f"bit of byte {place} changed", bytes(changed)


def put(path: Path, data: bytes | None) -> None:
    """Make this of a file; None removes it."""
    if data is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(data)


def state_of(step: int, rank: int = 3) -> TrainState:
    """A state of training in which every value is another one."""
    rng = np.random.default_rng(step)
    shapes = {"layers.q.a": (2, 24, rank), "layers.q.b": (2, rank, 24), "vocabulary.new": (40, 24)}
    trainable = {path: jnp.zeros(shape, jnp.float32) for path, shape in shapes.items()}
    state = initial_state(trainable, make_optimizer(OptimizerConfig(learning_rate=1e-3, steps=20, warmup_steps=1)))

    def drawn(leaf: jax.Array) -> jax.Array:
        return jnp.asarray(rng.standard_normal(leaf.shape) if leaf.ndim else rng.integers(99), leaf.dtype)

    return jax.tree.map(drawn, state)._replace(step=jnp.int32(step))


def bytes_of(state: TrainState | None) -> Any:
    """All that a state holds, to compare."""
    return None if state is None else [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def save(directory: Path, *steps: int) -> None:
    """Save the states of these steps."""
    with closing(Checkpoints(directory)) as checkpoints:
        for step in steps:
            checkpoints.save(state_of(step))


def restored(directory: Path, rank: int = 3) -> tuple[TrainState | None, list[str]]:
    """What is restored, and what is said."""
    said: list[str] = []
    with closing(Checkpoints(directory, say=said.append)) as checkpoints:
        return checkpoints.restore(state_of(0, rank)), said


def check_damaged_checkpoints(directory: Path, places: int, tell: Callable[[str], None] = lambda line: None) -> None:
    """Each file of the newest of two checkpoints comes to each harm: never is anything restored that was not saved.

    How many files there are is orbax's affair, and so is which of them it reads. What is asked of those that it needs,
    which are the ones that it misses: that each of them was harmed to the point of being found in other ways too.
    """
    save(directory / "whole", 2, 4)
    older, newest = bytes_of(state_of(2)), bytes_of(state_of(4))
    inside = (directory / "whole" / "4").rglob("*")
    files = sorted(path.relative_to(directory / "whole") for path in inside if path.is_file())
    found: dict[Path, dict[str, bool]] = {}
    for file in files:
        data = (directory / "whole" / file).read_bytes()
        for what, changed in damages(data, places):
            place = directory / "tried" / "checkpoints"
            shutil.copytree(directory / "whole", place)
            put(place / file, changed)
            state, said = restored(place)
            got = bytes_of(state)
            if got == newest:
                # Nothing that counts was harmed.
                assert not said, (file, what, said)
            else:
                assert got == older, (file, what)
                assert len(said) == 1 and f"{place}/4 is damaged (" in said[0], (file, what, said)
                assert "step 2 is used" in said[0] and "\n" not in said[0]
                assert [path.name for path in (directory / "tried" / "damaged").iterdir()] == ["4-0"], (file, what)
                # The next process finds the older one at once.
                again, nothing = restored(place)
                assert bytes_of(again) == older and not nothing
            found.setdefault(file, {})[what] = got == older
            shutil.rmtree(directory / "tried")
    tried, harmful = (sum(map(count, found.values())) for count in (len, lambda harms: sum(harms.values())))
    tell(f"checkpoints: {tried} damages of {len(files)} files, {harmful} found, {tried - harmful} harmless")
    needed = [file for file in files if found[file]["removed"]]
    sizes = {file: (directory / "whole" / file).stat().st_size for file in needed}
    # What is needed is missed when it is empty. Of a file that is there the library may use a part alone, and which, is
    # its own affair; but that no bit of any file counts cannot be.
    assert all(found[file]["cut to 0"] for file in needed if sizes[file]), found
    assert any(was for file in needed for what, was in found[file].items() if what.startswith("bit ")), found
    # What is known of the arrays, and the arrays: no file layout holds random numbers in half of their bytes.
    assert any(file.parts[1] == "record" for file in needed), needed
    held = sum(size for file, size in sizes.items() if file.parts[1] == "state")
    assert held > sum(map(len, newest)) / 2, sizes


def check_other_arrays(directory: Path) -> list[str]:
    """A bit of each array in turn is another one than was saved, in files that are whole: found, and the array named.

    Returns the arrays' names.
    """
    save(directory / "whole", 2, 4)
    older = bytes_of(state_of(2))
    state = state_of(4)
    leaves, tree = jax.tree.flatten(state)
    names = []
    for number, leaf in enumerate(leaves):
        bits = np.array(leaf).reshape(-1).view(np.uint32)
        bits[len(bits) // 2] ^= 1 << number % 32
        changed = jnp.asarray(bits.view(leaf.dtype).reshape(leaf.shape))
        other, tried = directory / f"other{number}", directory / f"tried{number}"
        with closing(Checkpoints(other)) as checkpoints:
            checkpoints.save(jax.tree.unflatten(tree, [*leaves[:number], changed, *leaves[number + 1 :]]))
        (written,) = (path for path in other.iterdir() if path.name.isdigit())
        shutil.copytree(directory / "whole", tried / "checkpoints")
        shutil.rmtree(tried / "checkpoints/4/state")
        shutil.copytree(written / "state", tried / "checkpoints/4/state")
        got, said = restored(tried / "checkpoints")
        assert bytes_of(got) == older, number
        (line,) = said
        named = re.search(r"/4 is damaged \((\S+) differ from what was saved\); it was put aside, step 2 is used", line)
        assert named, line
        names.append(named[1])
    return names


def check_damaged_cache(make: Callable[[], Any], cache: Path, places: int, tell: Callable[[str], None]) -> None:
    """Each file of a token cache comes to each harm: found and named when it is read, or harmless.

    make: the rows over the cache, opened anew.
    """
    wanted = rows_of(make())
    found: dict[Path, dict[str, bool]] = {}
    for file in sorted(cache.iterdir()):
        data = file.read_bytes()
        for what, changed in damages(data, places):
            put(file, changed)
            try:
                got = rows_of(make())
                found.setdefault(file, {})[what] = False
            except UserError as error:
                line = str(error)
                assert line.startswith(f"{cache}/") and "is damaged (" in line and "\n" not in line, (file, what, line)
                assert "remove it and run again; it is made again" in line
                # What the line says helps.
                Path(line.split(" is damaged")[0]).unlink()
                got = rows_of(make())
                found.setdefault(file, {})[what] = True
            assert got == wanted, (file, what)
            put(file, data)
    tried, harmful = (sum(map(count, found.values())) for count in (len, lambda harms: sum(harms.values())))
    tell(f"token cache: {tried} damages, {harmful} found, {tried - harmful} harmless")
    for file, harms in found.items():
        # One that is missing may be made anew. One that is cut off anywhere is found, and changed bits in each.
        assert all(was for what, was in harms.items() if what.startswith("cut ")), (file, harms)
        assert any(was for what, was in harms.items() if what.startswith("bit ")), (file, harms)
    assert len(found) > 2


def rows_of(rows: Any) -> Any:
    """All that is read of planned rows, to compare."""
    every = range(len(rows))
    arrays = [[(name, array.tobytes()) for name, array in rows.row(number).items()] for number in every]
    return arrays, [rows.places(number) for number in every], [rows.bytes(number) for number in every], rows.counts
