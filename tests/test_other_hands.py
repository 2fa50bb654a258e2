"""Other programs change the files of a job: every row still ends with one record, or a refusal says what to decide."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import forked
import pytest
from forked import Fault, Result, Run, Work

from bmx.errors import OutputError
from bmx.job.line_file import LineFile

ROWS, SPARE = 40, 10  # rows of an input, and others to put into it
SEEDS, CHANGES_PER_SEED = 6, 21
ASIDE = "out.jsonl.set-aside"


def make_rows(random: Random) -> list[bytes]:
    """Lines of an input: rows with ids and without, and a bad one."""
    lines = [json.dumps(make_row(random, number)).encode() for number in range(ROWS)]
    lines.insert(random.randrange(ROWS), b"no JSON")
    return lines


def make_row(random: Random, number: int) -> dict[str, Any]:
    named: dict[str, Any] = {"id": f"row {number}"} if random.random() < 0.6 else {}
    return {**named, "prompt": f"prompt {number}", "max_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> dict[str, str]:
    """The answer to each prompt that these tests use."""
    rows = [
        {"id": f"prompt {i}", "prompt": f"prompt {i}", "max_tokens": 6, "ignore_eos": True} for i in range(ROWS + SPARE)
    ]
    work = Work(tmp_path_factory.mktemp("all") / "work", rows)
    assert work().code == 0
    return {str(name): record["text"] for name, record in work.answers.items()}


def due(work: Work, texts: dict[str, str]) -> dict[str, str | None]:
    """What the job must give: the answer of each row of the input by its id, and None for a bad row."""
    found: dict[str, str | None] = {}
    for number, line in enumerate(work.input.read_bytes().split(b"\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
                found[row.get("id", f"line-{number}")] = texts[row["prompt"]]
            except ValueError:
                found[f"line-{number}"] = None
    return found


def given(work: Work) -> dict[str, str | None]:
    return {str(name): record.get("text") for name, record in work.records.items()}


def check_done(work: Work, ended: Result, texts: dict[str, str]) -> None:
    wanted = due(work, texts)
    assert ended.code == (3 if None in wanted.values() else 0), ended.err
    assert given(work) == wanted
    assert work.state == "finished"


def check_said(ended: Result) -> None:
    """Whatever happened, it ended in order: one line that says what, and one that says what to do."""
    assert "Traceback" not in ended.err, ended.err
    assert ended.code in (0, 1, 2, 3, 5, 75), ended
    if ended.code == 5:
        assert any(" error: " in line for line in ended.err.splitlines()[-2:]), ended.err
    elif ended.code not in (0, 3):
        assert [line.split(" ")[1] for line in ended.err.splitlines()[-2:]] == ["error:", "hint:"], ended.err


# What other hands do. Each change takes the job and chance; what it returns, if anything, is done after the run.

Undo = Callable[[], None] | None


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def put(path: Path, lines: list[bytes], how: Random) -> None:
    """Write lines as editors do: in place, or as a new file that takes the name."""
    if how.random() < 0.5:
        path.write_bytes(b"".join(lines))
    else:
        other = path.with_name(f"{path.name}.new")
        other.write_bytes(b"".join(lines))
        other.replace(path)


def reorder(path: Path, chance: Random) -> None:
    put(path, chance.sample(lines := lines_of(path), len(lines)), chance)


def insert_a_row(path: Path, chance: Random) -> None:
    lines = lines_of(path)
    row = json.dumps(make_row(chance, ROWS + chance.randrange(SPARE))).encode() + b"\n"
    put(path, [*lines[: (at := chance.randrange(len(lines)))], row, *lines[at:]], chance)


def remove_rows(path: Path, chance: Random) -> None:
    put(path, [line for line in lines_of(path) if chance.random() < 0.8], chance)


def edit_rows(path: Path, chance: Random) -> None:
    lines = lines_of(path)
    for number in chance.sample(range(len(lines)), 3):
        lines[number] = json.dumps(make_row(chance, ROWS + number % SPARE) | {"id": f"new {number}"}).encode() + b"\n"
    put(path, lines, chance)


def append_rows(path: Path, chance: Random) -> None:
    with path.open("ab") as file:
        file.write(json.dumps(make_row(chance, ROWS)).encode() + b"\n")


def truncate(path: Path, chance: Random) -> None:
    if size := path.stat().st_size:
        os.truncate(path, chance.randrange(size))


def delete(path: Path, chance: Random) -> None:
    path.unlink()


def move_away(path: Path, chance: Random) -> Undo:
    path.rename(other := path.with_name("elsewhere"))
    if chance.random() < 0.5:
        return None
    return lambda: None if path.exists() else (other.rename(path), None)[1]


def replace_by_a_copy(path: Path, chance: Random) -> None:
    shutil.copy(path, other := path.with_name("copy"))
    other.replace(path)


def put_a_line_in(path: Path, chance: Random) -> None:
    lines = lines_of(path)
    foreign = chance.choice([b"the end\n", b'{"name": "x"}\n', b'{"id": "row 3", "score": 1}\n', b"\0\0\0\n"])
    put(path, [*lines[: (at := chance.randrange(len(lines) + 1))], foreign, *lines[at:]], chance)


def write_twice(path: Path, chance: Random) -> None:
    put(path, lines_of(path) * 2, chance)


def tear_a_line(path: Path, chance: Random) -> None:
    lines = lines_of(path)
    if lines:
        at = chance.randrange(len(lines))
        lines[at] = lines[at][: chance.randrange(1, len(lines[at]))]
        put(path, lines, chance)


def append_a_line(path: Path, chance: Random) -> None:
    with path.open("ab") as file:
        file.write(chance.choice([b"the end\n", b"half a li", b'{"name": "x"}\n']))


def another_name(path: Path, chance: Random) -> Undo:
    path.with_name("other-name").hardlink_to(path)
    return path.with_name("other-name").unlink


def replace_the_folder(path: Path, chance: Random) -> Undo:
    folder, other = path.parent, path.parent.with_name("moved")
    folder.rename(other)
    folder.mkdir()
    shutil.copy(other / "in.jsonl", folder / "in.jsonl")

    def undo() -> None:
        shutil.rmtree(folder)
        other.rename(folder)

    def forget() -> None:
        shutil.rmtree(other)

    return undo if chance.random() < 0.5 else forget


INPUT = (reorder, insert_a_row, remove_rows, edit_rows, append_rows, truncate, delete, move_away, replace_by_a_copy)
RECORDS = (reorder, truncate, delete, move_away, replace_by_a_copy, put_a_line_in, write_twice, tear_a_line)
CHANGES = {
    "in.jsonl": INPUT,
    "out.jsonl": (*RECORDS, append_a_line, another_name, replace_the_folder),
    "out.jsonl.errors.jsonl": (*RECORDS, append_a_line),
    "out.jsonl.lock": (delete, truncate, move_away),
    "out.jsonl.run.json": (delete, truncate, move_away, put_a_line_in),
}


def disturbed(work: Work, chance: Random, name: str, change: Callable[[Path, Random], Undo]) -> Result:
    """A run in whose midst another program makes a change."""
    begun = work.start()
    time.sleep(chance.uniform(0, 0.25))
    undo = None
    with suppress(FileNotFoundError):  # too early, or too late
        undo = change(work.folder / name, chance)
    ended = begun.end()
    if undo:
        undo()
    return ended


def again(work: Work, ended: Result, kept: bytes, texts: dict[str, str]) -> None:
    """The same command must finish the job, or say what a person must decide; then all good records must be kept."""
    check_said(ended)
    if not work.input.exists():
        assert ended.code == 5
        work.input.write_bytes(kept)
        ended = work()
        check_said(ended)
    if ended.code == 2:
        before = good_records(work, texts)
        assert "--set-aside" in ended.err or "move it away" in ended.err
        if "move it away" in ended.err:
            work.manifest.unlink()
        ended = work("--set-aside")
        assert before <= good_records(work, texts)
    check_done(work, ended, texts)


def good_records(work: Work, texts: dict[str, str]) -> set[str]:
    """The texts of whole records in the output that answer rows of the input."""
    wanted = due(work, texts).values()
    found = set()
    for line in work.output.read_bytes().split(b"\n") if work.output.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "row_hash" in record and record["text"] in wanted:
            found.add(record["text"])
    return found


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a1_to_a4_whatever_other_programs_do_the_same_command_ends_with_each_row_once(tmp_path, texts, seed):
    chance = Random(seed)
    for number in range(CHANGES_PER_SEED):
        work = Work(tmp_path / f"work{number}", make_rows(chance), "--max-num-seqs", 1 + chance.randrange(3))
        kept = work.input.read_bytes()
        name = chance.choice([*CHANGES, "in.jsonl", "out.jsonl"])
        ended = disturbed(work, chance, name, chance.choice(CHANGES[name]))
        check_said(ended)
        again(work, work(), kept, texts)
        assert work().code in (0, 3)
        shutil.rmtree(work.folder)


# One change at a time, while the run stands still in the middle of its work


def stopped(work: Work, *flags: object, at: int = 6) -> Run:
    """A run that the system has stopped before one of its writes."""
    run = work.start(*flags, fault=Fault(do="SIGSTOP", at=at, calls=("write",)))
    status = Path(f"/proc/{run.pid}/stat")
    while status.read_text().rsplit(")", 1)[1].split()[0] != "T":
        time.sleep(0.001)
    return run


def continued(run: Run) -> Result:
    os.kill(run.pid, signal.SIGCONT)
    return run.end()


def long_rows(number: int = 30) -> list[dict[str, Any]]:
    """Rows of which only a few are read at a time."""
    return [{"prompt": f"prompt {i} " + "w " * 20_000, "max_tokens": 3, "ignore_eos": True} for i in range(number)]


@pytest.mark.parametrize("how", ["another order", "a row more", "a row less"])
def test_a1_an_input_that_is_rewritten_while_it_is_read_ends_the_run_and_no_row_is_answered_twice(tmp_path, how):
    work = Work(tmp_path / "work", long_rows(), "--max-num-seqs", 1)
    run = stopped(work)
    lines = lines_of(work.input)
    new = {"another order": lines[::-1], "a row more": [lines[-1][:15] + b"new " + lines[-1][15:], *lines]}
    work.input.write_bytes(b"".join(new.get(how, lines[1:])))
    ended = continued(run)
    assert ended.code == 5
    assert "the input has changed while it was read" in ended.err
    assert work.state == "failed"
    written = [record["row_hash"] for record in map(json.loads, lines_of(work.output))]
    assert len(written) == len(set(written))
    ended = work("--set-aside") if how == "a row less" else work()
    assert ended.code == 0, ended.err
    assert set(work.records) == {f"line-{number}" for number in range(1, len(lines_of(work.input)) + 1)}
    hashes = [record["row_hash"] for record in work.records.values()]
    assert len(hashes) == len(set(hashes))


def test_a1_an_input_that_is_cut_short_while_it_is_read_ends_the_run_with_5(tmp_path):
    work = Work(tmp_path / "work", long_rows(), "--max-num-seqs", 1)
    run = stopped(work)
    os.truncate(work.input, 300_000)
    ended = continued(run)
    assert ended.code == 5
    assert "the input has changed while it was read" in ended.err


GONE = {
    "deleted": delete,
    "moved": lambda path, _: path.rename(path.with_name("elsewhere")),
    "cut short": lambda path, _: os.truncate(path, 100),
    "emptied": lambda path, _: os.truncate(path, 0),
    "replaced": replace_by_a_copy,
    "longer": append_a_line,
    "its folder replaced": replace_the_folder,
}


@pytest.mark.parametrize("what", GONE)
def test_a2_answers_that_are_not_where_they_should_be_are_not_claimed(tmp_path, what):
    work = Work(tmp_path / "work", [make_row(Random(1), number) for number in range(20)])
    run = stopped(work, at=8)
    GONE[what](work.output, Random(0))
    ended = continued(run)
    assert ended.code == 1
    assert "out.jsonl" in ended.err.splitlines()[-2]
    assert "by another program while the run was at work" in ended.err
    assert "done:" not in ended.err
    assert not work.manifest.exists() or work.state == "failed"
    if work.output.parent.exists():
        assert work("--set-aside").code == 0
        assert len(work.records) == 20


def test_a2_a_link_that_is_turned_to_another_file_ends_the_run(tmp_path):
    work = Work(tmp_path / "work", [make_row(Random(1), number) for number in range(20)])
    work.output.symlink_to(tmp_path / "one.jsonl")
    run = stopped(work, at=8)
    work.output.unlink()
    work.output.symlink_to(tmp_path / "another.jsonl")
    ended = continued(run)
    assert ended.code == 1
    assert "out.jsonl was deleted or moved away by another program" in ended.err


CHANGES_BEFORE_START = {name: GONE[name] for name in ("deleted", "moved", "cut short", "emptied", "replaced", "longer")}
CHANGES_BEFORE_START["in another order"] = lambda path, _: path.write_bytes(b"".join(reversed(lines_of(path))))


@pytest.mark.parametrize("what", CHANGES_BEFORE_START)
def test_a2_an_output_that_is_changed_while_the_model_is_loaded_is_left_as_it_is(tmp_path, what):
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"".join(b'{"id": "row %d", "text": "an answer"}\n' % number for number in range(9)))
    file, kept = LineFile(path), path.stat().st_size
    time.sleep(0.02)  # the clock of a file system is coarse
    CHANGES_BEFORE_START[what](path, Random(0))
    left = path.read_bytes() if path.exists() else None
    for step in (lambda: file.start(kept), lambda: file.replace([b"mended\n"]), file.remove):
        with pytest.raises(OutputError, match="by another program"):
            step()
        assert (path.read_bytes() if path.exists() else None) == left


def test_a2_a_file_that_takes_the_place_of_an_output_while_it_is_mended_is_not_replaced(tmp_path):
    rows = [{"prompt": f"prompt {i}"} for i in range(5)]
    work = Work(tmp_path / "work", rows)
    assert work().code == 0
    work.put([{"prompt": "a new first row"}, *rows])  # all records are to be named anew
    run = stopped(work, at=4)
    assert (work.folder / ".out.jsonl.tmp").exists()
    (work.folder / "notes.txt").write_text("my notes\n")
    (work.folder / "notes.txt").replace(work.output)
    ended = continued(run)
    assert ended.code == 1
    assert "out.jsonl was replaced by another program" in ended.err
    assert work.output.read_text() == "my notes\n"


def test_a2_an_output_in_the_folder_above_that_of_a_link_is_where_it_should_be(tmp_path):
    work = Work(tmp_path / "work", [{"prompt": "x"}])
    (tmp_path / "work/real/inner").mkdir(parents=True)
    (tmp_path / "work/link").symlink_to("real/inner")
    ended = work("-o", "link/../out.jsonl")
    assert ended.code == 0, ended.err
    assert (tmp_path / "work/real/out.jsonl").exists()


def test_a2_an_error_file_is_watched_too(tmp_path):
    work = Work(tmp_path / "work", [b"no JSON", *(make_row(Random(1), number) for number in range(20))])
    run = stopped(work, at=8)
    work.errors.unlink()
    ended = continued(run)
    assert ended.code == 1
    assert "out.jsonl.errors.jsonl was deleted" in ended.err


@pytest.mark.parametrize(
    "line", [b"the end\n", b'{"id": "row 1", "te\n', b"\xff\xfe\n", b'{"a": 1}\n', b"x" * 200_000 + b"\n"]
)
def test_a3_a_line_that_is_no_record_is_set_aside_and_the_others_count(tmp_path, line):
    work = Work(tmp_path / "work", [{"id": i, "prompt": f"prompt {i}"} for i in range(6)])
    assert work().code == 0
    before, lines = work.records, lines_of(work.output)
    work.output.write_bytes(b"".join([*lines[:2], line, *lines[3:]]))
    ended = work()
    assert ended.code == 0, ended.err
    assert f"moved to {ASIDE}: 1 line of out.jsonl" in ended.err
    assert work.records == before
    assert (work.folder / ASIDE).read_bytes() == line
    assert "nothing to do" in work().err


def test_a3_an_output_that_was_written_twice_is_mended(tmp_path):
    work = Work(tmp_path / "work", [{"prompt": "the same"}, {"prompt": "the same"}, {"prompt": "another"}])
    assert work().code == 0
    before = work.records
    work.output.write_bytes(work.output.read_bytes() * 2)
    assert work().code == 0
    assert work.records == before
    assert len(lines_of(work.folder / ASIDE)) == 3


@pytest.mark.parametrize("torn", [False, True])
def test_a3_a_disk_that_is_full_while_lines_are_set_aside_harms_none_of_them(tmp_path, torn):
    work = Work(tmp_path / "work", [{"id": i, "prompt": f"prompt {i}"} for i in range(3)])
    assert work().code == 0
    lines = lines_of(work.output)
    work.output.write_bytes(b"".join(lines * 2))
    aside = work.folder / ASIDE
    if torn:
        aside.write_bytes(lines[0][:20])  # as a run leaves it that is killed there
    ended = work(fault=Fault(do="ENOSPC", at=4, calls=("write",), torn=True))
    assert ended.code == 1
    assert f"cannot write {ASIDE}" in ended.err
    assert aside.read_bytes() == (lines[0][:20] if torn else b"")
    assert work.output.read_bytes() == b"".join(lines * 2)
    assert work().code == 0
    assert lines_of(aside) == ([lines[0][:20] + b"\n"] if torn else []) + lines


@pytest.mark.parametrize("flags", [("--retry-failed",), ("--overwrite",)])
def test_a3_an_error_file_that_is_a_link_stays_one(tmp_path, flags):
    work = Work(tmp_path / "work", [{"id": "a", "prompt": "x"}, b"no JSON"], "--error-file", "link.jsonl")
    (work.folder / "link.jsonl").symlink_to(tmp_path / "errors.jsonl")
    assert work().code == 3
    first = (tmp_path / "errors.jsonl").read_bytes()
    assert work(*flags).code == 3
    assert (work.folder / "link.jsonl").is_symlink()
    assert (tmp_path / "errors.jsonl").read_bytes() == first


def test_a3_set_aside_keeps_what_belongs_to_the_job_though_its_manifest_is_gone(tmp_path):
    work = Work(tmp_path / "work", [{"id": i, "prompt": f"prompt {i}"} for i in range(6)])
    assert work().code == 0
    before = work.records
    work.manifest.unlink()
    ended = work()
    assert ended.code == 2
    assert "--set-aside" in ended.err
    ended = work("--set-aside")
    assert ended.code == 0
    assert "loading" not in ended.err
    assert work.records == before


def test_a3_set_aside_with_other_settings_moves_all_answers_and_starts_over(tmp_path):
    work = Work(tmp_path / "work", [{"id": i, "prompt": f"prompt {i}"} for i in range(6)])
    assert work().code == 0
    old = work.output.read_bytes()
    ended = work("--seed", 5)
    assert ended.code == 2
    assert f"--set-aside moves the earlier answers to {ASIDE}" in ended.err
    assert work("--seed", 5, "--set-aside").code == 0
    assert (work.folder / ASIDE).read_bytes() == old
    assert len(work.records) == 6
    assert work("--seed", 5).code == 0


def test_a3_answers_and_errors_in_each_others_files_keep_their_meaning(tmp_path):
    rows = [{"id": 1, "prompt": "w " * 50, "max_tokens": 4}, {"id": 2, "prompt": "x", "max_tokens": 4}]
    work = Work(tmp_path / "work", rows, "--max-model-len", 20)
    assert work().code == 3
    answer, error = work.output.read_bytes(), work.errors.read_bytes()
    work.output.write_bytes(error)
    work.errors.write_bytes(answer)
    ended = work("--retry-failed", "--on-too-long", "truncate-left")
    assert ended.code == 0, ended.err
    assert work.errors.read_bytes() == answer
    assert work.answers.keys() == {1}


def test_a3_set_aside_on_a_finished_job_is_in_its_manifest(tmp_path):
    work = Work(tmp_path / "work", [{"id": i, "prompt": f"prompt {i}"} for i in range(5)])
    assert work().code == 0
    work.put([{"id": i, "prompt": f"prompt {i}"} for i in range(4)])
    assert work().code == 2
    assert work("--set-aside").code == 0
    assert json.loads(work.manifest.read_bytes())["rows"]["total"] == 4


def test_a4_a_second_run_is_refused_though_the_lock_file_was_deleted(tmp_path):
    work = Work(tmp_path / "work", [{"id": i, "prompt": f"prompt {i}"} for i in range(20)])
    run = stopped(work, at=8)
    (work.folder / "out.jsonl.lock").unlink()
    ended = work()
    assert ended.code == 75
    assert "another run is at work" in ended.err
    assert continued(run).code == 0
    assert len(work.records) == 20


def test_a4_a_second_run_is_refused_under_another_name_of_the_output(tmp_path):
    work = Work(tmp_path / "work", [{"id": i, "prompt": f"prompt {i}"} for i in range(20)])
    run = stopped(work, at=8)
    (work.folder / "hard.jsonl").hardlink_to(work.output)
    shutil.copy(work.manifest, work.folder / "hard.jsonl.run.json")
    assert work("-o", "hard.jsonl").code == 75
    assert continued(run).code == 0


OTHERS = {"manifest": "out.jsonl.run.json", "lock": "busy.lock", "input": "in.jsonl", "notes": "notes.txt"}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("flag", ["-o", "--stats-file", "--error-file"])
def test_a5_files_of_other_kinds_are_never_replaced(tmp_path, kind, flag):
    work = Work(tmp_path / "work", [{"id": i, "prompt": f"prompt {i}"} for i in range(3)])
    assert work().code == 0
    (work.folder / "busy.lock").write_text('{"host": "x", "pid": 1, "started": "now"}')
    (work.folder / "notes.txt").write_text("my notes\n")
    before = work.files
    ended = work("-o", "new.jsonl", flag, OTHERS[kind], "--overwrite")
    assert ended.code == 2, ended.err
    assert OTHERS[kind] in ended.err
    assert work.files == before


LIKE_RECORDS = {
    "numbers that are none": b'{"id": 1, "score": NaN}\n{"id": 2, "score": NaN}\n',
    "one of those without an end": b'{"id": 1, "score": NaN}',
    "a key twice": b'{"id": 1, "a": 1, "a": 2}\n',
    "lines cut short": b'{"id": 1, "text": "The\n{"id": 2, "text": "A\n',
    "answers of another service": b'{"id": "batch_req_wnaDys", "custom_id": "1", "response": {}, "error": null}\n',
    "keys and ids": b'{"id": "u1", "key": "colour", "value": 3}\n',
}


@pytest.mark.parametrize("kind", LIKE_RECORDS)
def test_a5_lines_that_only_resemble_records_are_never_replaced_nor_dropped(tmp_path, kind):
    work = Work(tmp_path / "work", [{"id": i, "prompt": f"prompt {i}"} for i in range(3)])
    work.output.write_bytes(LIKE_RECORDS[kind])
    for flags in ((), ("--overwrite",)):
        assert work(*flags).code == 2
        assert work.output.read_bytes() == LIKE_RECORDS[kind]
    assert work("--set-aside").code == 0
    assert len(work.records) == 3
    assert (work.folder / ASIDE).read_bytes().rstrip(b"\n") == LIKE_RECORDS[kind].rstrip(b"\n")


@pytest.mark.parametrize("flag", ["--stats-file", "the manifest"])
def test_a5_a_pipe_is_never_replaced_by_a_file(tmp_path, flag):
    work = Work(tmp_path / "work", [{"prompt": "x"}])
    pipe = work.folder / "pipe" if flag.startswith("-") else work.manifest
    os.mkfifo(pipe)
    ended = work(*((flag, "pipe") if flag.startswith("-") else ()))
    assert ended.code == 2
    assert f"{pipe.name} exists and is not one of bmx" in ended.err
    assert pipe.is_fifo()


def test_a5_a_stats_file_that_is_a_link_stays_one(tmp_path):
    work = Work(tmp_path / "work", [{"prompt": "x"}], "--stats-file", "link.json")
    (work.folder / "link.json").symlink_to(tmp_path / "stats.json")
    assert work().code == 0
    assert (work.folder / "link.json").is_symlink()
    assert json.loads((tmp_path / "stats.json").read_bytes())["state"] == "finished"


def test_a5_a_file_where_the_manifest_should_be_is_not_replaced(tmp_path):
    work = Work(tmp_path / "work", [{"prompt": "x"}])
    work.manifest.write_text('{"my": "notes"}')
    assert work().code == 2
    assert work.manifest.read_text() == '{"my": "notes"}'


def test_a6_a_full_disk_takes_no_record_away_when_another_program_writes_too(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    file = LineFile(path)
    file.start(0)
    file.append(b"first\n")
    write = os.write

    def full(handle: int, data: bytes) -> int:
        if len(data) < 5:
            raise OSError(28, "No space left on device")
        return write(handle, data[:-4])

    with path.open("ab") as other:
        other.write(b"foreign\n")
    with monkeypatch.context() as patch:
        patch.setattr("bmx.job.line_file.os.write", full)
        with pytest.raises(OutputError, match="No space"):
            file.append(b"second line\n")
    with pytest.raises(OutputError, match="changed by another program"):
        file.close()
    assert path.read_bytes() == b"first\nforeign\n"


TOO_LONG = [{"id": "long", "prompt": "w " * 50}, {"id": "short", "prompt": "w " * 5, "max_tokens": 4}]


@pytest.mark.parametrize("remedy", [["--on-too-long", "truncate-middle"], ["--max-model-len", "100"]])
def test_a9_rows_that_failed_are_answered_once_the_settings_allow_it(tmp_path, remedy):
    work = Work(tmp_path / "work", TOO_LONG)
    limit = ["--max-model-len", 20]
    assert work(*limit).code == 3
    assert work.failures.keys() == {"long"}
    before = work.output.read_bytes()
    flags = remedy if "100" in remedy else [*limit, *remedy]
    ended = work(*flags, "--retry-failed")
    assert ended.code == 0, ended.err
    assert work.output.read_bytes().startswith(before)
    assert work.answers.keys() == {"long", "short"}


def test_a9_answers_that_were_cut_to_fit_are_not_those_of_other_limits(tmp_path):
    work = Work(tmp_path / "work", TOO_LONG, "--on-too-long", "truncate-left")
    assert work("--max-model-len", 20).code == 0
    short = work.answers["short"]
    ended = work("--max-model-len", 30)
    assert ended.code == 2
    assert "line 1" in ended.err
    assert work("--max-model-len", 30, "--set-aside").code == 0
    assert work.answers["short"] == short
    assert work.answers["long"]["truncated"]


def test_a1_rows_that_moved_from_one_share_to_another_are_not_counted_in_both(tmp_path):
    work = Work(tmp_path / "work", [{"prompt": f"prompt {i}"} for i in range(10)], "--shard", "1/2")
    assert work().code == 0
    assert len(work.records) == 5
    work.put([{"prompt": "new"}, *({"prompt": f"prompt {i}"} for i in range(10))])
    ended = work()
    assert ended.code == 2
    assert "see line 1, 3, 5, 7, 9" in ended.err
    assert work("--set-aside").code == 0
    assert set(work.records) == {f"line-{i}" for i in (1, 3, 5, 7, 9, 11)}


def test_b5_a_lock_that_is_a_link_is_not_followed(tmp_path):
    work = Work(tmp_path / "work", [{"prompt": "x"}])
    (tmp_path / "precious").write_text("")
    (work.folder / "out.jsonl.lock").symlink_to(tmp_path / "precious")
    ended = work()
    assert ended.code == 1
    assert "out.jsonl.lock is a symbolic link" in ended.err
    assert (tmp_path / "precious").read_text() == ""


# Rows that fail before a model is needed, and rows that all fail


def test_rows_of_which_none_can_be_answered_need_no_model(tmp_path):
    work = Work(tmp_path / "work", [b"bad", {"prompt": 5}, {"no": "prompt"}])
    ended = work("-m", "no-such-model")
    assert ended.code == 3, ended.err
    assert len(work.failures) == 3
    assert "done: 0 of 3 rows answered, 3 failed" in ended.err
    assert "no row that is left can be answered; " in ended.err
    assert work.state == "finished"
    assert "nothing to do" in work("-m", "no-such-model").err


def test_the_first_hundred_rows_that_fail_alike_end_the_run_before_the_model_is_loaded(tmp_path):
    work = Work(tmp_path / "work", [{"document": None, "page": i} for i in range(150)], "-m", "no-such-model")
    ended = work("--prompt-template", "{document}")
    assert ended.code == 5
    assert "the first 100 rows all fail in the same way" in ended.err
    assert "'document'" in ended.err
    assert not work.output.exists()
    assert not work.errors.exists()
    assert work("--prompt-template", "{document}", "--max-errors", 1000).code == 3
    assert len(work.failures) == 150


def test_the_first_hundred_rows_that_the_model_cannot_take_end_the_run(tmp_path):
    work = Work(tmp_path / "work", [{"prompt": "w " * (50 + i)} for i in range(150)], "--max-model-len", 20)
    ended = work()
    assert ended.code == 1
    assert "gave up: the first 100 rows all failed in the same way" in ended.err
    assert len(work.failures) == 100
    assert work("--retry-failed", "--max-errors", 1000).code == 3
    assert len(work.failures) == 150


def test_rows_that_fail_in_different_ways_or_after_an_answer_end_nothing(tmp_path):
    bad = [{"text": f"text {i}"} for i in range(150)]
    assert Work(tmp_path / "one", [{"prompt": "x"}, *bad])().code == 3
    assert Work(tmp_path / "two", [b"no JSON", *bad, {"prompt": "x"}])().code == 3


# Names, and what is left behind


@pytest.mark.parametrize("length", [230, 243, 255])
def test_a_name_without_room_for_the_files_beside_it_is_refused_before_the_model_is_loaded(tmp_path, length):
    work = Work(tmp_path / "work", [{"prompt": "x"}])
    name = "o" * length
    ended = work("-o", name, "-m", "fake" if length == 230 else "no-such-model")
    assert ended.code == (0 if length == 230 else 2), ended.err
    assert length == 230 or f"{length - 232} bytes too long" in ended.err


def test_a_killed_run_leaves_no_copy_of_standard_input(tmp_path, monkeypatch):
    work = Work(tmp_path / "work", [{"id": i, "prompt": f"prompt {i}"} for i in range(20)])
    copies = Path(tempfile.gettempdir())
    before = set(copies.glob("bmx-*"))
    started = forked.start(
        *("run", "-", "-o", "out.jsonl", "-m", "fake"),
        cwd=work.folder,
        stdin=str(work.input),
        fault=Fault(at=8, calls=("write",)),
    )
    assert started.end().code == -9
    assert set(copies.glob("bmx-*")) == before
    assert work.output.exists()


def test_a_disk_that_fills_does_not_leave_a_manifest_that_says_running(tmp_path):
    work = Work(tmp_path / "work", [{"id": i, "prompt": f"prompt {i}"} for i in range(20)])
    ended = work(fault=Fault(do="ENOSPC", at=9, calls=("write",), lasts=True))
    assert ended.code == 1
    assert work.state in ("failed", "running")
    ended = work(fault=Fault(do="ENOSPC", at=2, calls=("replace",), lasts=True))
    assert ended.code == 1
    assert work.state == "failed"
