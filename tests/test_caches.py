"""Caches on full disks, without a folder, damaged, and shared by processes: done without, or filled again."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest
from gguf_files import random_model, write_gguf

from bmx import cache, kernels
from bmx.errors import ModelError
from bmx.model import gguf_cache
from bmx.plan import machine_speed
from bmx.plan.machine_speed import machine_rates

RATES = machine_speed.Rates(flops=1.0, bandwidth=2.0, thin_bandwidth=3.0, operator_seconds=4.0, source="a test")


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch) -> None:
    """No warning has been given yet, and the compiled kernels of this process are there."""
    kernels.choose("cpu")
    monkeypatch.setattr(cache, "_told", set())


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file may grow beyond this while the body runs: what the system does on a full disk, for this process alone."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fill(folder: Path) -> None:
    """Write what an entry of these tests holds."""
    (folder / "weights").write_bytes(b"w" * 10_000)
    (folder / "config").write_bytes(b"c" * 10)


def test_e2_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "kernels" / "entry"
    with file_limit(100), pytest.raises(OSError, match="too large"):
        cache.store(file, b"x" * 1000)
    assert list(file.parent.iterdir()) == []
    cache.store(file, b"x" * 1000)
    cache.store(file, b"y" * 1000)
    assert [path.read_bytes() for path in file.parent.iterdir()] == [b"y" * 1000]


def test_e2_a_folder_appears_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "gguf" / "entry"
    with file_limit(100), pytest.raises(OSError, match="too large"):
        cache.filled(folder, fill)
    assert not folder.exists()
    assert not list(folder.parent.glob("**/weights"))
    assert cache.filled(folder, fill) == folder
    assert cache.is_whole(folder)
    assert {path.name for path in folder.iterdir()} == {"weights", "config", cache.CONTENTS}


@pytest.mark.parametrize("damage", ["cut", "missing", "contents", "empty folder", "killed"])
def test_e2_a_damaged_entry_is_filled_again(tmp_path, damage):
    folder = cache.filled(tmp_path / "entry", fill)
    if damage == "cut":
        (folder / "weights").write_bytes(b"w" * 9_999)
    elif damage == "missing":
        (folder / "config").unlink()
    elif damage == "contents":
        (folder / cache.CONTENTS).write_bytes(b"[")
    else:
        for path in folder.iterdir():
            path.unlink()
    if damage == "killed":
        folder.rmdir()
        (tmp_path / ".entry.partial").mkdir()
        (tmp_path / ".entry.partial" / "weights").write_bytes(b"half")
    assert not cache.is_whole(folder)
    assert cache.is_whole(cache.filled(folder, fill))
    assert (folder / "weights").stat().st_size == 10_000
    assert not (tmp_path / ".entry.partial").exists()


def test_e2_several_that_want_an_entry_at_once_fill_it_once(tmp_path):
    filled = []

    def count(folder: Path) -> None:
        filled.append(folder)
        fill(folder)

    threads = [Thread(target=cache.filled, args=(tmp_path / "entry", count)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(filled) == 1
    assert cache.is_whole(tmp_path / "entry")


def test_e2_an_entry_in_a_folder_that_cannot_be_written_is_used(tmp_path):
    folder = cache.filled(tmp_path / "entry", fill)
    (tmp_path / ".entry.lock").unlink()
    tmp_path.chmod(0o555)
    try:
        assert cache.filled(folder, fill) == folder
        assert not (tmp_path / ".entry.lock").exists()
    finally:
        tmp_path.chmod(0o755)


@pytest.mark.parametrize("place", ["/dev/null/nowhere", "full"])
def test_e2_speeds_that_cannot_be_kept_are_measured_again_with_one_warning(tmp_path, monkeypatch, caplog, place):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path) if place == "full" else place)
    monkeypatch.setattr(machine_speed, "measure", lambda *_: RATES)
    with file_limit(10 if place == "full" else 10**9):
        assert machine_rates("cpu", "float32", "a").flops == 1.0
        assert machine_rates("cpu", "float32", "a").flops == 1.0
    [warning] = caplog.messages
    assert "measured in each run: set XDG_CACHE_HOME" in warning
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_e2_without_platformdirs_speeds_are_measured_in_each_run_and_one_warning_names_the_package(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    monkeypatch.setattr(machine_speed, "measure", lambda *_: RATES)
    assert [machine_rates("cpu", "float32", "a").flops for _ in range(2)] == [1.0, 1.0]
    [warning] = caplog.messages
    assert "(platformdirs is not installed), and is measured in each run: pip install platformdirs" in warning


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"flops": 1}', b"\0" * 100, b"[" * 10**5])
def test_e2_damaged_speeds_are_measured_again(tmp_path, monkeypatch, content):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine_speed, "measure", lambda *_: RATES)
    machine_rates("cpu", "float32", "a")
    [file] = [path for path in tmp_path.rglob("*") if path.is_file()]
    file.write_bytes(content)
    assert machine_rates("cpu", "float32", "a").flops == 1.0
    assert file.read_bytes() != content


def test_e2_without_a_home_there_is_no_cache_in_the_current_folder(monkeypatch):
    def nobody(*_: object) -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr("platformdirs.user_cache_path", nobody)
    with pytest.raises(OSError, match="no home folder"):
        cache.cache_folder("rates")
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *_: Path("~/.cache/bmx"))
    with pytest.raises(OSError, match="no home folder"):
        cache.cache_folder("rates")


@pytest.fixture
def gguf(tmp_path, monkeypatch) -> Path:
    """A tiny GGUF file; nothing is unpacked yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_gguf(tmp_path / "tiny.gguf", random_model())
    return tmp_path / "tiny.gguf"


def test_e2_a_model_that_cannot_be_unpacked_is_one_line_that_names_the_folder_and_the_variable(gguf, tmp_path):
    with file_limit(4096), pytest.raises(ModelError, match=r"cache .*/cache/bmx: File too large") as refused:
        gguf_cache.unpacked_folder([gguf])
    assert "XDG_CACHE_HOME" in refused.value.hint
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"] == []
    assert gguf_cache.kept_folder([gguf]) is None
    assert gguf_cache.unpacked_folder([gguf]) == gguf_cache.kept_folder([gguf])


def test_e2_a_disk_without_room_for_a_model_is_known_before_it_is_unpacked(gguf, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 100))
    with pytest.raises(ModelError, match="No space left on device"):
        gguf_cache.unpacked_folder([gguf])


@pytest.mark.parametrize("place", ["/dev/null/nowhere", None])
def test_e2_without_a_cache_a_gguf_file_is_refused_in_one_line(gguf, monkeypatch, place):
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    if place is None:
        monkeypatch.setattr("platformdirs.user_cache_path", lambda *_: Path("~/.cache/bmx"))
    with pytest.raises(ModelError, match=r"Not a directory|no home folder") as refused:
        gguf_cache.unpacked_folder([gguf])
    assert "XDG_CACHE_HOME" in refused.value.hint


def test_e2_without_platformdirs_a_gguf_file_is_refused_in_one_line_that_names_the_package(gguf, monkeypatch):
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert gguf_cache.kept_folder([gguf]) is None
    with pytest.raises(ModelError, match="platformdirs is not installed") as refused:
        gguf_cache.unpacked_folder([gguf])
    assert "pip install platformdirs" in refused.value.hint


def test_e2_a_lock_that_cannot_be_taken_is_one_line(gguf, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(ModelError, match="No locks available") as refused:
        gguf_cache.unpacked_folder([gguf])
    assert "XDG_CACHE_HOME" in refused.value.hint


def test_e2_a_model_that_lost_a_part_of_its_weights_is_unpacked_again(gguf):
    folder = gguf_cache.unpacked_folder([gguf])
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    assert gguf_cache.kept_folder([gguf]) is None
    assert gguf_cache.unpacked_folder([gguf]) == folder
    assert weights.read_bytes() == content
