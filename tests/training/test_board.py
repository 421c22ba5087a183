"""TensorBoard's event files, read back frame by frame as TensorBoard reads them."""

from __future__ import annotations

import multiprocessing
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from transllm_jax.errors import UserError
from transllm_jax.training.record.board import Board

ROOT = Path(__file__).parents[2]


def checksum(data: bytes) -> int:
    """The masked CRC-32C of a TFRecord, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def events(directory: Path) -> list[Event]:
    """The events of all files, by file name; a frame that is cut off ends its file."""
    found = []
    for path in sorted(directory.iterdir()):
        data, place = path.read_bytes(), 0
        while place + 12 <= len(data):
            (length,) = struct.unpack("<Q", data[place : place + 8])
            head, body = data[place : place + 8], data[place + 12 : place + 12 + length]
            tail = data[place + 12 + length : place + 16 + length]
            if len(tail) < 4:
                break
            assert struct.unpack("<I", data[place + 8 : place + 12]) == (checksum(head),)
            assert struct.unpack("<I", tail) == (checksum(body),)
            found.append(Event.FromString(body))
            place += 16 + length
    return found


def shown(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: a session that starts at a step drops what was before it from this step on."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for event in events(directory):
        if event.HasField("session_log") and event.session_log.status == SessionLog.START:
            for name, points in curves.items():
                curves[name] = [point for point in points if point[0] < event.step]
        for value in event.summary.value:
            curves.setdefault(value.tag, []).append((event.step, value.simple_value))
    return curves


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    board = Board(tmp_path / "deep" / "board", step=0)
    board.scalars(1, {"loss": 2.5, "loss/thai": np.float32(3.5)})
    board.scalars(20, {"loss": float("inf"), "tokens": 123456})
    board.close()
    directory = tmp_path / "deep" / "board"
    assert shown(directory) == {
        "loss": [(1, 2.5), (20, float("inf"))],
        "loss/thai": [(1, 3.5)],
        "tokens": [(20, 123456.0)],
    }
    first = events(directory)[0]
    assert first.file_version == "brain.Event:2"  # without it TensorBoard purges by disorder, not by session
    assert all(event.wall_time > 1.6e9 for event in events(directory))


def test_no_step_stands_twice_after_a_resume(tmp_path: Path) -> None:
    board = Board(tmp_path, step=0)
    for step in range(1, 8):
        board.scalars(step, {"loss": float(step)})
    # Killed: not closed. The checkpoint is of step 5. And again before the first one is saved, in the same second.
    board = Board(tmp_path, step=5)
    board.scalars(6, {"loss": 60.0})
    board = Board(tmp_path, step=5)
    for step in (6, 7, 8):
        board.scalars(step, {"loss": 600.0 + step})
    assert len(list(tmp_path.iterdir())) == 3
    assert shown(tmp_path) == {
        "loss": [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.0), (6, 606.0), (7, 607.0), (8, 608.0)]
    }
    board = Board(tmp_path, step=0)
    board.scalars(1, {"loss": 9.0})
    board.close()
    assert shown(tmp_path) == {"loss": [(1, 9.0)]}


def test_files_of_one_second_are_read_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1.7e9)
    for number in range(12):
        board = Board(tmp_path, step=0)
        board.scalars(1, {"loss": float(number)})
        board.close()
    assert len(list(tmp_path.iterdir())) == 12
    assert shown(tmp_path) == {"loss": [(1, 11.0)]}


def test_each_row_is_on_disk_at_once(tmp_path: Path) -> None:
    board = Board(tmp_path, step=0)
    for step in (1, 2):
        board.scalars(step, {"loss": 1.0})
        assert shown(tmp_path)["loss"][-1] == (step, 1.0)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-3])  # killed within a write
    assert shown(tmp_path) == {"loss": [(1, 1.0)]}
    board.close()


def test_a_full_disk_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"file/board: TensorBoard's events cannot be written \(Not a directory\); free"
    ):
        Board(tmp_path / "file" / "board", step=0)
    board = Board(tmp_path / "board", step=0)

    def full(self: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tensorboardX.record_writer.RecordWriter.flush", full)
    with pytest.raises(UserError, match=r"board: TensorBoard's events cannot be written \(No space left on device\)"):
        board.scalars(1, {"loss": 1.0})


def test_neither_torch_nor_anything_slow_is_loaded(tmp_path: Path) -> None:
    """tensorboardX imports torch where it can. A stand-in for it says so; a torch that was there before stays."""
    (tmp_path / "torch.py").write_text("print('torch was loaded')\n")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import transllm_jax.training.record.board as board
assert "tensorboardX" not in sys.modules
from pathlib import Path
board.Board(Path({str(tmp_path / "board")!r}), step=0).close()
assert "tensorboardX" in sys.modules and "jax" not in sys.modules and "matplotlib" not in sys.modules
assert "torch" not in sys.modules
print("before")
import torch
board.Board(Path({str(tmp_path / "board")!r}), step=0).close()
assert sys.modules["torch"] is torch
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "before\ntorch was loaded\n", "")


def test_no_thread_writes(tmp_path: Path) -> None:
    """One that dies on a full disk would leave the training loop waiting for ever."""
    before = threading.active_count(), len(multiprocessing.active_children())
    board = Board(tmp_path, step=0)
    board.scalars(1, {"loss": 1.0})
    assert (threading.active_count(), len(multiprocessing.active_children())) == before
    board.close()
