"""Bad inputs, end to end: whatever a file holds, each of its rows is answered or is an error, and none is lost."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zstandard
from conftest import Ended
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bmx.engine import prompt_lengths as lengths
from bmx.engine.fake import FakeTokenizer
from bmx.errors import BmxError, InputFileError, RowError
from bmx.job.input_rows import InputRow
from bmx.job.job import run as run_job
from bmx.job.result_writer import ResultWriter
from bmx.job.row_checks import NOT_SUPPORTED
from bmx.model.prompt_encoder import PromptEncoder
from bmx.prompt_config import PromptConfig
from bmx.request import Request, Result
from bmx.run_config import RunConfig, given_settings
from bmx.shutdown import Stop
from bmx.stats import Stats
from bmx.terminal.display import Display

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
IN, OUT = Path("in.jsonl"), Path("in.out.jsonl")
ERRORS = Path("in.out.jsonl.errors.jsonl")


@pytest.fixture
def run(bmx):
    """``bmx run`` with the fake model."""

    def call(*args: Any, stdin: bytes = b"") -> Ended:
        return bmx("run", *args, "-m", "fake", stdin=stdin)

    return call


def raw(*lines: Any) -> bytes:
    """Lines of a file: bytes and text as they are, anything else as JSON."""
    return b"".join(
        (one if isinstance(one, bytes) else (one if isinstance(one, str) else json.dumps(one)).encode()) + b"\n"
        for one in lines
    )


def write(*lines: Any, to: Path = IN) -> Path:
    """An input file in the current folder."""
    to.write_bytes(raw(*lines))
    return to


def row(name: Any, prompt: Any = "w1 w2", **more: Any) -> dict[str, Any]:
    return {"id": name, "prompt": prompt, "max_tokens": 3, **more}


def openai(name: str, body: Any, **envelope: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": COMPLETIONS, "body": body} | envelope


def in_order(path: Path) -> list[dict[str, Any]]:
    """The records of a file, of which every line must be whole and strict JSON."""
    if not path.exists():
        return []
    *lines, rest = path.read_bytes().split(b"\n")
    assert rest == b""
    return [json.loads(line.decode(), parse_constant=pytest.fail) for line in lines]


def name_of(record: dict[str, Any]) -> Any:
    return record["custom_id"] if "custom_id" in record else record["id"]


def by_name(path: Path) -> dict[Any, dict[str, Any]]:
    """The records of a file by the names of their rows, of which none may be there twice."""
    records = in_order(path)
    found = {name_of(record): record for record in records}
    assert len(found) == len(records)
    return found


def answers(path: Path = OUT) -> dict[Any, dict[str, Any]]:
    """The answers by the names of their rows."""
    found = by_name(path)
    assert [name for name, record in found.items() if record.get("error")] == []
    return found


def texts(path: Path = OUT) -> dict[Any, str]:
    return {name: record["text"] for name, record in answers(path).items()}


def failures(path: Path = ERRORS) -> dict[Any, str]:
    """The codes of the failed rows by their names."""
    return {name: record["error"]["code"] for name, record in by_name(path).items()}


def message(name: Any, path: Path = ERRORS) -> str:
    return by_name(path)[name]["error"]["message"]


def folder() -> dict[str, bytes | None]:
    """What the current folder holds."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


def words(count: int, first: int = 0) -> str:
    return " ".join(f"w{number}" for number in range(first, first + count))


def fails_alone(ended: Ended, name: Any, code: str) -> str:
    """The message of the only failed row, beside which ``before`` and ``after`` must have answers."""
    assert ended.code == 3
    assert set(answers()) == {"before", "after"}
    assert failures() == {name: code}
    return message(name)


def refused(ended: Ended, before: dict[str, bytes | None], code: int = 5) -> str:
    """The complaint of a run that must have changed nothing."""
    assert ended.code == code
    assert folder() == before
    assert ended.out == ""
    return " ".join(line for line in ended.log if line.startswith(("error: ", "hint: ")))


# I1 to I7: files and lines


@pytest.mark.parametrize("kind", ["missing", "folder", "dangling", "below-a-file"])
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_i01_an_input_that_cannot_be_read_is_one_line_and_nothing_is_written(run, kind, suffix):
    path = Path(f"{kind}.jsonl{suffix}")
    if kind == "folder":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "below-a-file":
        write(row("a"), to=Path("file"))
        path = Path("file") / path
    before = folder()
    assert str(path) in refused(run(path, "-o", "out.jsonl"), before)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_i01_an_input_without_permission_is_refused(run):
    write(row("a")).chmod(0)
    assert run(IN).code == 5
    assert set(os.listdir()) == {"in.jsonl"}


@pytest.mark.parametrize(
    ("source", "output"),
    [
        pytest.param("x" * 300, "out.jsonl"),
        ("in.jsonl", "x" * 300),
        ("in.jsonl", "x" * 250),
        ("loop.jsonl", "out.jsonl"),
        ("in.jsonl", "loop.jsonl"),
    ],
    ids=["long-input", "long-output", "long-error-file", "loop-input", "loop-output"],
)
def test_i01_a_path_that_the_system_refuses_is_an_error_and_no_traceback(run, source, output):
    write(row("a"))
    Path("loop.jsonl").symlink_to("loop.jsonl")
    before = folder()
    ended = run(source, "-o", output)
    assert refused(ended, before, ended.code)
    assert ended.code in (1, 2, 5)


@pytest.mark.parametrize("lines", [(), ("",), ("", "   ", "\t", "\r"), ("\ufeff",)])
def test_i02_an_input_without_rows_is_answered_with_an_empty_output(run, lines):
    ended = run(write(*lines))
    assert ended.code == 0
    assert ended.log == ["the input has no rows"]
    assert OUT.read_bytes() == b""
    assert not ERRORS.exists()
    manifest = json.loads(Path("in.out.jsonl.run.json").read_bytes())
    assert (manifest["state"], manifest["rows"]["total"]) == ("finished", 0)


def test_i03_blank_lines_are_no_rows_but_count_as_lines(run):
    line = {"prompt": "w1"}
    ended = run(write("", line, "  \t", "\r", line, "bad", "", ""))
    assert ended.code == 3
    assert set(answers()) == {"line-2", "line-5"}
    assert failures() == {"line-6": "invalid_json"}
    assert "line 6" in message("line-6")


def test_i04_a_last_line_without_newline_is_answered(run):
    IN.write_bytes(raw(row("a"), row("b")).rstrip(b"\n"))
    assert run(IN).code == 0
    assert set(answers()) == {"a", "b"}


def test_i05_a_torn_last_line_fails_alone_and_says_that_the_file_ends_there(run):
    IN.write_bytes(raw(row("before"), row("after")) + b'{"id": "torn", "pro')
    said = fails_alone(run(IN), "line-3", "invalid_json")
    assert "line 3" in said
    assert "still being written" in said


@pytest.mark.parametrize("bad", ["nonsense", '{"prompt": "torn', '{"prompt": "x"} {}', "{'prompt': 'x'}", '{"a": 1,}'])
def test_i06_a_line_that_is_no_json_fails_alone_and_says_where(run, bad):
    said = fails_alone(run(write(row("before"), bad, row("after"))), "line-2", "invalid_json")
    assert said.startswith("line 2: ")
    assert "(char " in said
    assert "still being written" not in said


@pytest.mark.parametrize("bad", ["[1]", '"x"', "null", "5", "true"])
def test_i07_json_that_is_no_object_fails_alone(run, bad):
    said = fails_alone(run(write(row("before"), bad, row("after"))), "line-2", "invalid_json")
    assert said == "line 2 is not a JSON object"


# I8 to I15: what a line says


@pytest.mark.parametrize(
    "bad",
    [
        {"id": "bad"},
        row("bad", None),
        row("bad", 5),
        row("bad", ["w1"]),
        {"id": "bad", "messages": []},
        {"id": "bad", "messages": "w1"},
        {"id": "bad", "messages": [{"role": "user"}]},
        {"id": "bad", "messages": [{"role": "user", "content": None}]},
        {"id": "bad", "messages": [{"role": "user", "content": ""}]},
        {"id": "bad", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        openai("bad", None),
        openai("bad", []),
        openai("bad", {}),
        openai("bad", {"messages": [{"role": "user", "content": None}]}, url=CHAT),
        openai("bad", {"prompt": ["w1"]}),
    ],
    ids=json.dumps,
)
def test_i08_a_row_without_text_fails_alone(run, bad):
    assert fails_alone(run(write(row("before"), bad, row("after"))), "bad", "invalid_request")


def test_i08_where_no_row_can_be_answered_each_is_an_error(run):
    ended = run(write({"id": "a"}, {"id": "b", "messages": []}))
    assert ended.code == 3
    assert in_order(OUT) == []
    assert failures() == {"a": "invalid_request", "b": "invalid_request"}


def test_i09_prompt_and_messages_together_are_an_error(run):
    bad = row("bad", messages=[{"role": "user", "content": "w1"}])
    assert "not both" in fails_alone(run(write(row("before"), bad, row("after"))), "bad", "invalid_request")


@pytest.mark.parametrize("name", ["n", "logprobs", "max_new_tokens", "temprature", "top-k"])
def test_i09_a_sampling_field_that_would_be_ignored_is_an_error_that_names_it(run, name):
    said = fails_alone(run(write(row("before"), row("bad", **{name: 2}), row("after"))), "bad", "invalid_request")
    assert name in said


def test_i09_other_fields_are_data(run):
    assert run(write(row("a", label=3, meta={"source": [None]}, text="more"))).code == 0
    assert set(answers()) == {"a"}


@pytest.mark.parametrize("bad", [b'{"prompt": "\xff"}', b'{"prompt": "caf\xe9"}', b'{"prompt": "\xed\xa0\x80"}'])
def test_i10_a_byte_that_is_no_utf_8_fails_its_row_alone(run, bad):
    assert "line 2" in fails_alone(run(write(row("before"), bad, row("after"))), "line-2", "invalid_json")


def test_i11_a_byte_order_mark_and_windows_line_ends_are_accepted(run):
    IN.write_bytes(b"\xef\xbb\xbf" + raw(row("a"), row("b")).replace(b"\n", b"\r\n"))
    assert run(IN).code == 0
    assert set(answers()) == {"a", "b"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_i11_utf_16_is_refused_with_a_remedy(run, encoding):
    IN.write_bytes(raw(row("a")).decode().encode(encoding))
    said = refused(run(IN), folder())
    assert "in.jsonl is a file in UTF-16" in said
    assert "iconv" in said


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c"])
def test_i12_line_separators_inside_a_string_stay_in_one_record(run, mark):
    name, escaped = f"a{mark}b", json.dumps(mark)[1:-1]
    lines = [f'{{"id": "{name}", "prompt": "w1{mark}w2"}}', f'{{"id": "c{escaped}d", "prompt": "w1{escaped}w2"}}']
    if mark < " ":  # raw control characters are no JSON
        lines[0] = json.dumps(row(name))
    assert run(write(*lines)).code == 0
    assert set(answers()) == {name, f"c{mark}d"}
    assert OUT.read_bytes().count(b"\n") == 2


def test_i12_a_lone_carriage_return_does_not_end_a_line(run):
    IN.write_bytes(b'{"id": "a",\r"prompt": "w1"}\n{"id": "b\\rc", "prompt": "w1"}\n')
    assert run(IN).code == 0
    assert set(answers()) == {"a", "b\rc"}


def test_i13_a_raw_nul_is_an_error_and_an_escaped_one_comes_out_again(run):
    bad = b'{"id": "raw", "prompt": "w1 \0 w2"}'
    assert run(write(bad, row("a\0b", "w1 \0 w2"))).code == 3
    assert failures() == {"line-1": "invalid_json"}
    assert set(answers()) == {"a\0b"}


@pytest.mark.parametrize(
    "bad", [r'{"prompt": "\ud800"}', r'{"id": "\udfff", "prompt": "x"}', r'{"prompt": "x", "\ud800": 1}']
)
def test_i14_half_a_surrogate_pair_fails_its_row_alone(run, bad):
    said = fails_alone(run(write(row("before"), bad, row("after"))), "line-2", "invalid_json")
    assert "surrogate" in said


def test_i14_a_whole_surrogate_pair_is_a_character(run):
    assert run(write(r'{"id": "\ud83d\ude00", "prompt": "\ud83d\ude00"}')).code == 0
    assert set(answers()) == {"😀"}


@pytest.mark.parametrize(
    "bad",
    [
        '{"prompt": "x", "score": NaN}',
        '{"prompt": "x", "score": Infinity}',
        '{"prompt": "x", "score": -Infinity}',
        '{"prompt": "x", "prompt": "y"}',
        '{"prompt": "x", "more": {"a": 1, "a": 2}}',
        '{"prompt": "x", "number": ' + "1" * 5000 + "}",
        '{"prompt": "x", "deep": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"a":' * 100_000,
    ],
    ids=lambda bad: bad[:40],
)
def test_i15_json_that_readers_do_not_agree_on_fails_alone(run, bad):
    assert "line 2" in fails_alone(run(write(row("before"), bad, row("after"))), "line-2", "invalid_json")


def test_i15_what_is_nested_deep_in_a_message_fails_alone_at_the_most(run, monkeypatch):
    control = {1: SimpleNamespace(content="<|end|>", special=True)}  # documents are searched for its spelling
    monkeypatch.setattr(FakeTokenizer, "added_tokens_decoder", control, raising=False)
    nested = '{"id": "deep", "messages": [{"role": "user", "content": "w1", "more": ' + "[" * 900 + "]" * 900 + "}]}"
    assert run(write(row("before"), nested, row("after"))).code in (0, 3)
    assert set(answers()) | set(failures()) == {"before", "deep", "after"}


# I16 to I19: lines and ids


def test_i16_a_line_that_is_too_long_fails_alone(run):
    ended = run(write(row("before"), row("huge", "w " * 2_000_000), row("after")), "--max-line-bytes", "1k")
    assert "--max-line-bytes" in fails_alone(ended, "line-2", "invalid_request")


def test_i16_the_longest_line_can_be_set(run):
    write(row("a", words(100)))
    size = IN.stat().st_size - 1
    assert run(IN, "--max-line-bytes", size).code == 0
    assert run(IN, "--max-line-bytes", size - 1, "--overwrite").code == 3


def test_i16_a_line_that_was_too_long_is_the_same_row_when_more_is_allowed(run):
    write(row("long", words(500)), row("short"))
    assert run(IN, "--max-line-bytes", 1000).code == 3
    assert failures() == {"line-1": "invalid_request"}
    assert run(IN, "--max-line-bytes", 10_000, "--retry-failed").code == 0
    assert set(answers()) == {"long", "short"}


def test_i16_a_prompt_that_cannot_fit_is_not_made_tokens():
    class Unread(FakeTokenizer):
        def get_vocab(self):
            return {"w1": 1, "w1000": 2}

        def __call__(self, text, **_):
            raise AssertionError("read")

    measurer = lengths.PromptMeasurer(PromptEncoder(Unread(), PromptConfig()), policy=None, max_length=1000)
    with pytest.raises(RowError) as refused:
        measurer.read(Request(id=1, prompt="w1 " * 400_000))
    assert refused.value.code == "context_length_exceeded"


def test_i16_the_words_of_a_huge_text_are_those_of_its_pieces(monkeypatch):
    text = " w1\tw2\n\u00a0w3\x1c w4\x85\r\x0b\x0cwörter w1 "
    at_once = FakeTokenizer()(text)
    monkeypatch.setattr("bmx.engine.fake.PIECE", 1)
    assert FakeTokenizer()(text) == at_once


@pytest.mark.parametrize("size", ["0", "-1", "many"])
def test_i16_a_longest_line_that_is_no_size_is_refused(run, size):
    assert run(write(row("a")), "--max-line-bytes", size).code == 2


@pytest.mark.parametrize(
    "lines", [(row("a"), row("b"), row("a")), (row(1), row("1")), (row("line-2"), {"prompt": "w1"})]
)
def test_i17_an_id_that_occurs_twice_is_refused_before_anything_is_written(run, lines):
    write(*lines)
    name = lines[0]["id"]
    assert f"an id occurs more than once: '{name}'" in refused(run(IN), folder())


def test_i17_ids_are_counted_across_dialects_errors_and_files(run):
    write(row("a"), openai("b", {"prompt": "w1"}), {"id": "c"})
    other = write({"custom_id": "a", "url": "/v1/none"}, row("b"), row("c", temperature=-1), to=Path("more.jsonl"))
    assert "3 ids occur more than once: 'a', 'b', 'c'" in refused(run(IN, other), folder())


def test_i17_of_many_ids_that_occur_twice_the_first_few_are_named(run):
    write(*(row(f"r{number}") for number in range(20)), *(row(f"r{number}") for number in range(20)))
    assert "20 ids occur more than once: 'r0', 'r1', 'r2', 'r3', 'r4' and 15 more" in refused(run(IN), folder())


def test_i17_an_id_that_occurs_twice_behind_the_limit_is_nobodys_business(run):
    assert run(write(row("a"), row("b"), row("a")), "--limit", 2).code == 0
    assert set(answers()) == {"a", "b"}


NAMES = [
    "",
    0,
    -7,
    10**40,
    "../../x",
    "/etc/passwd",
    "a\nb",
    "a\r\nb",
    "[/b]",
    "[red]x[/red]",
    "\x1b[31mred\x07",
    "😀",
    "a" * 10**6,
]


def test_i18_whatever_an_id_says_it_comes_out_as_it_was_and_is_never_acted_on(run):
    ended = run(write(*map(row, NAMES)), "-v", "--progress", "plain")
    assert ended.code == 0
    assert set(answers()) == set(NAMES)
    assert set(os.listdir()) == {"in.jsonl", "in.out.jsonl", "in.out.jsonl.run.json"}
    assert "\x1b" not in ended.err
    assert "\x07" not in ended.err
    assert len([line for line in ended.log if line.startswith("row ")]) == len(NAMES)
    assert "row '[/b]': " in ended.err
    assert max(map(len, ended.log)) < 1000


def test_i18_ids_that_occur_twice_are_shown_without_control_characters(run):
    said = refused(run(write(*[row("\x1b[31m" + "a" * 10**6)] * 2)), {"in.jsonl": IN.read_bytes()})
    assert "\x1b" not in said
    assert len(said) < 1000


def test_i18_a_path_is_shown_without_control_characters(run):
    said = refused(run("\x1b[31mred\x07.jsonl"), {})
    assert "red" in said
    assert "\x1b" not in said
    assert "\x07" not in said


@pytest.mark.parametrize("line", [{"prompt": "w1"}, {"id": None, "prompt": "w1"}])
def test_i18_a_missing_id_is_the_number_of_the_line(run, line):
    assert run(write("", line)).code == 0
    assert set(answers()) == {"line-2"}


@pytest.mark.parametrize("name", [1.5, True, [], {}])
def test_i18_an_id_of_another_type_is_an_error_under_the_number_of_the_line(run, name):
    said = fails_alone(run(write(row("before"), row(name), row("after"))), "line-2", "invalid_request")
    assert "id must be text or a whole number" in said


def test_i19_the_same_prompt_under_several_ids_is_answered_for_each(run):
    assert run(write(*(row(number, "the same") for number in range(50)))).code == 0
    found = texts()
    assert set(found) == set(range(50))
    assert len(set(found.values())) == 1


# I20: OpenAI batches


@pytest.mark.parametrize(
    ("envelope", "body", "code"),
    [
        ({"method": "GET"}, {}, "invalid_request"),
        ({"url": "/v1/embeddings"}, {}, "invalid_request"),
        ({"url": "/v1/responses"}, {}, "invalid_request"),
        ({}, {"stream": True}, "invalid_request"),
        ({}, {"n": 2}, "invalid_request"),
        ({}, {"logprobs": True}, "invalid_request"),
        ({}, {"model": "gpt-9"}, "model_not_found"),
    ],
    ids=str,
)
def test_i20_an_openai_row_that_cannot_be_answered_fails_alone_in_its_own_format(run, envelope, body, code):
    bad = openai("bad", {"prompt": "w1", **body}, **envelope)
    said = fails_alone(run(write(row("before"), bad, row("after"))), "bad", code)
    [record] = in_order(ERRORS)
    key = record["id"].removeprefix("batch_req_")
    assert len(key) == 16
    assert record == {
        "id": f"batch_req_{key}",
        "custom_id": "bad",
        "response": None,
        "error": {"code": code, "message": said},
    }


def test_i20_an_openai_batch_is_answered_as_one(run):
    chat = openai("chat", {"model": "fake", "messages": [{"role": "user", "content": words(5)}]}, url=CHAT)
    completion = openai("completion", {"prompt": words(4), "max_completion_tokens": 2, "ignore_eos": True})
    plain = {"id": "plain", "prompt": words(5)}
    assert run(write(chat, completion, plain)).code == 0
    found = answers()
    bodies = {name: found[name]["response"]["body"] for name in ("chat", "completion")}
    assert {body["object"] for body in bodies.values()} == {"chat.completion", "text_completion"}
    assert {body["model"] for body in bodies.values()} == {"fake"}
    assert bodies["chat"]["choices"][0]["message"] == {"role": "assistant", "content": found["plain"]["text"]}
    assert bodies["completion"]["choices"][0]["finish_reason"] == "length"
    assert bodies["completion"]["usage"] == {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6}


def test_i20_names_of_the_model_can_be_added(run):
    lines = [openai(name, {"model": name, "prompt": "w1"}) for name in ("mine", "yours", "fake", "theirs")]
    write(*lines, openai("none", {"prompt": "w1"}))
    assert run(IN, "--served-model-name", "mine", "--served-model-name", "yours").code == 3
    assert failures() == {"theirs": "model_not_found"}
    assert "mine or yours" in message("theirs").replace("fake or ", "")
    assert {record["response"]["body"]["model"] for record in answers().values()} == {"mine"}


# I21 to I23: what the input is


def test_i21_standard_input_is_read_and_a_second_run_goes_on_by_content(run):
    lines = [row("a"), row("b"), row("c"), "bad"]
    assert run("-", "-o", OUT, stdin=raw(*lines[:2])).code == 0
    before = OUT.read_bytes()
    assert run("-", "-o", OUT, stdin=raw(*lines)).code == 3
    assert OUT.read_bytes().startswith(before)
    assert set(answers()) == {"a", "b", "c"}
    assert failures() == {"line-4": "invalid_json"}
    again = folder()
    assert run("-", "-o", OUT, stdin=raw(*reversed(lines[:3]), lines[3])).code == 3
    assert folder() == again
    assert "rows of the input have changed" in run("-", "-o", OUT, stdin=raw(row("a", "w7"), *lines[1:])).err
    assert folder() == again


def test_i21_standard_input_needs_an_output(run):
    assert "-o" in refused(run("-", stdin=raw(row("a"))), {}, 2)


def test_i21_standard_input_may_stand_among_files(run):
    ended = run(write({"prompt": "w1"}), "-", "-o", "-", stdin=raw({"prompt": "w2"}, {"prompt": "w3"}))
    assert ended.code == 0
    assert {json.loads(line)["id"] for line in ended.out.splitlines()} == {"line-1", "line-2", "line-3"}


def through_fifo(path: Path, data: bytes) -> threading.Thread:
    """A named pipe that somebody writes this into."""
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(data,), daemon=True)
    writer.start()
    return writer


def test_i21_a_named_pipe_is_read(run):
    rows = [row(number, words(40)) for number in range(2000)]  # more than a pipe holds
    writer = through_fifo(IN, raw(*rows))
    assert run(IN).code == 0
    writer.join()
    assert set(answers()) == set(range(2000))


def test_i21_dev_stdin_is_read(run):
    command = [sys.executable, "-m", "bmx", "run", "/dev/stdin", "-m", "fake", "-o", str(OUT)]
    assert subprocess.run(command, input=raw(row("a"), row("b")), check=False, capture_output=True).returncode == 0
    assert set(answers()) == {"a", "b"}


def test_i21_a_reader_that_has_seen_enough_ends_a_run_from_standard_input_quietly(run):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "bmx", "run", "-", "-m", "fake", "-o", "-", "-q"]
    ended = subprocess.run(command, input=raw(row("a")), check=False, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_i21_standard_input_can_be_read_once_only(run):
    assert run("-", "-", "-o", OUT, stdin=raw(row("a"))).code in (2, 5)


def test_i21_complaints_about_standard_input_name_it_as_such(run):
    ended = run("-", "-o", OUT, stdin=raw(row("a")).decode().encode("utf-16"))
    assert ended.code == 5
    assert "standard input is a file in UTF-16" in ended.err
    assert "input-0" not in ended.err


def test_i21_a_named_pipe_of_compressed_rows_is_read_as_its_name_says(run):
    writer = through_fifo(Path("in.jsonl.gz"), gzip.compress(raw(row("a"))))
    assert run("in.jsonl.gz").code == 0
    writer.join()
    assert set(answers()) == {"a"}


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress], ids=["gzip", "zstd"])
def test_i21_compressed_rows_on_standard_input_are_read_or_refused_as_a_whole(run, pack):
    assert run("-", "-o", OUT, stdin=pack(raw(row("a")))).code in (0, 5)


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_i21_a_compressed_file_is_answered_beside_it(run, suffix, pack):
    path = Path(f"in.jsonl{suffix}")
    path.write_bytes(pack(raw(row("a"), "bad")) + pack(raw(row("b"))))
    assert run(path).code == 3
    assert set(answers()) == {"a", "b"}
    assert failures() == {"line-2": "invalid_json"}


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
@pytest.mark.parametrize("torn", [True, False], ids=["torn", "garbage"])
def test_i21_a_damaged_compressed_file_is_refused_before_anything_is_written(run, suffix, pack, torn):
    path = Path(f"in.jsonl{suffix}")
    path.write_bytes(pack(raw(row("a")))[:-5] if torn else raw(row("a")))
    assert f"cannot read {path}" in refused(run(path), folder())


def test_i22_rows_that_were_added_are_answered_and_the_others_are_not_again(run):
    assert run(write(row("a"), "bad")).code == 3
    before = OUT.read_bytes()
    assert run(write(row("a"), "bad", row("c"))).code == 3
    assert OUT.read_bytes().startswith(before)
    assert set(answers()) == {"a", "c"}
    assert run(write(row("c"), "bad", row("a"))).code == 3
    assert set(answers()) == {"a", "c"}


@pytest.mark.parametrize(
    "lines",
    [
        [row("a"), row("b", "w9"), row("c")],
        [row("a"), row("b", label=1), row("c")],
        [row("a"), row("b", max_tokens=2), row("c")],
        [row("a"), "not JSON", row("c")],
        [row("a"), row("c")],
        [row("a"), row("other"), row("c")],
    ],
)
def test_i22_an_input_whose_answered_rows_were_edited_or_taken_away_is_refused(run, lines):
    assert run(write(row("a"), row("b"), row("c"))).code == 0
    write(*lines)
    said = refused(run(IN), folder(), 2)
    assert str(OUT) in said
    assert "--overwrite" in said
    assert run(IN, "--overwrite").code in (0, 3)


def test_i22_rows_without_ids_that_have_moved_keep_their_answers_under_new_numbers(run):
    first, second = {"prompt": "w1"}, {"prompt": "w2"}
    assert run(write(first, second)).code == 0
    before = answers()
    write({"prompt": "w0"}, first, second)
    ended = run(IN)
    assert ended.code == 0
    assert "2 records of in.out.jsonl renumbered" in ended.err
    after = answers()
    assert [after["line-2"]["text"], after["line-3"]["text"]] == [before["line-1"]["text"], before["line-2"]["text"]]


@pytest.mark.parametrize("flag", ["-o", "--error-file", "--stats-file"])
@pytest.mark.parametrize("link", ["same", "symlink", "hard link", "detour"])
def test_i23_nothing_is_ever_written_over_the_input(run, flag, link):
    write(row("a"))
    path = Path("sub/../in.jsonl" if link == "detour" else "in.jsonl" if link == "same" else "link.jsonl")
    Path("sub").mkdir()
    if link == "symlink":
        path.symlink_to(IN)
    elif link == "hard link":
        path.hardlink_to(IN)
    more = () if flag == "-o" else ("-o", "out.jsonl")
    assert "also an input" in refused(run(IN, flag, path, "--overwrite", *more), folder(), 2)


def test_i23_places_may_not_be_the_same_as_one_another(run):
    write(row("a"))
    before = folder()
    assert "also the output" in refused(run(IN, "-o", "x", "--error-file", "x"), before, 2)
    assert "also the error file" in refused(run(IN, "-o", "x", "--stats-file", "x.errors.jsonl"), before, 2)
    assert "also the output" in refused(run(IN, "--stats-file", OUT), before, 2)
    Path("sub").mkdir()
    assert "also the output" in refused(run(IN, "-o", "x", "--error-file", "sub/../x"), before | {"sub": None}, 2)


# I24 to I29: lengths and values


@pytest.mark.parametrize("prompt", ["", " ", "\n\t", "\u3000\u2028"])
def test_i24_a_prompt_without_text_fails_alone(run, prompt):
    said = fails_alone(run(write(row("before"), row("bad", prompt), row("after"))), "bad", "invalid_request")
    assert "empty" in said


def test_i24_a_prompt_of_one_token_is_answered(run):
    assert run(write(row("a", "x"))).code == 0
    assert answers()["a"]["usage"]["prompt_tokens"] == 1


LETTERS = " ".join("abcdefghijklmnopqrstuvwxyz")
LIMITS = ("--max-model-len", 14, "--max-tokens", 2)


def long(name: str, prompt: str = LETTERS) -> dict[str, Any]:
    return {"id": name, "prompt": prompt}


def test_i25_a_prompt_that_is_too_long_is_an_error_unless_told_otherwise(run):
    ended = run(write(row("before"), long("long"), row("after")), *LIMITS)
    said = fails_alone(ended, "long", "context_length_exceeded")
    assert "26 tokens" in said
    assert "14" in said
    assert run(IN, *LIMITS, "--on-too-long", "error", "-o", "again.jsonl").code == 3
    assert Path("again.jsonl.errors.jsonl").read_bytes().count(b"context_length_exceeded") == 1


def test_i25_a_prompt_that_leaves_room_for_a_single_token_is_not_too_long(run):
    assert run(write(long("fits", words(13)), long("full", words(14))), *LIMITS).code == 3
    assert answers()["fits"]["usage"]["prompt_tokens"] == 13
    assert failures() == {"full": "context_length_exceeded"}


def test_i25_a_long_prompt_that_is_skipped_is_no_failure_but_has_its_record(run):
    ended = run(write(row("a"), long("long")), *LIMITS, "--on-too-long", "skip")
    assert ended.code == 0
    assert "1 skipped" in ended.err
    assert "failed" not in ended.err
    assert set(answers()) == {"a"}
    assert failures() == {"long": "context_length_exceeded"}
    manifest = json.loads(Path("in.out.jsonl.run.json").read_bytes())
    assert {name: manifest["rows"][name] for name in ("answered", "failed", "skipped")} == {
        "answered": 1,
        "failed": 0,
        "skipped": 1,
    }
    assert run(IN, *LIMITS, "--on-too-long", "skip").code == 0


def test_i25_skipping_forgives_no_other_error(run):
    assert run(write(long("long"), "bad"), *LIMITS, "--on-too-long", "skip").code == 3
    assert failures() == {"long": "context_length_exceeded", "line-2": "invalid_json"}


CUT = pytest.mark.parametrize("where", ["left", "middle"])


@CUT
def test_i25_a_long_prompt_that_is_cut_says_by_how_much(run, where):
    assert run(write(long("long"), long("short", words(3))), *LIMITS, "--on-too-long", f"truncate-{where}").code == 0
    found = answers()
    used = found["long"]["usage"]["prompt_tokens"]
    assert 0 < used <= 12
    assert found["long"]["truncated"] == 26 - used
    assert "max_tokens" not in found["long"]
    assert found["short"]["truncated"] == 0


@pytest.mark.parametrize(
    ("where", "changed", "same"),
    [
        ("left", 0, True),
        ("left", 12, True),
        ("left", 25, False),
        ("middle", 0, False),
        ("middle", 12, True),
        ("middle", 25, False),
    ],
)
def test_i25_a_prompt_is_cut_where_it_was_said(run, where, changed, same):
    letters = LETTERS.split()
    letters[changed] = "X"
    options = ("--max-model-len", 10, "--max-tokens", 4, "--ignore-eos", "--on-too-long", f"truncate-{where}")
    assert run(write(long("a"), long("b", " ".join(letters))), *options).code == 0
    found = texts()
    assert (found["a"] == found["b"]) is same


def test_i25_the_end_of_a_prompt_that_is_cut_at_its_left_is_read_as_if_it_were_all(run):
    assert run(write(long("long")), *LIMITS, "--on-too-long", "truncate-left").code == 0
    record = answers()["long"]
    rest = " ".join(LETTERS.split()[-record["usage"]["prompt_tokens"] :])
    assert run(write(long("long", rest)), *LIMITS, "-o", "rest.jsonl").code == 0
    assert texts(Path("rest.jsonl")) == {"long": record["text"]}


@CUT
def test_i25_messages_that_are_too_long_even_when_the_longest_is_cut_fail_alone(run, where):
    many = {"id": "many", "messages": [{"role": "user", "content": letter} for letter in LETTERS.split()]}
    ended = run(write(row("before"), many, row("after")), *LIMITS, "--on-too-long", f"truncate-{where}")
    fails_alone(ended, "many", "context_length_exceeded")


@CUT
def test_i25_an_answer_that_wants_all_the_room_leaves_half_of_it_to_the_prompt(run, where):
    options = ("--max-model-len", 14, "--on-too-long", f"truncate-{where}", "--max-tokens", 100, "--ignore-eos")
    assert run(write(long("a")), *options).code == 0
    record = answers()["a"]
    used = record["usage"]["prompt_tokens"]
    assert 4 <= used <= 7
    assert record["truncated"] == 26 - used
    assert record["max_tokens"] == record["usage"]["completion_tokens"] == 14 - used


def test_i26_an_answer_for_which_there_is_no_room_is_clamped_and_says_so(run):
    long_answer = {"id": "clamped", "prompt": words(10), "max_tokens": 50, "ignore_eos": True}
    just = {"id": "just", "prompt": words(10), "max_tokens": 4, "ignore_eos": True}
    batch = openai("batch", {"prompt": words(10), "max_tokens": 50, "ignore_eos": True})
    assert run(write(long_answer, just, batch), "--max-model-len", 14).code == 0
    found = answers()
    body = found["batch"]["response"]["body"]
    assert (found["clamped"]["max_tokens"], body["max_tokens"]) == (4, 4)
    assert "max_tokens" not in found["just"]
    assert [record["usage"]["completion_tokens"] for record in (found["clamped"], found["just"], body)] == [4, 4, 4]
    assert found["clamped"]["finish_reason"] == body["choices"][0]["finish_reason"] == "length"
    assert found["clamped"]["truncated"] == 0


@pytest.mark.parametrize("text", ["<|im_start|>system", "<|im_end|>", "{% raw %}", "{{ messages }}", "</s>", "[INST]"])
def test_i27_what_looks_like_a_template_is_text(run, text):
    lines = [row("plain", f"{text} w1"), {"id": "chat", "messages": [{"role": "user", "content": f"{text} w1"}]}]
    assert run(write(*lines), "--ignore-eos", "--max-tokens", 3).code == 0
    found = answers()
    assert {record["usage"]["prompt_tokens"] for record in found.values()} == {len(text.split()) + 1}
    assert found["plain"]["text"] == found["chat"]["text"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", 10**400),
        ("temperature", "hot"),
        ("top_p", 2),
        ("top_p", -1),
        ("top_k", -2),
        ("max_tokens", 0),
        ("max_tokens", -5),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("stop", ["x"] * 1000),
        ("stop", ""),
        ("seed", "lucky"),
        ("n", 10**6),
    ],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.parametrize("dialect", ["plain", "openai"])
def test_i28_a_sampling_value_out_of_range_fails_its_row_alone(run, name, value, dialect):
    bad = row("bad", **{name: value}) if dialect == "plain" else openai("bad", {"prompt": "w1", name: value})
    assert name in fails_alone(run(write(row("before"), bad, row("after"))), "bad", "invalid_request")


@pytest.mark.parametrize("flag", [("--temperature", -1), ("--top-p", 2), ("--max-tokens", 0), ("--stop", "")])
def test_i28_a_flag_out_of_range_is_refused(run, flag):
    write(row("a"))
    assert flag[0].strip("-").replace("-", "_") in refused(run(IN, *flag), folder(), 2)


def test_i29_answers_do_not_depend_on_the_company(run):
    lines = [row(size, words(size), max_tokens=5) for size in (10, 100_000, 17, 1, 3000, 511, 512, 513, 40_000, 2)]
    assert run(write(*lines)).code == 0
    together = answers()
    for line in lines:
        assert run(write(line), "-o", "alone.jsonl", "--overwrite").code == 0
        [alone] = in_order(Path("alone.jsonl"))
        assert alone["usage"]["prompt_tokens"] == line["id"]
        for name in ("text", "usage", "finish_reason"):
            assert together[line["id"]][name] == alone[name]


# Which rows, and where to


def test_a_limit_is_of_rows_good_or_bad_but_not_of_blank_lines(run):
    write("", row("a"), "bad", row("c"), row("d"))
    assert run(IN, "--limit", 2).code == 3
    assert (set(answers()), failures()) == ({"a"}, {"line-3": "invalid_json"})
    assert run(IN, "--limit", 3).code == 3
    assert set(answers()) == {"a", "c"}
    assert run(IN).code == 3
    assert set(answers()) == {"a", "c", "d"}
    assert run(IN, "--limit", 1).code == 0


@pytest.mark.parametrize("shares", [1, 2, 3, 20])
def test_shards_together_give_every_row_once(run, shares):
    lines = ["", *(row(number) for number in range(9)), "bad", "", {"id": "wrong"}]
    write(*lines)
    found: list[Any] = []
    for share in range(1, shares + 1):
        output = Path(f"in.{share}-of-{shares}.out.jsonl")
        assert run(IN, "--shard", f"{share}/{shares}").code in (0, 3)
        mine = [*answers(output), *failures(output.with_name(output.name + ".errors.jsonl"))]
        assert shares > 1 or len(mine) == 11
        assert len(mine) <= -(-len(lines) // shares)
        found += mine
    assert sorted(map(str, found)) == sorted(map(str, [*range(9), "line-11", "wrong"]))


@pytest.mark.parametrize("share", ["0/3", "4/3", "1/0", "half", "1", "-1/3"])
def test_a_shard_that_is_none_is_refused(run, share):
    assert run(write(row("a")), f"--shard={share}").code == 2


def of_many_lengths(count: int) -> list[Any]:
    """Rows of which the first are finished last, and some fail."""
    lines = [
        row(number, words(1 + (7 * number) % 50), max_tokens=1 + 100 // (1 + number % 9)) for number in range(count)
    ]
    return ["bad" if number % 10 == 4 else line for number, line in enumerate(lines)]


@pytest.mark.parametrize("window", [1, 2, 5, 4096])
def test_answers_and_errors_come_in_the_order_of_the_input_if_asked_for(run, monkeypatch, window):
    monkeypatch.setattr("bmx.job.result_writer.WINDOW", window)
    lines = of_many_lengths(120)
    options = ("--max-num-seqs", 7, "--ignore-eos")
    assert run(write(*lines), *options, "-o", "any.jsonl").code == 3
    assert run(IN, *options, "--order", "input").code == 3
    bad = [f"line-{number}" for number, line in enumerate(lines, 1) if line == "bad"]
    assert [record["id"] for record in in_order(OUT)] == [line["id"] for line in lines if line != "bad"]
    assert [record["id"] for record in in_order(ERRORS)] == bad
    assert texts() == texts(Path("any.jsonl"))
    assert in_order(OUT) != in_order(Path("any.jsonl"))


def test_in_order_no_more_rows_are_read_than_the_window_holds_until_the_first_is_written(monkeypatch):
    monkeypatch.setattr("bmx.job.result_writer.WINDOW", 2)
    written: list[Any] = []
    writer = ResultWriter(add_record=lambda record, failed: written.append(record["id"]), stats=Stats(), in_order=True)
    writer.expect(InputRow(1, "a", "00"))
    assert not writer.full
    writer.expect(InputRow(2, "b", "00"))
    writer.put(Result(id="b"))
    assert (writer.full, written) == (True, [])
    writer.put(Result(id="a"))
    assert (writer.full, written) == (False, ["a", "b"])


def test_in_order_and_with_one_output_for_all_errors_stand_in_their_places(run):
    lines = of_many_lengths(30)
    ended = run(write(*lines), "--order", "input", "-o", "-", "--ignore-eos")
    expected = [f"line-{number}" if line == "bad" else line["id"] for number, line in enumerate(lines, 1)]
    assert [json.loads(line)["id"] for line in ended.out.splitlines()] == expected


def test_a_run_gives_up_when_more_rows_failed_than_are_put_up_with_and_the_next_goes_on(run):
    write(row("a"), "bad", "bad", "bad", "bad", "bad", row("b"))
    ended = run(IN, "--max-errors", 2)
    assert ended.code == 1
    assert "gave up: 3 rows failed" in ended.err
    assert len(failures()) == 3
    assert run(IN, "--max-errors", 2).code == 3
    assert set(answers()) == {"a", "b"}
    assert len(failures()) == 5


def test_as_many_errors_as_are_put_up_with_end_a_run_as_always(run):
    write(row("a"), "bad", "bad")
    assert run(IN, "--max-errors", 2).code == 3
    assert run(IN, "--max-errors", 1, "-o", "other.jsonl").code == 1
    assert run(write(row("a")), "--max-errors", 0, "-o", "good.jsonl").code == 0


def test_rows_that_are_skipped_are_no_errors_to_give_up_for(run):
    assert run(write(*map(long, "abc")), *LIMITS, "--on-too-long", "skip", "--max-errors", 0).code == 0


def test_a_prompt_template_is_filled_from_each_row(run):
    lines = [{"id": number, "title": words(number), "pages": [number]} for number in range(1, 4)]
    template = r"Title:\n{title}\tand {pages}"
    options = ("--ignore-eos", "--max-tokens", 5)
    assert run(write(*lines), "--prompt-template", template, *options).code == 0
    by_hand = [{"id": n, "prompt": f"Title:\n{words(n)}\tand [{n}]"} for n in range(1, 4)]
    assert run(write(*by_hand), "-o", "by-hand.jsonl", *options).code == 0
    assert texts() == texts(Path("by-hand.jsonl"))


def test_a_row_that_lacks_a_field_of_the_template_fails_alone(run):
    lines = [{"id": name, "document": "w1"} for name in ("before", "after")]
    ended = run(write(*lines, {"id": "bad", "text": "w1"}), "--prompt-template", "{document}")
    assert "'document'" in fails_alone(ended, "bad", "invalid_request")


def test_with_a_template_fields_may_have_any_name(run):
    fields = dict.fromkeys((*sorted(NOT_SUPPORTED), "tools"), "w1") | {"temprature": "w2"}
    assert run(write({"id": "a", **fields}), "--prompt-template", "{n} {tools} {temprature}").code == 0
    assert answers()["a"]["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize(
    "flag",
    [
        "--prompt-template",
        "--system-prompt",
        "--served-model-name",
    ],
)
def test_a_flag_that_is_no_utf_8_is_refused(run, flag):
    write(row("plain"), openai("batch", {"prompt": "w1"}))
    assert flag[2:].replace("-", "_") in refused(run(IN, flag, "{prompt} \udcff"), folder(), 2)


@pytest.mark.parametrize("template", ["{document", "}", "{}", "{{document}}"])
def test_a_template_with_anything_but_fields_is_refused(run, template):
    write(row("a"))
    assert "prompt_template" in refused(run(IN, "--prompt-template", template), folder(), 2)


def test_several_inputs_are_one_job_and_their_lines_are_numbered_through(run):
    IN.write_bytes(raw({"prompt": "w1"}, "bad").rstrip(b"\n"))
    more, packed = write({"prompt": "w2"}, to=Path("more.jsonl")), Path("packed.jsonl.gz")
    packed.write_bytes(gzip.compress(raw("bad", {"prompt": "w3"})))
    assert run(IN, more, packed).code == 3
    assert set(answers()) == {"line-1", "line-3", "line-5"}
    assert failures() == {"line-2": "invalid_json", "line-4": "invalid_json"}
    assert set(os.listdir()) >= {"in.jsonl", "more.jsonl", "packed.jsonl.gz", "in.out.jsonl"}


def test_one_bad_file_among_several_stops_the_job_before_anything_is_written(run):
    write(row("a"))
    assert "missing.jsonl" in refused(run(IN, "missing.jsonl"), folder())


def test_errors_go_where_they_are_told_to(run):
    assert run(write(row("a"), "bad"), "--error-file", "wrong.jsonl").code == 3
    assert set(answers()) == {"a"}
    assert failures(Path("wrong.jsonl")) == {"line-2": "invalid_json"}
    assert not ERRORS.exists()


def test_without_errors_there_is_no_error_file(run):
    assert run(write(row("a")), "--error-file", "wrong.jsonl").code == 0
    assert not Path("wrong.jsonl").exists()


# Properties

GOOD = st.builds(row, st.none(), st.text(st.characters(codec="utf-8"), min_size=1).map(lambda text: f"w {text}"))
SAME = st.just({"prompt": "the same"})
TALK = st.just({"messages": [{"role": "user", "content": "w1"}]})
BATCH = st.just(openai("", {"prompt": "w1 w2"}))
TOO_LONG = st.just({"prompt": words(50)})
WRONG = st.sampled_from(
    [
        {"prompt": ""},
        {"messages": []},
        {"prompt": "w1", "top_p": 2},
        {"prompt": "w1", "n": 2},
        openai("", {"model": "no"}),
    ]
)
NOT_JSON = st.sampled_from(["bad", "[1]", b"\xff", '{"prompt": "torn', '{"a": NaN}', "null", "[" * 5000])
BLANK = st.sampled_from(["", "  ", "\t", "\r"])
KINDS = {"good": GOOD | SAME | TALK | BATCH, "failed": WRONG | TOO_LONG, "no JSON": NOT_JSON, "blank": BLANK}
LINES = st.lists(
    st.sampled_from(sorted(KINDS)).flatmap(lambda kind: KINDS[kind].map(lambda value: (kind, value))), max_size=12
)


def named(value: Any, number: int, own: bool) -> Any:
    """A line with an id of its own, if it can have one and should; an OpenAI line always has one."""
    if not isinstance(value, dict):
        return value
    if "custom_id" in value:
        return {**value, "custom_id": f"row {number}"}
    return {**value, "id": f"row {number}" if own else None}


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=LINES, own=st.booleans(), order=st.sampled_from(["input", "completion"]), end=st.booleans())
@example(lines=[("good", {"prompt": "the same"})] * 3, own=False, order="input", end=False)
@example(lines=[("no JSON", "bad")] * 3, own=False, order="completion", end=True)
def test_every_line_is_in_exactly_one_of_the_two_files(run, lines, own, order, end):
    expected: dict[str, set[Any]] = {"good": set(), "failed": set(), "no JSON": set(), "blank": set()}
    rows = [named(value, number, own) for number, (_, value) in enumerate(lines, 1)]
    for number, ((kind, _), value) in enumerate(zip(lines, rows, strict=True), 1):
        given_name = value.get("custom_id", value.get("id")) if isinstance(value, dict) else None
        expected[kind].add(given_name or f"line-{number}")
    IN.write_bytes(raw(*rows) if end else raw(*rows)[:-1])
    ended = run(IN, "--overwrite", "--max-model-len", 40, "--order", order, "--max-num-seqs", 3)
    assert set(answers()) == expected["good"]
    assert set(failures()) == expected["failed"] | expected["no JSON"]
    assert ended.code == (3 if failures() else 0)
    if order == "input":
        numbers = [int(name_of(record).replace("-", " ").split()[1]) for record in in_order(OUT)]
        assert numbers == sorted(numbers)


# Inputs that change, and many rows


class Meanwhile(Stop):
    """Does something in the middle of a run, which is never told to stop."""

    def __init__(self, act: Callable[[], Any]) -> None:
        super().__init__()
        self.looked, self.act = 0, act

    @property
    def requested(self) -> bool:
        self.looked += 1
        if self.looked == 100:
            self.act()
        return False


@pytest.mark.parametrize("what", ["replaced", "written to", "cut", "gone"])
def test_i22_an_input_that_changes_while_it_is_read_is_told_of(tmp_path, what):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row(i)) + "\n" for i in range(2000)))
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row(i)) + "\n" for i in range(5000, 7000)))
    acts = {
        "replaced": lambda: other.replace(source),
        "written to": lambda: source.write_text(source.read_text() + json.dumps(row("new")) + "\n"),
        "cut": lambda: os.truncate(source, 5000),
        "gone": source.unlink,
    }
    config = RunConfig.of((str(source),), given_settings({"model": "fake"}))
    with pytest.raises(BmxError, match=r"the input.* changed"):
        run_job(config, Display("none"), Meanwhile(acts[what]))
    assert not (tmp_path / "in.out.jsonl.lock").exists()


def test_i22_ids_that_occur_twice_only_since_the_input_was_rewritten_are_no_traceback(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row(i)) + "\n" for i in range(10_000, 14_000)))
    twice = "".join(json.dumps(row(10_000 + i % 3)) + "\n" for i in range(4000))

    def rewrite() -> None:
        with source.open("r+") as file:
            file.write(twice)

    config = RunConfig.of((str(source),), given_settings({"model": "fake"}))
    with pytest.raises(InputFileError, match="has changed while it was read"):
        run_job(config, Display("none"), Meanwhile(rewrite))


def test_i29_a_long_row_among_many_is_answered_though_only_some_are_measured(run, monkeypatch):
    monkeypatch.setattr(lengths, "MEASURED_ROWS", 50)
    rows = [row(i, prompt="w1 w2") for i in range(301)]
    for at in range(7):
        rows[at * 43] = row(at * 43, prompt="w3 " * 600)
    ended = run(write(*rows), "--kv-budget", 70)
    assert ended.code == 0
    assert any("one in 7 was measured" in line for line in ended.log)
    assert sum(record["kv"]["evicted"] > 0 for record in answers().values()) == 7
