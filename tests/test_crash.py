"""What is left when a run is killed, its disk fails, or it is told to stop: whole records, each once, and a way on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pytest
from forked import Fault, Result, Work

from bmx.engine.fake import FakeRunner
from bmx.job import line_file

SEEDS, KILLS_PER_SEED = 4, 8
MANY = 1000  # more calls than any run here makes
ENDLESS = {"id": "endless", "prompt": "on and on", "max_tokens": 1_000_000, "ignore_eos": True}
BAD = (
    b'{"id": "cut off", "prompt": ',
    b"no JSON at all",
    b'{"prompt": "x", "max_tokens": -1}',
    b'{"id": "empty", "prompt": ""}',
    b"[1, 2]",
    b'{"custom_id": "stream", "method": "POST", "url": "/v1/chat/completions", "body": {"stream": true}}',
    b"\xff\xfe\x00 not UTF-8",
)


def plain(number: int, **more: Any) -> dict[str, Any]:
    return {"id": f"row {number}", "prompt": f"prompt {number}", "max_tokens": 12} | more


def chat(number: int) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": f"question {number}"}], "max_tokens": 9}
    return {"custom_id": f"chat {number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


def completion(number: int) -> dict[str, Any]:
    body = {"model": "fake", "prompt": f"once upon {number}", "max_tokens": 5}
    return {"custom_id": f"completion {number}", "method": "POST", "url": "/v1/completions", "body": body}


def unnamed(number: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"étoile ☆ {number}"}]}


def mixed_rows(random: Random, number: int = 30) -> list[dict[str, Any] | bytes]:
    """Rows of all kinds, some of them bad, a blank line among them."""
    rows = [random.choice((plain, plain, chat, completion, unnamed))(i) for i in range(number)]
    for bad in random.sample(BAD, random.randrange(len(BAD))):
        rows.insert(random.randrange(len(rows)), bad)
    rows.insert(random.randrange(len(rows)), b"  ")
    return rows


def short_rows() -> list[dict[str, Any] | bytes]:
    return [plain(0), BAD[0], chat(1), plain(2)]


def undisturbed(work: Work) -> Work:
    """The same job, run once."""
    other = Work(work.folder.with_name(f"{work.folder.name}-undisturbed"), [], *work.flags)
    other.input.write_bytes(work.input.read_bytes())
    ended = other()
    assert ended.code == (3 if other.failures else 0), ended.err
    lines = [line for line in work.input.read_bytes().split(b"\n") if line.strip()]
    assert len(other.records) == len(lines)
    return other


def finish(work: Work, expected: Work, *flags: str) -> None:
    """The same command again must end by itself, with what an undisturbed run gives."""
    ended = work(*flags)
    assert ended.code == (3 if expected.failures else 0), ended.err
    assert work.answers == expected.answers
    assert work.failures == expected.failures
    assert work.state == "finished"
    assert not (work.folder / "out.jsonl.lock").exists()


def in_input_order(work: Work) -> bool:
    return list(work.answers) == list(undisturbed_order(work))


def undisturbed_order(work: Work) -> list[Any]:
    names = []
    for number, line in enumerate(work.input.read_bytes().split(b"\n"), 1):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            names.append(row.get("custom_id", row.get("id", f"line-{number}")))
    return [name for name in names if name in work.answers]


def check_manifest(work: Work) -> None:
    """It is there whole, or not at all."""
    if work.manifest.exists():
        assert work.state in ("running", "finished", "interrupted", "failed")


@pytest.mark.parametrize("seed", range(SEEDS))
def test_o1_killed_at_random_moments_and_run_again_it_gives_what_an_undisturbed_run_gives(tmp_path, seed):
    random = Random(seed)
    ordered = bool(seed % 2)
    flags = ["--order", "input"] if ordered else []
    work = Work(tmp_path / "work", mixed_rows(random), *flags, "--max-num-seqs", 1 + random.randrange(8))
    expected, kills = undisturbed(work), 0
    while kills < KILLS_PER_SEED:
        if random.random() < 0.4:
            fault = Fault(after=random.uniform(0.001, 0.15))
        else:
            fault = Fault(at=random.randrange(1, 60), torn=random.random() < 0.5)
        ended = work(fault=fault)
        check_manifest(work)
        if ended.code == -9 or ended.code == -14:
            kills += 1
            continue
        finish(work, expected)
        assert not ordered or in_input_order(work)
        work.clear()
    finish(work, expected)
    assert not ordered or in_input_order(work)


def kills(work: Work, *flags: str, **how: Any):
    """Kill a run at each of its calls in turn; the folder is as it was before, each time."""
    before = work.files
    for at in count(1):
        assert at < MANY
        work.clear()
        for name, data in before.items():
            (work.folder / name).write_bytes(data)
        ended = work(*flags, fault=Fault(at=at, **how))
        if ended.code >= 0:
            return
        check_manifest(work)
        yield at


@pytest.mark.parametrize("torn", [False, True])
def test_o1_and_g11_killed_at_any_call_to_the_system_it_goes_on(tmp_path, torn):
    work = Work(tmp_path / "work", short_rows())
    expected = undisturbed(work)
    done = 0
    for at in kills(work, torn=torn, **({"calls": ("write",)} if torn else {})):
        finish(work, expected)
        done = at
    assert done >= (6 if torn else 25)


def test_o1_a_run_that_goes_on_may_be_killed_at_any_call(tmp_path):
    work = Work(tmp_path / "work", short_rows())
    expected = undisturbed(work)
    assert work(fault=Fault(at=4, calls=("write",), torn=True)).code == -9
    for _ in kills(work, calls=("open", "ftruncate", "write", "replace")):
        finish(work, expected)


@pytest.mark.parametrize("first", [False, True])
def test_o1_killed_while_failed_rows_are_answered_again_no_row_is_lost_or_there_twice(tmp_path, first):
    """The command that goes on is the same one, or the one without --retry-failed."""
    fixed = [plain(0), plain(5, id="cut off"), chat(1), plain(2)]
    work = Work(tmp_path / "work", fixed)
    expected = undisturbed(work)
    work.put(short_rows())
    assert work().code == 3
    work.put(fixed)
    for _ in kills(work, "--retry-failed", calls=("unlink", "ftruncate", "write", "replace")):
        if first and work.errors.exists():
            continue  # the failed row is still recorded as such, and has changed since: refused on purpose
        finish(work, expected, *([] if first else ["--retry-failed"]))


def test_o1_killed_while_an_output_is_overwritten_it_begins_anew(tmp_path):
    work = Work(tmp_path / "work", short_rows(), "--overwrite")
    expected = undisturbed(work)
    assert work().code == 3
    for _ in kills(work, calls=("unlink", "ftruncate", "write", "replace")):
        finish(work, expected)


def test_o1_nothing_of_a_killed_run_is_left_beside_the_output(tmp_path):
    work = Work(tmp_path / "work", short_rows())
    expected = undisturbed(work)
    for _ in kills(work, calls=("replace",)):
        finish(work, expected)
        assert sorted(work.files) == sorted(expected.files)


def test_o1_killed_after_the_last_row_the_manifest_still_says_what_answered(tmp_path):
    work = Work(tmp_path / "work", short_rows())
    expected = undisturbed(work)
    assert work(fault=Fault(at=2, calls=("replace",))).code == -9
    assert work.records == expected.records
    finish(work, expected)
    assert {"model", "plan"} <= json.loads(work.manifest.read_bytes()).keys()


def whole_and_tail(work: Work) -> tuple[bytes, bytes]:
    """An output without its last line, and that line."""
    data = work.output.read_bytes()
    start = data[:-1].rfind(b"\n") + 1
    return data[:start], data[start:]


@pytest.mark.parametrize("dialect", [plain, chat])
def test_o2_a_last_line_cut_off_anywhere_is_answered_again(tmp_path, dialect):
    work = Work(tmp_path / "work", [dialect(0), dialect(1)])
    expected = undisturbed(work)
    assert work().code == 0
    head, line = whole_and_tail(work)
    for length in (*range(12), *range(12, len(line) - 1, 19), len(line) - 1):
        work.output.write_bytes(head + line[:length])
        finish(work, expected)


@pytest.mark.parametrize("zeros", [1, 7, 4096, 100_000])
@pytest.mark.parametrize("kept", [0, 5, 40])
def test_o2_a_tail_of_zeros_is_cut_off(tmp_path, zeros, kept):
    """What some file systems leave after a power cut."""
    work = Work(tmp_path / "work", [plain(0), plain(1)])
    expected = undisturbed(work)
    assert work().code == 0
    head, line = whole_and_tail(work)
    work.output.write_bytes(head + line[:kept] + bytes(zeros))
    finish(work, expected)


def test_o2_an_error_file_that_is_torn_is_completed(tmp_path):
    work = Work(tmp_path / "work", [plain(0), BAD[0], plain(1), BAD[1]])
    expected = undisturbed(work)
    assert work().code == 3
    data = work.errors.read_bytes()
    for length in range(data.index(b"\n") + 1, len(data), 9):
        work.errors.write_bytes(data[:length])
        finish(work, expected)


TAILS = {
    "text": b"the end\n",
    "text without an end": b"the end",
    "another program's JSON": b'{"name": "x", "score": 1}\n',
    "a list": b"[]\n",
    "a record after a torn one": None,
    "another program's JSON that begins alike": b'{"id": "row 9", "score": 1}\n',
    "several of those": b'{"id": "row 9", "score": 1}\n{"id": "row 10", "score": 2}\n',
    "one of those without an end": b'{"id": "row 9", "score": 1}',
}


@pytest.mark.parametrize("name", TAILS)
@pytest.mark.parametrize("which", ["output", "errors"])
def test_o2_a_tail_that_is_not_of_bmx_is_set_aside(tmp_path, name, which):
    work = Work(tmp_path / "work", [plain(0), BAD[0], plain(1), BAD[1]])
    expected = undisturbed(work)
    assert work(fault=Fault(at=6, calls=("write",))).code == -9
    path = getattr(work, which)
    data = path.read_bytes()
    tail = TAILS[name] or data[:20] + b"\n" + data
    path.write_bytes(data + tail)
    finish(work, expected)
    assert path.read_bytes().startswith(data)
    aside = path.with_name(f"{path.name}.set-aside").read_bytes()
    assert aside.rstrip(b"\n") in tail
    assert which == "errors" or aside.rstrip(b"\n") == tail.rstrip(b"\n")


FAILING = ("open", "write", "fsync", "ftruncate", "replace", "close")


def check_failed(work: Work, ended: Result, expected: Work) -> None:
    assert ended.code not in (0, 3), ended
    assert ended.code > 0
    assert "Traceback" not in ended.err
    [line] = [line for line in ended.err.splitlines() if "error: " in line]
    assert "out.jsonl" in line
    assert "done:" not in ended.err
    assert work.records.items() <= expected.records.items()
    assert not work.manifest.exists() or work.state != "finished" or work.records == expected.records


@pytest.mark.parametrize("lasts", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("call", FAILING)
def test_o3_a_disk_that_fails_ends_the_run_and_what_was_written_stays(tmp_path, call, lasts):
    work = Work(tmp_path / "work", short_rows())
    expected = undisturbed(work)
    for at in count(1):
        assert at < MANY
        work.clear()
        error = ("ENOSPC", "EIO", "EDQUOT")[at % 3]
        ended = work(fault=Fault(do=error, at=at, calls=(call,), lasts=lasts))
        if "befallen" not in ended.out:
            break
        if call == "close" and ended.code == (3 if expected.failures else 0):
            assert (work.records, work.state) == (expected.records, "finished")  # the lock's: nothing is at stake
        else:
            check_failed(work, ended, expected)
        finish(work, expected)
    assert at > 1


def test_o3_a_line_that_a_full_disk_takes_half_of_is_taken_back(tmp_path):
    work = Work(tmp_path / "work", short_rows())
    expected = undisturbed(work)
    for at in count(1):
        work.clear()
        ended = work(fault=Fault(do="ENOSPC", at=at, calls=("write",), torn=True))
        if "befallen" not in ended.out:
            break
        check_failed(work, ended, expected)
        finish(work, expected)
    assert at > 4


def name_of(handle: int) -> str:
    return Path(os.readlink(f"/proc/self/fd/{handle}")).name


def test_o2_all_is_on_the_disk_before_the_manifest_says_so(bmx, tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Files are synced before they are put in place, their folder after that, and the answers before the last time."""
    work = Work(tmp_path / "work", short_rows())
    monkeypatch.chdir(work.folder)
    dirty, write, sync, replace = set(), os.write, os.fsync, os.replace
    put: list[str] = []

    def written(handle: int, data: Any) -> int:
        dirty.add(name_of(handle))
        return write(handle, data)

    def synced(handle: int) -> None:
        dirty.discard(name_of(handle))
        sync(handle)

    def replaced(source: str, target: Path) -> None:
        assert Path(source).name not in dirty
        put.append(target.name)
        dirty.add("work")
        replace(source, target)
        if len(put) == 2:
            assert dirty <= {"work", "out.jsonl.lock"}

    for name, call in (("write", written), ("fsync", synced), ("replace", replaced)):
        monkeypatch.setattr(os, name, call)
    assert bmx("run", "in.jsonl", "-o", "out.jsonl", "-m", "fake").code == 3
    assert put == ["out.jsonl.run.json"] * 2
    assert dirty == {"out.jsonl.lock"}


def test_o3_a_disk_that_fails_in_the_background_ends_the_run(bmx, tmp_path, monkeypatch: pytest.MonkeyPatch):
    """It says so only once: to the thread that syncs now and then."""
    work = Work(tmp_path / "work", [plain(i) for i in range(50)], "--max-num-seqs", 1)
    expected = undisturbed(work)
    monkeypatch.chdir(work.folder)
    failed, sync = [], os.fsync

    def failing(handle: int) -> None:
        if name_of(handle) == "out.jsonl" and not failed:
            failed.append(handle)
            raise OSError(5, "Input/output error")
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(line_file, "SYNC_SECONDS", 0.0)
        patch.setattr(os, "fsync", failing)
        ended = bmx("run", "in.jsonl", "-o", "out.jsonl", "-m", "fake", "--max-num-seqs", 1)
    assert failed
    assert ended.code == 1
    assert "error: cannot write out.jsonl: Input/output error" in ended.log
    assert work.state != "finished"
    finish(work, expected)


def test_o3_writes_that_take_half_of_what_they_are_given_are_no_fault(tmp_path):
    work = Work(tmp_path / "work", short_rows())
    finish(work, undisturbed(work))
    work.clear()
    ended = work(fault=Fault(do="short"))
    assert ended.code == 3
    finish(work, undisturbed(work))


def test_o4_a_log_that_cannot_be_written_stops_nothing(tmp_path):
    work = Work(tmp_path / "work", short_rows())
    expected = undisturbed(work)
    assert work("-v", err="/dev/full").code == 3
    assert work.records == expected.records
    assert work.state == "finished"


def real(work: Work, redirected: str, *flags: str) -> subprocess.CompletedProcess[bytes]:
    """The command in a process of its own, its streams redirected by a shell."""
    command = [sys.executable, "-m", "bmx", "run", "in.jsonl", "-m", "fake", *flags]
    return subprocess.run(
        ["sh", "-c", f'"$@" {redirected}', "sh", *command],
        cwd=work.folder,
        capture_output=True,
        check=False,
        timeout=60,
    )


def test_o4_a_log_that_is_closed_stops_nothing(tmp_path):
    work = Work(tmp_path / "work", short_rows())
    expected = undisturbed(work)
    assert real(work, "2>&-", "-o", "out.jsonl").returncode == 3
    assert work.records == expected.records


def test_o4_a_closed_standard_output_stops_nothing_where_the_answers_go_to_a_file(tmp_path):
    work = Work(tmp_path / "work", short_rows())
    expected = undisturbed(work)
    assert real(work, ">&-", "-o", "out.jsonl").returncode == 3
    assert work.records == expected.records


CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}
EVERY_SIGNAL = pytest.mark.parametrize("name", CODES)


def check_stopped(work: Work, ended: Result, name: str) -> None:
    assert ended.code == CODES[name], ended.err
    [line] = [line for line in ended.err.splitlines() if "error: " in line]
    assert name in line
    assert "Traceback" not in ended.err
    assert "done:" not in ended.err
    assert not (work.folder / "out.jsonl.lock").exists()


@EVERY_SIGNAL
def test_o5_and_o6_the_first_signal_lets_the_rows_in_flight_finish_and_begins_no_more(tmp_path, name):
    work = Work(tmp_path / "work", [plain(i, ignore_eos=True) for i in range(12)], "--max-num-seqs", 3)
    expected = undisturbed(work)
    check_stopped(work, work(fault=Fault(do=name, at=3, calls=("write",))), name)
    assert list(work.records) == ["row 0", "row 1", "row 2"]
    assert work.state == "interrupted"
    finish(work, expected)


@EVERY_SIGNAL
def test_o5_and_o6_the_second_signal_ends_the_run_where_it_is(tmp_path, name):
    work = Work(tmp_path / "work", [plain(i, ignore_eos=True) for i in range(12)], "--max-num-seqs", 3)
    expected = undisturbed(work)
    check_stopped(work, work(fault=Fault(do=name, at=4, calls=("write",), times=2)), name)
    assert list(work.records) == ["row 0"]
    assert work.state == "interrupted"
    finish(work, expected)


@pytest.mark.parametrize("times", [1, 2])
@EVERY_SIGNAL
def test_o5_and_o6_a_row_that_never_ends_is_dropped_and_may_be_ended_later(tmp_path, name, times):
    work = Work(tmp_path / "work", [ENDLESS, plain(0), plain(1)])
    fault = Fault(do=name, at=4, calls=("write",), times=times)
    patience = ["--shutdown-timeout", "0" if times == 1 else "5"]
    check_stopped(work, work(*patience, fault=fault), name)
    assert work.records.keys() <= {"row 0", "row 1"}
    assert work.state == "interrupted"
    assert work("--row-timeout", "0.2").code == 3
    assert work.answers.keys() == {"row 0", "row 1"}
    assert work.failures["endless"]["error"]["code"] == "timeout"


@EVERY_SIGNAL
def test_o5_and_o6_a_signal_at_any_call_leaves_a_job_that_goes_on(tmp_path, name):
    work = Work(tmp_path / "work", short_rows(), "--shutdown-timeout", 0)
    expected = undisturbed(work)
    for at in range(2, MANY, 3):
        work.clear()
        ended = work(fault=Fault(do=name, at=at))
        if ended.code == 3:
            break
        assert ended.code == CODES[name], ended.err
        assert "Traceback" not in ended.err
        finish(work, expected)
    assert at > 20


def test_o6_sighup_ends_no_run_under_nohup(tmp_path):
    work = Work(tmp_path / "work", short_rows())
    expected = undisturbed(work)
    ended = work(fault=Fault(do="SIGHUP", at=3, calls=("write",)), ignored=["SIGHUP"])
    assert ended.code == 3
    assert work.records == expected.records


def test_o6_a_reader_that_has_gone_ends_the_run_quietly(tmp_path):
    work = Work(tmp_path / "work", [plain(i) for i in range(5)])
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "bmx", "run", "in.jsonl", "-m", "fake", "-o", "-", "-q"]
    ended = subprocess.run(command, cwd=work.folder, stdout=writing, stderr=subprocess.PIPE, check=False, timeout=60)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_g9_a_gpu_that_dies_in_the_middle_leaves_the_finished_rows_and_a_job_that_goes_on(
    bmx, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    rows = [plain(i) for i in range(10)]
    work = Work(tmp_path, rows, "--max-num-seqs", 2)
    given = ("run", "in.jsonl", "-o", "out.jsonl", "-m", "fake", "--max-num-seqs", 2)
    expected = undisturbed(Work(tmp_path / "other", rows, "--max-num-seqs", 2))
    steps, run = count(1), FakeRunner.run

    def dying(self: FakeRunner, step: Any) -> list[int | None]:
        if next(steps) == 15:
            raise RuntimeError("CUDA error: device-side assert triggered\nmore")
        return run(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(FakeRunner, "run", dying)
        ended = bmx(*given)
    assert ended.code == 1
    assert "error: the GPU stopped: CUDA error: device-side assert triggered" in ended.log
    assert 0 < len(work.records) < 10
    assert work.state == "failed"
    assert bmx(*given).code == 0
    assert work.records == expected.records


def test_o16_answers_in_the_order_of_the_input_stay_so_when_rows_end_at_different_times(tmp_path):
    rows = [plain(i, max_tokens=1 + 7 * (i % 3), ignore_eos=True) for i in range(12)]
    work = Work(tmp_path / "work", rows, "--max-num-seqs", 4)
    expected = undisturbed(work)
    assert not in_input_order(expected)
    finish(work, expected, "--order", "input")
    assert in_input_order(work)


def test_o17_a_run_with_failed_rows_says_how_many_and_has_a_code_of_its_own(tmp_path):
    work = Work(tmp_path / "work", [plain(0), BAD[0], BAD[1], BAD[3], plain(1)])
    ended = work("--log-format", "json", "--stats-file", "stats.json")
    assert ended.code == 3
    errors = {"invalid_json": 2, "invalid_request": 1}
    assert [line["errors"] for line in map(json.loads, ended.err.splitlines()) if "errors" in line] == [errors]
    for path in (work.manifest, work.folder / "stats.json"):
        record = json.loads(path.read_bytes())
        assert record["errors"] == errors
        assert (record["rows"]["answered"], record["rows"]["failed"]) == (2, 3)
    assert work().code == 3  # and says so again


def test_o11_a_folder_is_left_as_it_was_but_for_the_results(tmp_path):
    work = Work(tmp_path / "work", [plain(0)])
    finish(work, undisturbed(work))
    assert sorted(work.files) == ["out.jsonl", "out.jsonl.run.json"]
    assert Path(tmp_path / "work").exists()
