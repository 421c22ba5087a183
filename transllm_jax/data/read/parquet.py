"""Rows of parquet files. pyarrow is imported only here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transllm_jax.data.read.files import Place
from transllm_jax.data.read.records import missing_field
from transllm_jax.errors import UserError

_ROWS = 256  # rows that are converted to Python objects at a time
_BUFFER = 1 << 20  # bytes of a column that are read at a time


def iter_rows(
    file: Path,
    fields: Sequence[str],
    optional: Sequence[str] | None = (),
    on_read: Callable[[int], None] | None = None,
    ignored: Counter[str] | None = None,
) -> Iterator[tuple[dict[str, Any], Place]]:
    """The rows of a parquet file as records, with their numbers; only the columns of the fields are read.

    fields: all must exist; a name with dots is a column of that name, or reaches into a column. optional: read if they
    exist; None for all. on_read: called now and then with the number of bytes read so far, as if all rows had the same
    size. ignored: counts rows by the names of columns that are not read. Raises UserError with file and row; for a
    missing field it lists the columns.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(f"{file}: reading parquet needs pyarrow; pip install 'transllm-jax[data]'") from error
    place: Place | Path = file
    if not file.stat().st_size:
        raise UserError(f"{file} is empty: give a file with text in it, or leave it out")
    try:
        # Without read-ahead and with a buffer a column is read piece by piece, however large its row groups are.
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER) as table:
            names = table.schema_arrow.names
            columns: dict[str, None] = {}
            for field in fields:
                column = field if field in names else field.split(".")[0]
                if column not in names:
                    raise missing_field(names, field, str(file))
                columns[column] = None
            columns |= dict.fromkeys(name for name in (names if optional is None else optional) if name in names)
            if twice := [column for column in columns if names.count(column) > 1]:
                raise UserError(f"{file} has the column {twice[0]!r} twice: rename or remove one of them")
            others = [name for name in names if name not in columns]
            place = Place(str(file), 1, "row")
            size, rows = file.stat().st_size, table.metadata.num_rows
            for batch in table.iter_batches(_ROWS, columns=list(columns), use_threads=False):
                for row in batch.to_pylist():
                    if ignored is not None:
                        ignored.update(others)
                    yield row, place
                    place = place._replace(line=place.line + 1)
                if on_read is not None:
                    on_read(size * (place.line - 1) // rows)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(
            f"{place} cannot be read ({_first_line(error)}): the file is damaged, fetch it again"
        ) from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or _first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
