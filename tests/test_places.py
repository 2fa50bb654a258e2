"""Files that a job may touch and files that it may not: whatever it is asked to write to, nothing of others is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROWS = '{"id": "a", "prompt": "x"}\n{"id": "b", "prompt": "y"}\nbad\n'


@pytest.fixture
def run(bmx):
    """``bmx run`` with the fake model on an input of three rows, the last one bad."""
    Path("in.jsonl").write_text(ROWS)

    def call(*args: Any):
        return bmx("run", *(args if args and not str(args[0]).startswith("-") else ("in.jsonl", *args)), "-m", "fake")

    return call


def contents() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("x.run.json", "-o", "x"), "the manifest x.run.json is also an input"),
        (("x.lock", "-o", "x"), "the lock x.lock is also an input"),
        (("x.errors.jsonl", "-o", "x"), "the error file x.errors.jsonl is also an input"),
        (("x.jsonl", "-o", "x.jsonl"), "also an input"),
        (("x.jsonl", "-o", "y", "--error-file", "x.jsonl"), "also an input"),
        (("x.jsonl", "-o", "y", "--error-file", "y"), "the error file y is also the output"),
        (("x.jsonl", "-o", "y", "--error-file", "./y"), "the error file y is also the output"),
        (("x.jsonl", "-o", "y", "--error-file", "y.run.json"), "the manifest y.run.json is also the error file"),
        (("x.jsonl", "-o", "y", "--stats-file", "y.run.json"), "the manifest y.run.json is also the stats file"),
        (("x.jsonl", "-o", "y", "--stats-file", "y.lock"), "the lock y.lock is also the stats file"),
        (("x.jsonl", "-o", "y", "--stats-file", "x.jsonl"), "the stats file x.jsonl is also an input"),
        (("x.jsonl", "-o", "y", "--stats-file", "precious.txt"), "the stats file precious.txt exists"),
        (("x.jsonl", "-o", "y", "--stats-file", "/dev/null"), "the stats file /dev/null exists"),
        (("x.jsonl", "-o", "-", "--error-file", "precious.txt"), "the error file precious.txt exists"),
        (("x.jsonl", "-o", "precious.txt"), "precious.txt exists, and no precious.txt.run.json says how it was made"),
        (
            ("x.jsonl", "-o", "y", "--error-file", "precious.txt"),
            "precious.txt exists, and no y.run.json says how it was made",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_no_file_is_two_things_and_no_file_of_others_is_replaced(run, args, said):
    for name in ("x.run.json", "x.lock", "x.errors.jsonl", "x.jsonl"):
        Path(name).write_text(ROWS)
    Path("precious.txt").write_text("precious\n")
    before = contents()
    ended = run(*args)
    assert ended.code == 2
    assert said in ended.complaint[0]
    assert contents() == before


def test_a_file_that_happens_to_be_called_like_the_lock_is_left_alone(run):
    Path("y.lock").write_text("precious")
    ended = run("in.jsonl", "-o", "y")
    assert ended.code == 1
    assert "y.lock is not a lock file" in ended.complaint[0]
    assert Path("y.lock").read_text() == "precious"
    Path("y.lock").write_text("")
    assert run("in.jsonl", "-o", "y").code == 3
    assert not Path("y.lock").exists()


def test_a_stats_file_of_an_earlier_run_is_replaced(run):
    assert run("--stats-file", "s.json").code == 3
    assert run("--stats-file", "s.json", "--overwrite").code == 3
    Path("s.json").write_text("")
    assert run("--stats-file", "s.json").code == 3
    assert json.loads(Path("s.json").read_text())["rows"]["before"] == 3


@pytest.mark.parametrize(
    ("code", "args"),
    [
        (5, ("",)),
        (5, (".",)),
        (5, ("/",)),
        (5, ("..",)),
        (2, ("circle",)),
        (2, ("n" * 300,)),
        (2, ("in.jsonl", "-o", "n" * 300)),
        (2, ("in.jsonl", "-o", "n" * 250)),
        (2, ("in.jsonl", "-o", "circle")),
        (2, ("in.jsonl", "-o", "y", "--stats-file", "circle")),
        (2, ("in.jsonl", "-o", "a\0b")),
        (2, ("in.jsonl", "-o", ".")),
        (2, ("in.jsonl", "-o", "in.jsonl/y")),
        (1, ("in.jsonl", "-m", "~nobody-of-that-name/x")),
        (1, ("in.jsonl", "-m", "m" * 5000)),
        (1, ("in.jsonl", "-m", "a\0b")),
    ],
    ids=lambda value: " ".join(word[:20] for word in value) if isinstance(value, tuple) else "",
)
def test_a_name_that_no_file_can_have_is_a_line_and_no_traceback(bmx, code, args):
    Path("in.jsonl").write_text(ROWS)
    Path("circle").symlink_to("circle")
    ended = bmx("run", *args, *(() if "-m" in args else ("-m", "fake")))
    assert ended.code == code
    assert any(line.startswith("error: ") for line in ended.log)
    assert {str(path) for path in Path().iterdir()} == {"in.jsonl", "circle"}


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "seed: 2001-99-99",
        "seed: " + "1" * 5000,
        'output_file: "a\\0b"',
        "lock_wait: .inf",
        "lock_wait: " + "9" * 400,
        "row_timeout: .nan",
        "stats_file: [a]",
    ],
    ids=lambda text: text[:20],
)
def test_a_config_of_odd_values_is_a_line_and_no_traceback(run, text):
    Path("bmx.yaml").write_text(text)
    ended = run("--config", "bmx.yaml")
    assert ended.code == 2
    assert ended.log[0].startswith("error: ")
    assert not Path("in.out.jsonl").exists()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "[" * 100_000, '{"format": 2}', '{"format": 2, "fingerprint": {}}', '{"format": 1}'],
    ids=lambda text: text[:30] or "empty",
)
def test_an_output_whose_manifest_is_broken_is_left_alone(run, text):
    assert run().code == 3
    Path("in.out.jsonl.run.json").write_text(text)
    before = contents()
    ended = run()
    assert ended.code == 2
    assert "in.out.jsonl.run.json" in ended.complaint[0]
    assert contents() == before
    assert run("--overwrite").code == 3


def test_a_manifest_with_another_kind_of_model_in_it_is_broken_too(run):
    assert run().code == 3
    manifest = Path("in.out.jsonl.run.json")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"model": []}))
    assert run().code == 2


@pytest.mark.parametrize("name", ["in.out.jsonl", "in.out.jsonl.errors.jsonl"])
def test_a_torn_tail_goes_even_when_nothing_is_left_to_do(run, name):
    assert run().code == 3
    whole = Path(name).read_bytes()
    Path(name).write_bytes(whole + b'{"id": "q", "te')
    assert run().code == 3
    assert Path(name).read_bytes() == whole


def test_an_output_by_two_names_is_one_output(run):
    Path("real").mkdir()
    Path("a.jsonl").symlink_to("real/out.jsonl")
    Path("b.jsonl").symlink_to("real/out.jsonl")
    assert run("-o", "a.jsonl").code == 3
    assert {path.name for path in Path("real").iterdir()} == {
        "out.jsonl",
        "out.jsonl.errors.jsonl",
        "out.jsonl.run.json",
    }
    ended = run("-o", "b.jsonl")
    assert ended.code == 3
    assert "nothing to do: all rows have their records already (3)" in ended.log


@pytest.mark.parametrize("mode", ["rich", "plain"])
def test_a_model_name_is_no_markup(bmx, mode):
    Path("in.jsonl").write_text(ROWS)
    assert bmx("run", "in.jsonl", "-m", "[/b]", "--progress", mode).code == 1


def test_a_full_disk_under_the_printed_settings_is_a_line(tmp_path):
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "bmx", "run", "in.jsonl", "--print-config"]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode != 0
    assert "cannot write standard output: No space left" in ended.stderr


def test_a_variable_that_looks_like_a_setting_and_is_none_is_warned_of(bmx, monkeypatch):
    Path("in.jsonl").write_text('{"prompt": "x"}\n')
    monkeypatch.setenv("BMX_KV_BUGDET", "5")
    ended = bmx("run", "in.jsonl", "-m", "fake", "-q")
    assert ended.code == 0
    assert ended.log == ["warning: the variable BMX_KV_BUGDET is not a setting of bmx"]
