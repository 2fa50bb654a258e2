"""What the terminal, the log, the environment and other people's files do to a run, and what it tells them."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import stat
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest

from bmx.cli.process import check_process
from bmx.errors import MemoryLimitError, ModelError, UsageError
from bmx.model.loader import check_libraries, loading_errors
from bmx.plan.memory import SlotGroup
from bmx.redact import without_secrets
from bmx.stats import Stats
from bmx.terminal.display import Display
from bmx.terminal.foreign import foreign_lines
from bmx.terminal.reports import plan_range, status_line
from bmx.terminal.tables import megabytes

SECRET = "hf_" + "s3cr3t" * 6
WORDS = "the quick brown fox was never here"


@pytest.fixture
def run(bmx):
    """``bmx run in.jsonl`` with the fake model."""

    def call(*args: Any, rows: list[Any] | None = None):
        rows = [{"id": i, "prompt": f"{WORDS} {i}"} for i in range(5)] if rows is None else rows
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        Path("in.jsonl").write_text("".join(f"{line}\n" for line in lines))
        return bmx("run", "in.jsonl", "-m", "fake", *args)

    return call


def subprocess_run(*args: str, env: dict[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """``bmx`` in a process of its own, with a few variables and no others."""
    own = {"PATH": os.environ["PATH"], **(env or {})}
    command = [sys.executable, "-m", "bmx", *args]
    return subprocess.run(command, env=own, capture_output=True, check=False, **options)


def log(text: str) -> list[dict[str, Any]]:
    """The objects of a JSON log, each line strict JSON."""
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


# Logs


def test_o4_a_full_log_disk_does_not_stop_the_results(run, monkeypatch):
    with io.TextIOWrapper(Path("/dev/full").open("wb", buffering=0), write_through=True) as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert run("-v", "--log-format", "json").code == 0
    assert len(Path("in.out.jsonl").read_text().splitlines()) == 5


def test_o13_without_a_home_or_a_place_for_temporary_files(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    nowhere = {
        "HOME": "/dev/null/x",
        "XDG_CACHE_HOME": "/dev/null/x",
        "TMPDIR": "/dev/null/x",
        "HF_HOME": "/dev/null/x",
    }
    ended = subprocess_run("run", "in.jsonl", "-m", "fake", env=nowhere, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr


def test_o14_times_are_utc_and_durations_do_not_follow_the_clock(run, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    assert run("--stats-file", "stats.json").code == 0
    manifest = json.loads(Path("in.out.jsonl.run.json").read_text())
    stats = json.loads(Path("stats.json").read_text())
    for time in (manifest["started"], manifest["finished"], stats["time"], stats["last_row"]):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", time)
    assert 0 <= stats["throughput"]["seconds"] < 3600


def test_o17_a_partial_failure_has_an_exit_code_a_line_and_counts(run):
    ended = run("--stats-file", "stats.json", rows=[{"prompt": "x"}, "bad", {"prompt": 1}])
    assert ended.code == 3
    assert "done: 1 of 3 rows answered, 2 failed in 0 s" in ended.log
    counts = json.loads(Path("stats.json").read_text())
    assert counts["rows"] == {"total": 3, "answered": 1, "failed": 2, "skipped": 0, "before": 0}
    assert counts["errors"] == {"invalid_json": 1, "invalid_request": 1}


@pytest.mark.parametrize("env", [{"TERM": "dumb"}, {"NO_COLOR": "1"}, {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_o18_off_a_terminal_there_are_plain_lines_with_times(tmp_path, env):
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": "é😀", "prompt": "x"}, ensure_ascii=False) + "\n", "utf-8")
    ended = subprocess_run("run", "in.jsonl", "-m", "fake", "-v", "-o", "ü" * 60 + ".jsonl", env=env, cwd=tmp_path)
    assert ended.returncode == 0
    lines = ended.stderr.splitlines()
    assert all(re.match(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ \S", line) for line in lines)
    assert b"\x1b" not in ended.stderr
    assert any(len(line) > 100 for line in lines)
    [output] = tmp_path.glob("*ü.jsonl")
    assert json.loads(output.read_bytes())["id"] == "é😀"


def test_o18_the_live_display_is_for_terminals_alone(run):
    assert "\x1b" in run("--progress", "rich").err
    assert "\x1b" not in run("--progress", "auto", "--overwrite").err


def test_o19_a_run_in_which_no_row_finishes_says_for_how_long(monkeypatch):
    stats = Stats(rows_total=10, rows_done=3, slots=4, active_slots=4)
    assert "no row finished" not in status_line(stats)
    stats.started -= 3600
    assert "no row finished for 1 h 00 min" in status_line(stats)
    stats.count_row(None)
    assert "no row finished" not in status_line(stats)


def halfway(**more: Any) -> Stats:
    """A run in 2 slots that has read 1,000 of 4,000 prompt tokens in 10 s and generated 100 of 400 in 20 s."""
    stats = Stats(rows_total=4, slots=2, prompt_work=4000, answer_work=400, **more)
    stats.prompt_tokens, stats.prefill_seconds = 1000, 10.0
    stats.generated_tokens = stats.decode_tokens = 100
    stats.decode_steps, stats.decode_seconds = 50, 20.0
    return stats


def test_t6_a_silence_that_is_usual_for_the_job_is_not_told_of():
    stats = halfway()  # 120 s in all for 4 rows in 2 slots: a row takes about a minute
    stats.started -= 100
    assert "no row finished" not in status_line(stats)
    stats.started -= 25
    assert "no row finished for 2 min 05 s" in status_line(stats)
    stats.count_row(None)
    stats.last_row -= 200  # not twice the longest silence before
    assert "no row finished" not in status_line(stats)
    stats.last_row -= 60
    assert "no row finished for 4 min 20 s" in status_line(stats)


def test_t7_the_time_left_counts_prompts_and_answers_apart():
    assert halfway().seconds_left == pytest.approx(3000 * 0.01 + 300 * 0.2)
    reading = Stats(rows_total=4, prompt_work=4000, answer_work=400)
    assert (reading.seconds_left, reading.share_done) == (None, None)
    reading.count_step(
        prompt_tokens=1000, decode_tokens=0, sampled=1, rounds=1, seconds=10.0, active=2, full_cache_bytes=0
    )
    assert reading.seconds_left is None  # how long the answers take is not known yet
    assert "at least 30 s left" in status_line(reading)
    beside = halfway(ended_work=400, ended_tokens=100)  # every answer has ended: only prompts are left
    assert beside.seconds_left == pytest.approx(30.0)


def test_t7_early_ends_shorten_the_time_left_by_what_they_tell_of_other_answers():
    stats = halfway()
    stats.count_answer(allowed=100, tokens=10)  # a tenth of what it might have had
    assert stats.seconds_left == pytest.approx(3000 * 0.01)  # the 90 tokens in flight are more than the rest will need
    stats.answer_work = 10**6
    assert stats.seconds_left == pytest.approx(30 + ((10**6 - 100) * 0.1 - 90) * 0.2)


def test_t7_the_last_rows_decode_beside_fewer_others():
    stats = halfway(rows_done=3)  # one row is left: half as many tokens in a step of the same length
    assert stats.seconds_left == pytest.approx(3000 * 0.01 + 300 * 0.4)


def test_t7_the_time_between_steps_counts_too():
    stats = halfway()
    stats.started -= 60  # twice the seconds of its steps
    assert stats.seconds_left == pytest.approx(2 * (30 + 60), rel=0.01)


def test_t7_tokens_that_grow_beside_prompts_need_no_steps_of_their_own():
    stats = halfway()
    stats.generated_tokens += 200  # in the steps that read the 1,000 prompt tokens
    assert stats.seconds_left == pytest.approx(30.0)


def test_o19_the_heartbeat_comes_by_itself(run, monkeypatch):
    """Every line of it has the counters; here it beats as fast as it can, during a row that takes until its timeout."""
    monkeypatch.setattr("bmx.terminal.display.EARLY_SECONDS", 0.01)
    endless = {"id": "endless", "prompt": "x", "ignore_eos": True, "max_tokens": 10**6}
    ended = run("--row-timeout", "0.5", "--log-format", "json", rows=[endless, {"id": "b", "prompt": "y"}])
    assert ended.code == 3
    beats = [line for line in log(ended.err) if "rows_done" in line]
    assert beats
    assert {beat["rows_total"] for beat in beats} == {2}
    assert [json.loads(line)["id"] for line in Path("in.out.jsonl").read_text().splitlines()] == ["b"]
    [failed] = Path("in.out.jsonl.errors.jsonl").read_text().splitlines()
    assert json.loads(failed)["error"]["code"] == "timeout"


@pytest.mark.parametrize("width", [80, 200])
def test_t4_the_live_progress_shows_bar_rows_time_left_and_speed(width):
    from rich.console import Console

    from bmx.terminal.progress import RunProgress

    stats = halfway(rows_done=1, active_slots=2, memory_bytes=826_000_000)
    stats.errors["timeout"] += 1
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(RunProgress(stats, console))
    bar, rest = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", console.file.getvalue()).splitlines()
    assert max(len(bar), len(rest)) <= width
    assert bar.startswith("━" * 8)
    assert bar.rstrip().endswith("25%, 1/4 rows (1 failed), about 1 min 30 s left")
    assert "prompt 100 tok/s, generated 3 tok/s, 0 s elapsed" in rest
    assert "2/2 slots, memory 826 MB" in rest


def test_t4_what_does_not_fit_beside_the_rest_is_left_out():
    from bmx.terminal.progress import fitting

    assert list(fitting(["a" * 50, "b" * 20, "c" * 40, "d" * 4], 78)) == ["a" * 50, "b" * 20, "d" * 4]
    assert list(fitting(["a" * 50], 20)) == ["a" * 50]


class Terminal(io.StringIO):
    """A standard error that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("progress", ["auto", "rich"])
def test_t4_a_terminal_that_only_takes_lines_gets_lines(monkeypatch, progress):
    monkeypatch.setattr(sys, "stderr", Terminal())
    for name, live in (("dumb", False), ("unknown", False), ("xterm", True)):
        monkeypatch.setenv("TERM", name)
        display = Display(progress)
        with display.waiting("loading"), display.live(Stats()):
            display.note("hello")
        text = sys.stderr.getvalue()
        assert ("\x1b" in text) == live
        assert bool(re.search(r"(?m)^\d{4}-\d\d-\d\dT\S+Z hello$", text)) != live
        sys.stderr.truncate(0)


def test_t4_no_color_has_no_colours(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    with Display().live(halfway()):
        pass
    assert "rows" in sys.stderr.getvalue()
    assert not re.search(r"\x1b\[[0-9;]*m", sys.stderr.getvalue())


def test_t4_long_lines_break_between_words_on_a_terminal_and_paths_stay_whole(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "30")
    path = "/data/" + "x" * 40
    Display().note(f"one two three four five six seven {path} eight")
    assert sys.stderr.getvalue().splitlines() == ["one two three four five six", "seven", path, "eight"]


class Broken(Terminal):
    """A terminal that is gone, or a log on a full disk."""

    def write(self, _: str) -> int:
        raise OSError(5, "Input/output error")

    flush = write


@pytest.mark.parametrize("mode", ["rich", "plain"])
def test_t4_a_display_that_breaks_does_not_stop_the_run(run, monkeypatch, mode):
    monkeypatch.setattr("bmx.terminal.display.EARLY_SECONDS", 0.01)
    monkeypatch.setattr(sys, "stderr", Broken())
    monkeypatch.setenv("TERM", "xterm")
    assert run("-v", "--progress", mode).code == 0
    assert len(Path("in.out.jsonl").read_text().splitlines()) == 5


def test_t5_the_plan_is_told_in_ranges():
    groups = tuple(SlotGroup(capacity=128 * i, slots=i) for i in range(1, 12))
    assert plan_range(groups) == "66 of 128 to 1,408 KV pairs"
    assert plan_range(groups[:1]) == "1 of 128 KV pairs"


def test_t8_one_is_not_many_and_small_is_not_nothing(run):
    ended = run(rows=[{"id": 1, "prompt": "w"}])
    assert ended.code == 0
    assert "1 prompt of 1 token in all" in ended.err
    assert not re.search(r"\b1 (prompts|tokens|rows|slots|times)\b| 0 MB|\b(?!100)[1-9]\d{2,}% of the", ended.err)
    assert megabytes(4321) == "4 kB"


def test_o20_many_rows_that_fail_alike_are_one_line(run):
    ended = run("--max-errors", "20000", rows=["bad"] * 10_000 + [{"prompt": "x"}])
    assert ended.code == 3
    assert [line for line in ended.log if "invalid" in line] == [
        "10,000 rows failed: 10,000 invalid_json; see in.out.jsonl.errors.jsonl"
    ]
    assert len(Path("in.out.jsonl.errors.jsonl").read_text().splitlines()) == 10_000


def test_quiet_is_silent_unless_something_failed(run):
    assert run("-q").err == ""
    assert run("-q").err == ""
    ended = run("-q", "--overwrite", rows=[{"prompt": "x"}, "bad"])
    assert ended.log == ["1 row failed: 1 invalid_json; see in.out.jsonl.errors.jsonl"]
    assert run("-q", "--overwrite", "-o", "no/where.jsonl").log[0].startswith("error: the folder no does not exist")


def test_a_json_log_is_an_object_per_line_errors_too(run):
    ended = run("--log-format", "json", "-v", rows=[{"id": "a", "prompt": "x"}, "bad"])
    lines = log(ended.err)
    assert all({"time", "level", "message"} <= set(line) for line in lines)
    assert {line["level"] for line in lines} == {"info", "warning"}
    [failed] = [line for line in lines if line["level"] == "warning"]
    assert failed["errors"] == {"invalid_json": 1}
    [error] = log(run("--log-format", "json", "--temperature", "1").err)
    assert error["level"] == "error"
    assert error["hint"]


def test_the_stats_file_follows_the_run_and_says_how_it_ended(run, monkeypatch):
    monkeypatch.setattr("bmx.job.stats_file.STATS_SECONDS", 0.001)
    seen: set[str] = set()
    replace = os.replace

    def watched(old: str, new: Any) -> None:
        replace(old, new)
        if str(new).endswith("stats.json"):
            seen.add(json.loads(Path(new).read_text())["state"])

    monkeypatch.setattr(os, "replace", watched)
    assert run("--stats-file", "stats.json").code == 0
    assert seen == {"running", "finished"}
    assert run("--stats-file", "stats.json", "--max-errors", "0", "--overwrite", rows=["bad"]).code == 1
    assert json.loads(Path("stats.json").read_text())["state"] == "failed"


def test_a_stats_file_that_cannot_be_written_is_said_once_and_does_not_stop_the_run(run, monkeypatch):
    monkeypatch.setattr("bmx.job.stats_file.STATS_SECONDS", 0.001)
    Path("stats").mkdir()
    replace = os.replace

    def full(old: str, new: Any) -> None:
        if str(new).endswith("stats.json"):
            raise OSError(28, "No space left on device")
        replace(old, new)

    monkeypatch.setattr(os, "replace", full)
    endless = {"id": "endless", "prompt": "x", "ignore_eos": True, "max_tokens": 10**6}
    ended = run("--stats-file", "stats/stats.json", "--row-timeout", "0.2", rows=[endless, {"prompt": "y"}])
    assert ended.code == 3
    assert [line for line in ended.log if "No space left" in line] == [
        "warning: cannot write stats/stats.json: No space left on device"
    ]
    assert list(Path("stats").iterdir()) == []


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_t4_help_on_a_full_disk_is_one_line(unbuffered):
    env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "bmx", "-h"]
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(command, env=env, stdout=full, stderr=subprocess.PIPE, check=False)
    assert (ended.returncode, ended.stderr.count(b"\n")) == (1, 2)
    assert b"No space left on device" in ended.stderr


# Secrets and strangers


def test_s1_keys_in_the_environment_go_nowhere(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\nbad\n')
    env = {"HF_TOKEN": SECRET, "HUGGING_FACE_HUB_TOKEN": SECRET, "OPENAI_API_KEY": SECRET}
    for model in ("fake", "nobody/no-such-model"):
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
        ended = subprocess_run(
            *("run", "in.jsonl", "-m", model, "-v", "-o", f"{len(model)}.jsonl", "--stats-file", "s.json"),
            env={**env, **offline},
            cwd=tmp_path,
        )
        assert ended.returncode == (3 if model == "fake" else 1)
        assert SECRET.encode() not in ended.stdout + ended.stderr
    assert not any(SECRET in path.read_text() for path in tmp_path.glob("*.json*"))


@pytest.mark.parametrize("args", [(), ("-v",), ("--log-format", "json", "-v")], ids=" ".join)
def test_s2_prompts_and_answers_are_never_in_the_log_nor_beside_the_output(run, args):
    template = "Secretly: {prompt}"
    rows = [{"id": 1, "prompt": WORDS}, {"id": 2, "prompt": WORDS, "temperature": WORDS}, f'{{"prompt": "{WORDS}"']
    ended = run("--prompt-template", template, "--stats-file", "s.json", *args, rows=rows)
    assert ended.code == 3
    answer = json.loads(Path("in.out.jsonl").read_text().splitlines()[0])["text"]
    told = ended.err + Path("in.out.jsonl.run.json").read_text() + Path("s.json").read_text()
    for private in ("quick", "Secretly", answer):
        assert private
        assert private not in told


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_s3_files_are_for_those_whom_the_umask_allows(run, mask):
    before = os.umask(mask)
    try:
        assert run("--stats-file", "s.json", rows=[{"prompt": "x"}, "bad"]).code == 3
    finally:
        os.umask(before)
    for path in Path().glob("*.json*"):
        if path.name != "in.jsonl":
            assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/passwd", "a\nb", "[/b]", "\x1b[31mred\x1b[0m", "\r", "\u202e", "x" * 10**6]
)
def test_s4_s6_ids_are_data_and_never_paths_markup_or_escapes(run, name):
    before = set(Path().iterdir())
    ended = run("-v", rows=[{"id": name, "prompt": "x"}, {"id": "other", "prompt": 1}])
    assert ended.code == 3
    made = {path.name for path in set(Path().iterdir()) - before}
    assert made == {"in.jsonl", "in.out.jsonl", "in.out.jsonl.errors.jsonl", "in.out.jsonl.run.json"}
    assert json.loads(Path("in.out.jsonl").read_text())["id"] == name
    assert all(line.isprintable() and len(line) < 300 for line in ended.log)
    assert any(line.startswith("row ") for line in ended.log)


@pytest.mark.parametrize(
    "text",
    [
        "model: !!python/object/apply:os.system ['touch owned']",
        "a: &a [x, x]\nmodel: [*a, *a]",
        "max_tokens: 1\nmax_tokens: 2",
        "max_tokens: 1\nmax-tokens: 2",
        "no_such_key: 1",
        "a: &a [x, x]\nb: &b [*a, *a]\n? [*b, *b]\n: 1",
        "? [x]\n: 1",
        "a: &a {x: 1}\nb: {<<: [*a, *a]}",
        "max_tokens: " + ":".join(["1"] * 10_000),
        "max_tokens: " + "9" * 10_000,
        "model: [" + "1," * 30_000 + "]",
        "[" * 10_000,
        "- 1",
        "{",
        "x" * 2_000_000,
    ],
    ids=lambda text: text[:20],
)
def test_s5_a_config_is_plain_settings_and_nothing_else(run, text):
    Path("bmx.yaml").write_text(text)
    ended = run("--config", "bmx.yaml")
    assert ended.code == 2
    assert not Path("owned").exists()
    assert not Path("in.out.jsonl").exists()


def test_s7_stop_strings_are_few_and_none_is_empty(run):
    rows = [{"prompt": "x", "stop": ["a"] * 1000}, {"prompt": "x", "stop": [""]}, {"prompt": "x", "stop": ["(a+)+$"]}]
    assert run(rows=rows).code == 3
    assert len(Path("in.out.jsonl.errors.jsonl").read_text().splitlines()) == 2


def test_s8_nothing_listens(tmp_path):
    code = """
import socket, sys
from bmx.cli.commands import main
def refused(*_): raise AssertionError("a socket")
socket.socket.bind = socket.socket.connect = socket.socket.listen = refused
sys.argv = ["bmx", "run", "in.jsonl", "-m", "fake", "-q"]
main()
"""
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_text_of_others_does_nothing_to_a_terminal(capsys):
    for show in (Display("plain").note, Display("rich").note, Display("plain").warn, Display("rich").error):
        show("[red]\x1b[2J\r\nnext \u202e é😀 [/b]")
        assert r"[red]\x1b[2J\r\nnext \u202e é😀 [/b]" in capsys.readouterr().err


def test_the_stats_file_of_a_run_that_cannot_start_says_so(run):
    assert run("--stats-file", "stats.json").code == 0
    ended = run("--stats-file", "stats.json", "--temperature", "1")
    assert ended.code == 2
    assert json.loads(Path("stats.json").read_text())["state"] == "failed"


# What other libraries print


def foreign(*texts: str, quiet: bool = False, log_format: str = "text") -> None:
    """Write these texts to standard error as a library would."""
    with foreign_lines(Display("plain", quiet=quiet, log_format=log_format)):
        for text in texts:
            sys.stderr.write(text)


def test_b3_what_libraries_print_warn_of_and_log_are_lines_of_the_log(capfd):
    with foreign_lines(Display("plain", log_format="json")):
        sys.stderr.write("half a ")
        sys.stderr.write("line\nand one without an end")
        warnings.warn("of\ntwo lines", UserWarning, stacklevel=1)
        warnings.warn("only for developers", DeprecationWarning, stacklevel=1)
        logging.StreamHandler().handle(logging.makeLogRecord({"msg": "Retrying in 1s"}))
        logging.getLogger("bmx.somewhere").warning("a warning of bmx")
    lines = log(capfd.readouterr().err)
    assert [line["message"] for line in lines] == [
        "half a line",
        "and one without an end",
        "UserWarning: of two lines",
        "Retrying in 1s",
        "warning: a warning of bmx",
    ]
    assert {line["level"] for line in lines} == {"warning"}


def test_b3_quiet_hides_what_libraries_print(capfd):
    foreign("Retrying\n", quiet=True)
    assert capfd.readouterr().err == ""


def test_b3_a_progress_bar_is_a_line_every_few_seconds(capfd, monkeypatch):
    bar = [f"\r\x1b[Afile: {n}%|##" for n in range(100)]
    foreign(*bar, "\r\x1b[Afile: 100%|##\n")
    assert capfd.readouterr().err == ""
    monkeypatch.setattr("bmx.terminal.foreign.BAR_SECONDS", 0.0)
    foreign("\rfile: 1%|#", "\r\x1b[A", "\rfile: 50%|##", "\rfile: 100%|###\n")
    shown = capfd.readouterr().err.splitlines()
    assert [line.split("file: ")[1] for line in shown] == ["1%|#", "50%|##", "100%|###"]


@pytest.mark.parametrize(
    "text",
    [
        "HEAD http://me:s3cr3t-pw@hub.local/x",
        "proxy 'https://s3cr3t-pw@proxy:8080' failed",
        "GET https://cdn/x?a=1&X-Amz-Signature=s3cr3t-pw&b=2",
        "curl -H 'Authorization: Basic s3cr3t-pw'",
        "headers {'authorization': 'Bearer s3cr3t-pw'}",
        "Bearer s3cr3t-pw",
        f"token {SECRET}",
    ],
)
def test_b3_secrets_are_taken_out_of_every_line(capfd, text):
    foreign(text)
    Display("plain").error(text)
    shown = capfd.readouterr().err
    assert shown.count("***") >= 2
    assert "s3cr3t" not in shown


def test_b3_text_without_secrets_stays_as_it_is():
    text = "see https://example.org/a?page=2 or write to me@example.org, key: value, hf_home"
    assert without_secrets(text) == text


def test_b3_warnings_that_python_would_raise_do_not_end_a_run(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    ended = subprocess_run("run", "in.jsonl", "-m", "fake", "-q", env={"PYTHONWARNINGS": "error"}, cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, b"")


# A process that libraries cannot work in


@pytest.mark.parametrize("threads", ["0", "abc", "-1", "1.5", " ", "99999999"])
def test_e3_a_number_of_threads_that_is_none_is_refused(run, monkeypatch, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    ended = run()
    assert ended.code == 2
    assert "OMP_NUM_THREADS" in ended.complaint[0]


@pytest.mark.parametrize("threads", ["", "1", "02", "2,1"])
def test_e3_other_numbers_of_threads_are_taken(run, monkeypatch, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert run().code == 0


@pytest.mark.parametrize("given", [None, "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_threads_that_wait_soon_sleep_unless_the_environment_says_how_they_wait(run, monkeypatch, given):
    """Those that spin take the cores of a busy machine from the threads that they wait for."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "ACTIVE")
        if name != given:
            monkeypatch.delenv(name)
    assert run().code == 0
    spins = os.environ.get("GOMP_SPINCOUNT")
    if given is None:
        assert 1000 <= int(spins) <= 100_000
    else:
        assert spins == (None if given == "OMP_WAIT_POLICY" else "ACTIVE")


def test_e3_a_current_folder_that_was_deleted_is_said(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(UsageError, match="current folder has been deleted"):
        check_process()


def test_e3_a_library_that_cannot_be_loaded_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match="transformers cannot be loaded: import of transformers halted"):
        check_libraries()


def test_e3_a_torch_that_cannot_be_loaded_is_one_line(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "bmx.job.job", None)  # what needs torch is imported with it
    ended = run()
    assert ended.code == 1
    assert ended.complaint[0].startswith("error: a library cannot be loaded: ")


def test_e3_a_system_that_gives_no_memory_for_a_model_is_said():
    with pytest.raises(MemoryLimitError, match="no memory to load model tiny"), loading_errors("tiny"):
        raise MemoryError


def test_e3_a_process_without_memory_ends_in_one_line(run, monkeypatch):
    def refused(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("bmx.job.job.find_paths", refused)
    ended = run()
    assert ended.code == 4
    assert "no more memory" in ended.complaint[0]


# Pipes that nobody serves


@pytest.fixture
def fifo(monkeypatch):
    """A function that makes a named pipe; what takes longer than a moment is said at once."""
    monkeypatch.setattr("bmx.periodic.LONG_SECONDS", 0.0)

    def make(name: str) -> Path:
        os.mkfifo(name)
        return Path(name)

    return make


def test_e4_an_input_pipe_without_a_writer_is_waited_for_aloud(bmx, fifo, caplog):
    pipe = fifo("pipe")

    def write_when_waited_for() -> None:
        while not any("waiting for the end of pipe" in line for line in caplog.messages):
            os.sched_yield()
        pipe.write_text('{"prompt": "x"}\n')

    writer = threading.Thread(target=write_when_waited_for, daemon=True)
    writer.start()
    ended = bmx("run", "pipe", "-m", "fake", "-o", "out.jsonl")
    writer.join()
    assert ended.code == 0
    assert "warning: waiting for the end of pipe: a pipe is read as a whole first" in ended.log
    assert len(Path("out.jsonl").read_text().splitlines()) == 1


def test_e4_an_output_pipe_without_a_reader_is_waited_for_aloud(run, fifo, caplog):
    pipe, read = fifo("pipe"), []

    def read_when_waited_for() -> None:
        while "waiting for a program that reads pipe" not in caplog.messages:
            os.sched_yield()
        read.append(pipe.read_text())

    reader = threading.Thread(target=read_when_waited_for, daemon=True)
    reader.start()
    ended = run("-o", "pipe")
    reader.join()
    assert ended.code == 0
    assert len(read[0].splitlines()) == 5
