"""Output directories: complete or absent, and only a model is overwritten."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from transllm_jax.errors import UserError
from transllm_jax.new_directory import check_destination, new_directory


def test_a_directory_is_complete_or_unchanged(tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    dst.mkdir()
    (dst / "config.json").touch()
    host = socket.gethostname()
    with subprocess.Popen(["true"]) as ended:  # after the wait no process has its number
        pass
    killed, alive = f".dst.partial-{host}-{ended.pid}", f".dst.partial-{host}-{os.getppid()}"
    for left in (killed, alive, ".dst.partial-otherhost-1"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "half").touch()
    with new_directory(tmp_path / "other"):
        pass
    assert (tmp_path / killed).exists(), "it belongs to another destination"
    shutil.rmtree(tmp_path / "other")
    with pytest.raises(ZeroDivisionError), new_directory(dst, overwrite=True) as directory:
        assert not any(directory.iterdir())
        (directory / "new").touch()
        raise ZeroDivisionError
    kept = [alive, ".dst.partial-otherhost-1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "dst"])
    assert [path.name for path in dst.iterdir()] == ["config.json"]
    with new_directory(dst, overwrite=True) as directory:
        (directory / "new").touch()
        assert (dst / "config.json").exists()
    assert [path.name for path in dst.iterdir()] == ["new"]
    # After a kill between the two renames the old directory comes back, even if this call fails.
    os.rename(dst, tmp_path / f".dst.replaced-{host}-{ended.pid}")
    with pytest.raises(ZeroDivisionError), new_directory(dst):
        raise ZeroDivisionError
    assert [path.name for path in dst.iterdir()] == ["new"]


def test_two_processes_do_not_mix_in_one_destination(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="made by another process meanwhile"), new_directory(tmp_path / "dst") as one:
        (one / "config.json").write_text("one")
        code = (
            "import sys; from pathlib import Path; from transllm_jax.new_directory import new_directory\n"
            "with new_directory(Path(sys.argv[1])) as d: (d / 'config.json').write_text('two')"
        )
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "dst")], check=True, cwd=Path(__file__).parents[2])
        assert one.exists()
    assert (tmp_path / "dst/config.json").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["dst"]


def test_only_a_model_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = tmp_path / "box"
    (box / "source").mkdir(parents=True)
    (box / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="does not look like a model"), new_directory(box, overwrite=True):
        pass
    (box / "config.json").touch()
    with pytest.raises(UserError, match=r"holds .*source, which is read"):
        check_destination(box, overwrite=True, reads=[box / "source"])
    with pytest.raises(UserError, match=r"lies in .*source, which is read"):
        check_destination(box / "source" / "new", reads=[box / "source"])
    monkeypatch.chdir(box / "source")
    for dst in (box, Path(".."), Path(".")):
        (box / "source/config.json").touch()
        with pytest.raises(UserError, match="is or holds"), new_directory(dst, overwrite=True):
            pass
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(box / "source"))
    with pytest.raises(UserError, match="is or holds"), new_directory(box, overwrite=True):
        pass
    assert (box / "thesis.txt").exists()


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), new_directory(tmp_path / "a/b/c"):
        raise ZeroDivisionError
    assert not any(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*choose a destination"), new_directory(tmp_path / "file/x"):
        pass


def test_a_full_disk_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="disk is full"), new_directory(tmp_path / "dst"):
        raise OSError(28, "No space left on device")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not a directory"), new_directory(tmp_path / "file", overwrite=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
