"""A command that is run again resumes where it ended, or says why it does not; one run at a time uses an output."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
from forked import Fault, Work

from bmx.errors import LockedError
from bmx.job.locks import locked
from bmx.run_config import all_settings
from bmx.settings import DecidesAnswers

SECRETS = ("Reply as Captain Nemo would", "Translate for the consul")


def rows(number: int = 6) -> list[dict[str, Any] | bytes]:
    """The third one is bad."""
    found: list[Any] = [{"id": f"row {i}", "prompt": f"prompt {i}", "max_tokens": 8} for i in range(number)]
    found[2] = {"id": "row 2", "prompt": ""}
    return found


def good_rows(number: int = 6) -> list[dict[str, Any] | bytes]:
    return [row for row in rows(number) if row["prompt"]]


def copied(work: Work, to: Path) -> Work:
    shutil.copytree(work.folder, to)
    other = Work(to, [], *work.flags)
    shutil.copy(work.input, other.input)
    return other


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Work:
    """A job that was killed at its third row."""
    work = Work(tmp_path_factory.mktemp("killed") / "work", good_rows())
    assert work(fault=Fault(at=5, calls=("write",))).code == -9
    assert len(work.records) == 2
    return work


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Work:
    """The same job, undisturbed."""
    work = Work(tmp_path_factory.mktemp("complete") / "work", good_rows())
    assert work().code == 0
    return work


@pytest.fixture
def begun(interrupted, tmp_path) -> Work:
    return copied(interrupted, tmp_path / "begun")


@pytest.fixture
def done(complete, tmp_path) -> Work:
    return copied(complete, tmp_path / "done")


def check_refused(work: Work, *flags: object, says: str = "", code: int = 2) -> None:
    """The run must end before anything is loaded, and leave all files as they were."""
    before = without_lock(work)
    ended = work(*flags)
    assert ended.code == code, ended.err
    problem, hint = (line.split("Z ", 1)[1] for line in ended.err.splitlines())
    assert problem.startswith("error: ")
    assert hint.startswith("hint: ")
    assert says in problem
    assert without_lock(work) == before


def without_lock(work: Work) -> dict[str, bytes]:
    return {name: data for name, data in work.files.items() if not name.endswith(".lock")}


def test_o8_what_was_done_is_not_done_again(begun, complete):
    before = begun.output.read_bytes()
    ended = begun()
    assert ended.code == 0
    assert begun.output.read_bytes().startswith(before)
    assert begun.records == complete.records
    assert "done: 5 of 5 rows answered" in ended.err
    assert "(2 had their records before)" in ended.err


@pytest.mark.parametrize(("given", "code"), [(good_rows(), 0), (rows(), 3)], ids=["all well", "with failed rows"])
def test_o8_a_finished_job_has_nothing_to_do(tmp_path, given, code):
    work = Work(tmp_path / "work", given)
    assert work().code == code
    before = work.files
    ended = work()
    assert ended.code == code
    assert f"nothing to do: all rows have their records already ({len(given)})" in ended.err
    assert ("failed" in ended.err) == bool(code)
    assert "loading" not in ended.err
    assert work.files == before


def test_o8_a_finished_job_loads_no_torch(done):
    code = (
        "import sys; from bmx.cli.commands import main\n"
        "try: main()\n"
        "except SystemExit as ended: print(ended.code, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "run", "in.jsonl", "-o", "out.jsonl", "-m", "fake"]
    ended = subprocess.run(command, cwd=done.folder, capture_output=True, timeout=60, check=True, text=True)
    assert ended.stdout == "0 False\n"


def test_o7_a_row_that_was_edited_is_refused_with_its_line(done):
    changed = good_rows()
    changed[3]["prompt"] = "something else"
    done.put(changed)
    check_refused(done, says="line 4")
    changed[1]["max_tokens"] = 7
    done.put(changed)
    check_refused(done, says="line 2, 4")


def test_o7_rows_that_were_moved_or_spaced_out_are_the_same_rows(done, complete):
    lines = done.input.read_bytes().splitlines()
    done.input.write_bytes(b"\n" + b"  \n\n".join(reversed(lines)))
    assert done().code == 0
    assert done.records == complete.records


def test_o8_rows_that_were_added_are_answered(done, complete):
    done.put([*good_rows(), {"id": "new", "prompt": "news"}])
    ended = done()
    assert ended.code == 0
    assert done.records.keys() == {*complete.records, "new"}
    assert complete.records.items() <= done.records.items()
    assert "(5 had their records before)" in ended.err


def test_o7_an_input_from_which_rows_were_removed_is_refused(done):
    done.put(good_rows()[:3])
    check_refused(done, says="2 answers of rows that are not in the input")


def test_o7_another_input_is_refused(done):
    done.put([{"prompt": "x"}, {"prompt": "y"}])
    check_refused(done, says="not in the input")


MATTERS = {
    "model": ["-m", "nowhere"],
    "revision": ["--revision", "v2"],
    "dtype": ["--dtype", "float32"],
    "quantization": ["--quantization", "int8"],
    "trust_remote_code": ["--trust-remote-code"],
    "kv_policy": ["--kv-policy", "none"],
    "kv_budget": ["--kv-budget", "2k"],
    "kv_sink": ["--kv-sink", "5"],
    "kv_recent": ["--kv-recent", "33"],
    "kv_protect": ["--kv-protect", "instructions"],
    "kv_layer_budgets": ["--kv-layer-budgets", "pyramid"],
    "kv_format": ["--kv-format", "int8"],
    "kv_value_norm": ["--kv-value-norm"],
    "kv_probe": ["--kv-probe", "What is it?"],
    "kv_probe_weight": ["--kv-probe-weight", "0.25"],
    "kv_share_layers": ["--kv-share-layers", "1:0"],
    "state_format": ["--state-format", "bfloat16"],
    "kv_archive": ["--kv-archive", "int4"],
    "kv_recall": ["--kv-recall", "pages"],
    "kv_recall_pairs": ["--kv-recall-pairs", "300"],
    "kv_recall_every": ["--kv-recall-every", "2"],
    "chunk_size": ["--chunk-size", "64"],
    "max_tokens": ["--max-tokens", "99"],
    "temperature": ["--temperature", "0.5"],
    "top_p": ["--top-p", "0.5"],
    "top_k": ["--top-k", "5"],
    "min_p": ["--min-p", "0.5"],
    "repetition_penalty": ["--repetition-penalty", "1.5"],
    "stop": ["--stop", "w1"],
    "stop_token_ids": ["--stop-token-ids", "7"],
    "seed": ["--seed", "1"],
    "ignore_eos": ["--ignore-eos"],
    "stop_repetition": ["--no-stop-repetition"],
    "json_schema": ["--json-schema", '{"type": "object"}'],
    "guided_regex": ["--guided-regex", "[ab]+"],
    "guided_choice": ["--guided-choice", "yes"],
    "id_field": ["--id-field", "name"],
    "jinja": ["--jinja", "--prompt-template", "{{ prompt }}"],
    "system_prompt": ["--system-prompt", "Be brief"],
    "prompt_template": ["--prompt-template", "{prompt}!"],
    "chat_template": ["--no-chat-template"],
    "parse_special_tokens": ["--parse-special-tokens"],
    "chat_template_kwargs": ["--chat-template-kwargs", '{"enable_thinking": false}'],
    "shard": ["--shard", "1/2"],
}


@pytest.mark.parametrize("name", MATTERS)
def test_o7_a_setting_that_decides_answers_is_refused_by_its_name_when_it_changes(begun, name):
    check_refused(begun, *MATTERS[name], says=f" {name} ")


def test_o7_all_settings_that_decide_answers_are_tried():
    others = (DecidesAnswers.NEVER, DecidesAnswers.IF_CUT)
    assert set(MATTERS) == {s.name for s in all_settings() if s.decides_answers not in others}


def test_o7_all_settings_that_have_changed_are_named(begun):
    check_refused(begun, "--seed", 3, "--kv-budget", 99, says="kv_budget was 2048, is 99, seed was 0, is 3")


MATTERS_NOT = [
    ["--progress", "none"],
    ["-q"],
    ["-v"],
    ["--log-format", "json"],
    ["--max-num-seqs", "2"],
    ["--max-num-batched-tokens", "600"],
    ["--memory-limit", "2G"],
    ["--kv-cache-memory", "100M"],
    ["--gpu-memory-utilization", "0.5"],
    ["--device", "cpu"],
    ["--row-timeout", "1h"],
    ["--limit", "99"],
    ["--max-errors", "0"],
    ["--lock-wait", "5s"],
    ["--shutdown-timeout", "0"],
    ["--stats-file", "stats.json"],
    ["--retry-failed"],
    ["--chunk-size", "512"],
    ["--served-model-name", "gpt-x"],
    ["--max-line-bytes", "1M"],
    ["--max-model-len", "4k"],
    ["--on-too-long", "skip"],
]


@pytest.mark.parametrize("flags", MATTERS_NOT, ids=" ".join)
def test_o7_a_setting_that_decides_no_answer_may_change(begun, complete, flags):
    before = begun.output.read_bytes()
    ended = begun(*flags)
    assert ended.code == 0, ended.err
    assert begun.output.read_bytes().startswith(before)
    assert begun.records == complete.records


def test_s1_prompts_of_settings_are_in_no_record_of_the_run(tmp_path):
    flags = ["--system-prompt", SECRETS[0], "--prompt-template", SECRETS[1] + " {prompt}"]
    work = Work(tmp_path / "work", good_rows(), *flags)
    ended = work("--stats-file", "stats.json", "-v")
    assert ended.code == 0
    texts = [ended.err, *(data.decode() for data in work.files.values())]
    assert not [text for text in texts if any(secret in text for secret in SECRETS)]
    assert work().code == 0
    for name in ("system_prompt", "prompt_template"):
        check_refused(work, f"--{name.replace('_', '-')}", "{prompt}", says=f"{name} has changed")


def test_o7_overwrite_begins_anew(done):
    ended = done("--overwrite", "--seed", 5, "--max-tokens", 3)
    assert ended.code == 0
    assert "had their records" not in ended.err
    assert len(done.records) == 5
    assert json.loads(done.manifest.read_bytes())["fingerprint"]["seed"] == 5


def test_o7_overwrite_takes_old_errors_away_too(tmp_path):
    work = Work(tmp_path / "work", rows())
    assert work().code == 3
    work.put(good_rows())
    assert work("--overwrite").code == 0
    assert not work.errors.exists()


def test_o7_no_resume_refuses_what_exists_and_nothing_else(done, tmp_path):
    check_refused(done, "--no-resume", says="out.jsonl exists")
    fresh = Work(tmp_path / "fresh", good_rows())
    fresh.output.touch()
    assert fresh("--no-resume").code == 0


def test_o9_failed_rows_are_answered_again_when_asked_to(tmp_path):
    fixed = [*good_rows()[:2], {"id": "row 2", "prompt": "mended"}, *good_rows()[2:]]
    work, expected = Work(tmp_path / "work", rows()), Work(tmp_path / "expected", fixed)
    assert work().code == 3
    answers = work.output.read_bytes()
    assert work("--retry-failed").code == 3
    assert work.failures.keys() == {"row 2"}
    work.put(fixed)
    ended = work()
    assert ended.code == expected().code == 0, ended.err
    assert "dropped from out.jsonl.errors.jsonl: 1 error" in ended.err
    assert work.records == expected.records
    assert work.output.read_bytes().startswith(answers)
    assert not work.errors.exists()
    assert work().code == 0


def test_o9_a_line_that_was_no_json_is_answered_once_it_is(tmp_path):
    work = Work(tmp_path / "work", [b'{"id": "a", "prompt": "x"', {"id": "b", "prompt": "y"}])
    assert work().code == 3
    assert work.failures.keys() == {"line-1"}
    work.put([{"id": "a", "prompt": "x"}, {"id": "b", "prompt": "y"}])
    assert work("--retry-failed").code == 0
    assert work.records.keys() == {"a", "b"}


def test_o9_a_run_that_gave_up_over_errors_goes_on_behind_them(tmp_path):
    bad = [{"id": f"bad {i}", "prompt": ""} for i in range(4)]
    work = Work(tmp_path / "work", [*bad, *good_rows()], "--max-errors", 1)
    ended = work()
    assert ended.code == 1
    assert "more than --max-errors" in ended.err
    assert (work.state, len(work.failures)) == ("failed", 2)
    ended = work("--max-errors", 9)
    assert ended.code == 3
    assert (work.state, len(work.failures), len(work.answers)) == ("finished", 4, 5)


def test_o8_the_first_rows_alone_and_then_all(tmp_path, complete):
    work = Work(tmp_path / "work", good_rows())
    assert work("--limit", 3).code == 0
    assert len(work.records) == 3
    assert work("--limit", 3).code == 0
    assert work("--limit", 4).code == 0
    assert len(work.records) == 4
    assert work().code == 0
    assert work.records == complete.records
    assert work("--limit", 2).code == 0
    assert work.records == complete.records


def test_o17_failures_beyond_the_first_rows_are_not_theirs(tmp_path):
    work = Work(tmp_path / "work", [*good_rows(), {"id": "bad", "prompt": ""}])
    assert work().code == 3
    ended = work("--limit", 3)
    assert ended.code == 0, ended.err
    assert "failed" not in ended.err


BROKEN = {
    "missing": None,
    "empty": b"",
    "cut off": b'{"format": 2, "state": "run',
    "no object": b"[]",
    "of another version": b'{"format": 999, "fingerprint": {}}',
    "without a fingerprint": b'{"format": 2, "state": "finished"}',
    "bytes": bytes(range(256)),
}


@pytest.mark.parametrize("what", BROKEN)
def test_o7_an_output_whose_manifest_cannot_be_read_is_refused(begun, what):
    begun.manifest.unlink()
    data = BROKEN[what]
    if data is not None:
        begun.manifest.write_bytes(data)
    check_refused(begun, says="out.jsonl.run.json")


def test_o8_a_manifest_without_rows_hinders_nothing(begun, complete):
    begun.output.write_bytes(b"")
    assert begun("--seed", 3).code == 0
    assert begun("--overwrite").code == 0
    assert begun.records == complete.records


OTHERS = {
    "text": b"Dear diary,\n",
    "JSON": b'{"question": 1}\n{"question": 2}\n',
    "JSON with ids": b'{"id": "row 0", "score": 1}\n{"id": "row 1", "score": 2}\n',
    "bytes": bytes(range(256)) * 20,
}


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.errors.jsonl"])
def test_o7_a_file_of_another_program_is_refused(tmp_path, what, name):
    work = Work(tmp_path / "work", good_rows())
    (work.folder / name).write_bytes(OTHERS[what])
    check_refused(work, says="out.jsonl")


@pytest.mark.parametrize("flag", ["-q", "--retry-failed"])
@pytest.mark.parametrize("what", OTHERS)
def test_o7_an_error_file_that_another_program_has_made_meanwhile_is_refused(tmp_path, what, flag):
    work = Work(tmp_path / "work", good_rows(), "--error-file", "other.jsonl")
    assert work(fault=Fault(at=5, calls=("write",))).code == -9
    (work.folder / "other.jsonl").write_bytes(OTHERS[what])
    check_refused(work, flag, says="other.jsonl")


@pytest.mark.parametrize("flag", ["--error-file", "--stats-file"])
@pytest.mark.parametrize("name", ["out.jsonl.run.json", "out.jsonl.lock"])
def test_o12_the_manifest_and_the_lock_are_places_of_their_own(tmp_path, flag, name):
    work = Work(tmp_path / "work", rows())
    check_refused(work, flag, name, says=name)


def test_o7_an_error_file_of_another_program_beside_standard_output_is_refused(tmp_path):
    work = Work(tmp_path / "work", rows())
    (work.folder / "other.jsonl").write_bytes(OTHERS["text"])
    check_refused(work, "-o", "-", "--error-file", "other.jsonl", says="other.jsonl")


def test_o7_an_input_that_is_the_default_error_file_or_output_is_refused(tmp_path):
    work = Work(tmp_path / "work", good_rows())
    for flags in (["-o", "in.jsonl"], ["--error-file", "in.jsonl"], ["--stats-file", "in.jsonl"]):
        check_refused(work, *flags, says="in.jsonl is also an input")
    check_refused(work, "--error-file", "out.jsonl", says="also the output")
    assert len(work.input.read_bytes().splitlines()) == 5


def lock(work: Work) -> Path:
    return work.folder / "out.jsonl.lock"


class Busy:
    """A run that has its lock and waits for its input, a pipe, while the body runs."""

    def __init__(self, work: Work) -> None:
        self.work, self.pipe = work, work.folder.with_name("pipe")
        os.mkfifo(self.pipe)
        self.run = forked.start("run", "../pipe", "-o", "out.jsonl", "-m", "fake", cwd=work.folder)

    def __enter__(self) -> forked.Run:
        self.writer = self.pipe.open("wb")  # until the run opens it, and it does so under the lock
        return self.run

    def __exit__(self, *_: object) -> None:
        self.writer.write(self.work.input.read_bytes())
        self.writer.close()


def test_o11_a_second_run_on_the_same_output_ends_at_once_and_names_the_first(tmp_path):
    work = Work(tmp_path / "work", good_rows())
    with Busy(work) as first:
        for flags in ([], ["--overwrite"], ["--lock-wait", "0.15"], ["--retry-failed"]):
            ended = work(*flags)
            assert ended.code == 75
            assert f"process {first.pid} on {socket.gethostname()}" in ended.err
            assert "out.jsonl.lock" in ended.err
            assert "hint: --lock-wait" in ended.err
        assert work("--dry-run").code == 0
        assert work("-o", "another.jsonl").code == 0
    assert first.end().code == 0
    assert not lock(work).exists()
    assert len(work.records) == 5


def test_o11_a_second_run_waits_if_it_is_told_to(tmp_path):
    work = Work(tmp_path / "work", good_rows())
    with Busy(work) as first:
        second = work.start("--lock-wait", "1m")
    assert first.end().code == 0
    ended = second.end()
    assert ended.code == 0
    assert "nothing to do: all rows have their records already (5)" in ended.err
    assert len(work.records) == 5
    assert not lock(work).exists()


def test_o11_a_waiting_run_can_be_stopped(tmp_path):
    work = Work(tmp_path / "work", good_rows())
    with Busy(work) as first:
        ended = work("--lock-wait", "1h", fault=Fault(do="SIGTERM", at=2, calls=("open",)))
        assert ended.code == 143
        assert work("--lock-wait", "0").code == 75
    assert first.end().code == 0


@pytest.mark.parametrize("left", [b"", b'{"host": "else', b'{"host": "elsewhere", "pid": 1, "started": "2020"}'])
def test_o11_the_lock_file_of_a_dead_run_is_no_obstacle(begun, complete, left):
    assert lock(begun).exists()
    lock(begun).write_bytes(left)
    assert begun().code == 0
    assert begun.records == complete.records
    assert not lock(begun).exists()


def test_o11_a_lock_file_that_was_replaced_while_it_was_opened_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    path, flock, replaced = tmp_path / "lock", fcntl.flock, []

    def late(handle: int, how: int) -> None:
        if not replaced:
            path.unlink()
            path.touch()
            replaced.append(path)
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(path, 0), pytest.raises(LockedError), locked(path, 0):
        raise AssertionError
    assert replaced
    assert not path.exists()


@pytest.mark.parametrize("patience", ["0", "1m"])
def test_o11_runs_at_the_same_time_never_give_a_row_twice(tmp_path, complete, patience):
    work = Work(tmp_path / "work", good_rows(), "--lock-wait", patience)
    for _ in range(6):
        codes = [run.end().code for run in [work.start() for _ in range(3)]]
        assert set(codes) <= ({0} if patience == "1m" else {0, 75})
        assert 0 in codes
        assert work.records == complete.records
        assert sorted(work.files) == ["out.jsonl", "out.jsonl.run.json"]
        work.clear()


def test_o11_runs_killed_and_begun_at_the_same_time_never_give_a_row_twice(tmp_path, complete):
    work = Work(tmp_path / "work", good_rows(), "--lock-wait", "1m")
    for at in range(1, 9):
        killed = work.start(fault=Fault(at=at, calls=("write",), torn=True))
        others = [work.start() for _ in range(2)]
        assert killed.end().code in (-9, 0)
        assert [run.end().code for run in others] == [0, 0]
        assert work.records == complete.records
        work.clear()


def test_o11_an_output_is_locked_under_all_its_names(tmp_path):
    work = Work(tmp_path / "work", good_rows())
    (work.folder / "link.jsonl").symlink_to("out.jsonl")
    with Busy(work) as first:
        code = work("-o", "link.jsonl").code
    assert first.end().code == 0
    assert code == 75


def test_o10_and_i19_the_same_prompt_under_several_ids_is_answered_for_each(tmp_path):
    work = Work(tmp_path / "work", [{"id": name, "prompt": "again"} for name in ("a", "b", 3, "4")])
    assert work(fault=Fault(at=5, calls=("write",))).code == -9
    assert work().code == 0
    assert set(work.records) == {"a", "b", 3, "4"}
    assert len({record["text"] for record in work.records.values()}) == 1


def test_o10_an_empty_answer_is_an_answer(tmp_path):
    """Some of so many end at their first token."""
    work = Work(tmp_path / "work", [{"id": i, "prompt": f"prompt {i}"} for i in range(30)])
    assert work().code == 0
    assert "" in [record["text"] for record in work.answers.values()]
    assert "nothing to do" in work().err


def test_o12_a_folder_that_is_missing_is_refused_before_anything_is_loaded(tmp_path):
    check_refused(Work(tmp_path / "work", rows()), "-o", "no/out.jsonl", says="the folder no does not exist")


def test_o12_an_output_that_is_a_folder_is_refused_before_anything_is_loaded(tmp_path):
    work = Work(tmp_path / "work", rows())
    (work.folder / "folder").mkdir()
    for flag, name in (("-o", "output"), ("--error-file", "error file"), ("--stats-file", "stats file")):
        check_refused(work, flag, "folder", says=f"the {name} folder is a folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_o12_a_folder_that_is_read_only_is_refused_before_anything_is_loaded(tmp_path):
    work = Work(tmp_path / "work", rows())
    (work.folder / "folder").mkdir(mode=0o555)
    check_refused(work, "-o", "folder/out.jsonl", says="permission denied", code=1)


def test_o12_a_link_to_another_place_is_followed_and_stays(tmp_path, complete):
    work = Work(tmp_path / "work", good_rows())
    elsewhere = tmp_path / "elsewhere.jsonl"
    work.output.symlink_to(elsewhere)
    assert work(fault=Fault(at=5, calls=("write",))).code == -9
    assert work().code == 0
    assert work.output.is_symlink()
    assert work.records == complete.records
    assert elsewhere.read_bytes() == work.output.read_bytes()


def test_o12_a_link_into_a_missing_folder_is_refused_before_anything_is_loaded(tmp_path):
    work = Work(tmp_path / "work", good_rows())
    work.output.symlink_to(tmp_path / "missing" / "out.jsonl")
    check_refused(work, says="missing does not exist")


def test_o8_the_manifest_says_what_became_of_the_run(tmp_path):
    work = Work(tmp_path / "work", [*good_rows(), {"id": "bad", "prompt": ""}], "--max-num-seqs", 1)
    at = {"at": 4, "calls": ("write",)}
    assert work(fault=Fault(**at)).code == -9
    assert work.state == "running"
    assert work(fault=Fault(do="SIGINT", **at)).code == 130
    assert work.state == "interrupted"
    assert work(fault=Fault(do="ENOSPC", **at)).code == 1
    assert work.state == "failed"
    assert work().code == 3
    assert work.state == "finished"
    record = json.loads(work.manifest.read_bytes())
    assert record["rows"]["total"] == 6
    assert record["errors"] == {"invalid_request": 1}


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_s3_files_are_as_open_as_the_umask_says(bmx, tmp_path, mask, mode):
    work = Work(tmp_path, rows())
    before = os.umask(mask)
    try:
        ended = bmx("run", "in.jsonl", "-o", "out.jsonl", "-m", "fake", "--stats-file", "stats.json")
    finally:
        os.umask(before)
    assert ended.code == 3
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir() if path != work.input}
    names = ("out.jsonl", "out.jsonl.errors.jsonl", "out.jsonl.run.json", "stats.json")
    assert modes == dict.fromkeys(names, mode)


def test_o7_a_model_whose_weights_have_changed_is_refused(bmx, tmp_path, model):
    folder = shutil.copytree(model, tmp_path / "model")
    work = Work(tmp_path, [{"id": i, "prompt": f"w{i + 5} w9", "max_tokens": 3} for i in range(4)])
    given = ("run", "in.jsonl", "-o", "out.jsonl", "-m", folder)
    assert bmx(*given, "--limit", 2).code == 0
    before = work.output.read_bytes()
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    ended = bmx(*given)
    assert ended.code == 2
    assert "model_files has changed" in ended.complaint[0]
    assert work.output.read_bytes() == before
    weights.write_bytes(data)
    assert bmx(*given).code == 0
    assert len(work.records) == 4
    weights.unlink()
    assert bmx(*given).code == 2


def test_o8_a_finished_job_needs_no_model(bmx, tmp_path, model):
    """Not even one that could be loaded."""
    work = Work(tmp_path, [{"prompt": "w5 w6", "max_tokens": 2}])
    given = ("run", "in.jsonl", "-o", "out.jsonl", "-m", model)
    assert bmx(*given).code == 0
    ended = bmx(*given)
    assert (ended.code, ended.log) == (0, ["nothing to do: all rows have their records already (1)"])
    assert len(work.records) == 1


def test_o16_an_output_in_order_of_completion_is_not_gone_on_with_in_that_of_the_input(tmp_path):
    work = Work(tmp_path / "work", good_rows())
    assert work("--limit", 2).code == 0
    check_refused(work, "--order", "input", says="order was")
    assert work("--order", "completion").code == 0


def test_o7_errors_in_a_file_of_another_name_are_not_forgotten(tmp_path):
    work = Work(tmp_path / "work", [*good_rows(), {"id": "bad", "prompt": ""}])
    assert work().code == 3
    check_refused(work, "--error-file", "other.jsonl", says="error_file was null")


def test_o11_two_jobs_cannot_share_an_error_file(tmp_path):
    one = Work(tmp_path / "one", [{"id": i, "prompt": ""} for i in range(5)], "--error-file", tmp_path / "errors.jsonl")
    two = Work(tmp_path / "two", [{"id": i, "prompt": ""} for i in range(5)], "--error-file", tmp_path / "errors.jsonl")
    with locked(tmp_path / "errors.jsonl.lock", 0):
        assert one().code == 75
    assert one().code == 3
    before = (tmp_path / "errors.jsonl").read_bytes()
    assert two().code == 2
    assert (tmp_path / "errors.jsonl").read_bytes() == before


def test_o7_overwrite_replaces_errors_and_nothing_else(tmp_path):
    other = Work(tmp_path / "other", good_rows())
    assert other().code == 0
    before = other.output.read_bytes()
    work = Work(tmp_path / "work", good_rows(), "--error-file", other.output)
    assert work("--overwrite").code == 2
    assert other.output.read_bytes() == before
