"""Files that come to harm on the disk, and what is read of them then."""

from __future__ import annotations

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
    """What may become of a file: removed (None), cut off, or one bit of it changed, in so many places."""
    yield "removed", None
    for size in sorted({0, 1, len(data) // 2, len(data) - 1} - {len(data), -1}):
        yield f"cut to {size}", data[:size]
    last = len(data) - 1
    for number, place in enumerate(sorted({round(part * last / max(places - 1, 1)) for part in range(places)})):
        if data:
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
    """Each file of the newest of two checkpoints comes to each harm: never is anything restored that was not saved."""
    save(directory / "whole", 2, 4)
    older, newest = bytes_of(state_of(2)), bytes_of(state_of(4))
    inside = (directory / "whole" / "4").rglob("*")
    files = sorted(path.relative_to(directory / "whole") for path in inside if path.is_file())
    assert len(files) > 10
    tried = found = 0
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
                found += 1
            tried += 1
            shutil.rmtree(directory / "tried")
    tell(f"checkpoints: {tried} damages of {len(files)} files, {found} found, {tried - found} harmless")
    assert found > tried // 3


def check_damaged_cache(make: Callable[[], Any], cache: Path, places: int, tell: Callable[[str], None]) -> None:
    """Each file of a token cache comes to each harm: found and named when it is read, or harmless.

    make: the rows over the cache, opened anew.
    """
    wanted = rows_of(make())
    tried = found = 0
    for file in sorted(cache.iterdir()):
        data = file.read_bytes()
        for what, changed in damages(data, places):
            put(file, changed)
            try:
                got = rows_of(make())
            except UserError as error:
                line = str(error)
                assert line.startswith(f"{cache}/") and "is damaged (" in line and "\n" not in line, (file, what, line)
                assert "remove it and run again, it is made anew" in line
                # What the line says helps.
                Path(line.split(" is damaged")[0]).unlink()
                got = rows_of(make())
                found += 1
            assert got == wanted, (file, what)
            tried += 1
            put(file, data)
    tell(f"token cache: {tried} damages, {found} found, {tried - found} harmless")
    assert found > tried // 4


def rows_of(rows: Any) -> Any:
    """All that is read of planned rows, to compare."""
    every = range(len(rows))
    arrays = [[(name, array.tobytes()) for name, array in rows.row(number).items()] for number in every]
    return arrays, [rows.places(number) for number in every], [rows.bytes(number) for number in every], rows.counts
