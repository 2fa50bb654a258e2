"""Answers that can be joined with the rows they answer: ids from any field, fields that answers repeat, tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bmx.errors import RowError
from bmx.job.input_rows import DEEPEST_KEPT, strict_loads
from bmx.job.output_records import as_record, read_record, renamed, strict_dumps
from bmx.request import Result

IN, OUT, ERRORS = Path("in.jsonl"), Path("in.out.jsonl"), Path("in.out.jsonl.errors.jsonl")
KEY = "f56b70b93aea6264"
PAGES = [
    {"url": "https://a", "title": "One", "body": "w1 w2", "tags": ["x"]},
    {"url": "https://b", "title": None, "body": "w3"},
]
TEMPLATE = ("--prompt-template", "Shorten: {body}")
BATCH = {"custom_id": "a", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "w1"}]}}


def write(*rows: Any, to: Path = IN) -> Path:
    to.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return to


def records(path: Path = OUT) -> dict[Any, dict[str, Any]]:
    """The records of a file by the ids of their rows."""
    found = [strict_loads(line) for line in path.read_text().splitlines()]
    return {record.get("id" if "text" in record or "row_hash" in record else "custom_id"): record for record in found}


@pytest.fixture
def run(bmx):
    """``bmx run in.jsonl`` with the fake model and these flags."""

    def call(*flags: Any, source: Any = IN):
        return bmx("run", source, "-m", "fake", "--max-tokens", 3, *flags)

    return call


def test_k1_the_id_of_plain_rows_may_stand_in_any_field(run):
    write(*PAGES, {"body": "w4", "id": "never read"}, {"body": "w5", "url": 7.0})
    assert run(*TEMPLATE, "--id-field", "url").code == 0
    assert set(records()) == {"https://a", "https://b", "line-3", 7}


def test_k1_rows_without_a_template_have_their_ids_in_that_field_and_rows_of_batches_in_their_own(run):
    write({"prompt": "w1", "url": "u", "id": "i"}, BATCH | {"name": "n"})
    assert run("--id-field", "url").code == 0
    assert set(records()) == {"u", "a"}


@pytest.mark.parametrize("value", [True, 1.5, ["a"], {"a": 1}])
def test_k1_an_id_of_any_other_kind_fails_its_row_and_names_the_field(run, value):
    write({"prompt": "w1", "url": value})
    assert run("--id-field", "url").code == 3
    assert "an id ('url') must be text or a whole number" in records(ERRORS)["line-1"]["error"]["message"]


def test_k1_ids_that_occur_twice_are_refused_with_the_name_of_their_field(run):
    write(*PAGES, PAGES[0])
    ended = run(*TEMPLATE, "--id-field", "url")
    assert (ended.code, OUT.exists()) == (5, False)
    assert "an id occurs more than once in the field 'url': 'https://a'" in ended.complaint[0]


def test_k2_answers_repeat_the_fields_that_they_are_asked_to(run):
    write(*PAGES)
    assert run(*TEMPLATE, "--id-field", "url", "--keep-fields", "title,tags").code == 0
    assert {name: record["row"] for name, record in records().items()} == {
        "https://a": {"title": "One", "tags": ["x"]},
        "https://b": {"title": None},
    }


def test_k2_the_whole_row_is_repeated_with_or_without_a_template(run):
    rows = [{"prompt": "w1", "id": "a", "max_tokens": 2, "error": {"code": "x"}}, {"prompt": "w2", "key": 3}]
    write(*rows)
    assert run("--keep-fields", "all").code == 0
    assert [record["row"] for record in records().values()] == rows


def test_k2_errors_repeat_the_fields_of_rows_that_could_be_read(run):
    IN.write_text('{"title": "One"}\n{"title": \n{"title": 2, "prompt": ["w1"], "id": []}\n')
    assert run("--keep-fields", "title").code == 3
    assert {name: record.get("row") for name, record in records(ERRORS).items()} == {
        "line-1": {"title": "One"},
        "line-2": None,
        "line-3": {"title": 2},
    }


def test_k2_records_of_batches_stay_as_their_kind_has_them(run):
    write(BATCH, {"prompt": "w1", "id": "b"})
    assert run("--keep-fields", "all").code == 0
    assert "row" not in records()["a"]
    assert "row" in records()["b"]


def test_k2_what_cannot_be_written_again_fails_its_row(run):
    deep = "[" * DEEPEST_KEPT + "]" * DEEPEST_KEPT
    IN.write_text(f'{{"prompt": "w1", "x": {deep}}}\n{{"prompt": "w1", "x": 1e999}}\n{{"prompt": "w1", "x": [[1]]}}\n')
    assert run("--keep-fields", "all").code == 3
    assert {name: record["error"]["code"] for name, record in records(ERRORS).items()} == {
        "line-1": "invalid_request",
        "line-2": "invalid_json",
    }
    assert set(records()) == {"line-3"}


@pytest.mark.parametrize("flag", ["--keep-fields", "--id-field"])
def test_k3_other_fields_than_before_are_refused_on_resume(run, flag):
    write(*PAGES)
    assert run(*TEMPLATE, flag, "url").code == 0
    ended = run(*TEMPLATE, flag, "title")
    assert ended.code == 2
    assert f"{flag[2:].replace('-', '_')} was " in ended.complaint[0]
    assert run(*TEMPLATE).code == 2
    assert "nothing to do" in run(*TEMPLATE, flag, "url").err


def test_k3_rows_without_ids_are_found_again_where_they_have_moved_with_their_fields(run):
    rows = [{"prompt": f"w{i}", "title": i, "key": "k", "custom_id": None, "text": "t"} for i in range(3)]
    write(*rows)
    assert run("--keep-fields", "all", "--limit", 2).code == 0
    write(*reversed(rows))
    ended = run("--keep-fields", "all")
    assert "1 record of in.out.jsonl renumbered" in ended.err
    assert {name: record["row"]["title"] for name, record in records().items()} == {
        "line-1": 2,
        "line-2": 1,
        "line-3": 0,
    }


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def _is_text(value: Any) -> bool:
    """Whether all texts of a value can be written in UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


OWN_NAMES = ("id", "error", "key", "custom_id", "result", "response", "row_hash", "truncated", "max_tokens", "row")


ROWS = st.dictionaries(st.sampled_from(OWN_NAMES) | st.text(), JSON, max_size=4).filter(_is_text)


@given(row=ROWS, failed=st.booleans())
@example(row={name: {"error": {"error": {"code": "x"}}} for name in OWN_NAMES}, failed=False)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much], max_examples=50)
def test_k2_a_record_is_read_again_whatever_its_row_holds(row, failed):
    result = Result(id="line-4", error=RowError("timeout", "late")) if failed else Result(id="line-4", text="yes")
    record = strict_loads(strict_dumps(as_record(result, KEY, row=row)).decode())
    assert record["row"] == row
    for named, name in ((record, "line-4"), (renamed(record, "line-9"), "line-9")):
        known = read_record(named)
        assert known
        assert (known.id, known.key, known.cut) == (name, KEY, False)
        assert known.error_code == ("timeout" if failed else None)
