"""A file or folder is whole or absent, whatever happens while it is written."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from compress import atomic
from compress.errors import PocketclipError


def test_json_survives_a_round_trip_and_leaves_nothing_aside(tmp_path: Path) -> None:
    atomic.write_json(tmp_path / "deep" / "a.json", {"name": "笑"})
    assert (tmp_path / "deep" / "a.json").read_text() == '{\n "name": "笑"\n}\n'
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.json"]


def test_error_while_writing_keeps_the_old_file(tmp_path: Path) -> None:
    atomic.write_text(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError), atomic.file(tmp_path / "a.txt") as handle:
        handle.write(b"ne")
        raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_error_while_building_keeps_the_old_folder(tmp_path: Path) -> None:
    with atomic.folder(tmp_path / "bundle") as partial:
        atomic.write_text(partial / "a.txt", "old")
    with pytest.raises(RuntimeError), atomic.folder(tmp_path / "bundle") as partial:
        atomic.write_text(partial / "b.txt", "new")
        raise RuntimeError
    assert [p.name for p in tmp_path.rglob("*")] == ["bundle", "a.txt"]


def test_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    for name in ("old.txt", "new.txt"):
        with atomic.folder(tmp_path / "bundle") as partial:
            atomic.write_text(partial / name, name)
    assert [p.name for p in tmp_path.rglob("*")] == ["bundle", "new.txt"]


def test_kill_while_building_leaves_no_folder_and_the_next_build_succeeds(tmp_path: Path) -> None:
    script = (
        "import os, sys, pathlib; from compress import atomic\n"
        f"with atomic.folder(pathlib.Path({str(tmp_path / 'bundle')!r})) as partial:\n"
        "    (partial / 'half.txt').write_text('half')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[1])
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "bundle").exists()
    with atomic.folder(tmp_path / "bundle") as partial:
        atomic.write_text(partial / "whole.txt", "whole")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["bundle", "whole.txt"]


def test_file_in_the_way_of_a_folder_names_place_and_remedy(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(PocketclipError, match=r"runs.*--out"):
        atomic.write_text(tmp_path / "runs" / "a.txt", "x")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_full_disk_is_explained(tmp_path: Path) -> None:
    (tmp_path / ".partial-a.txt").symlink_to("/dev/full")
    with pytest.raises(PocketclipError, match="disk is full"):
        atomic.write_text(tmp_path / "a.txt", "x" * 100_000)
    assert list(tmp_path.iterdir()) == []


def test_size_limit_keeps_the_old_file(tmp_path: Path) -> None:
    script = (
        "import pathlib, resource, signal; from compress import atomic\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"atomic.write_bytes(pathlib.Path({str(tmp_path / 'a')!r}), bytes(5000))\n"
    )
    (tmp_path / "a").write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert "size limit" in done.stderr
    assert (tmp_path / "a").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_nan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []
