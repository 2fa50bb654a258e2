"""Answers that can be joined with the rows they answer: ids from any field, fields that answers repeat, tables."""

from __future__ import annotations

import csv
import json
import math
import shutil
import sys
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from forked import Fault
from forked import run as forked_run
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bmx.errors import RowError
from bmx.job import table_writer
from bmx.job.input_rows import DEEPEST_KEPT
from bmx.job.output_records import as_record, read_record, renamed, strict_dumps
from bmx.job.strict_json import strict_loads
from bmx.job.table_writer import flattened, write_table
from bmx.request import Result

IN, OUT, ERRORS = Path("in.jsonl"), Path("in.out.jsonl"), Path("in.out.jsonl.errors.jsonl")
ARTICLES = Path(__file__).parent.parent / "sample_inputs" / "articles.csv"
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


# Tables

NAMES = ("a.parquet", "a.csv", "a.tsv")
EVERY_KIND = pytest.mark.parametrize("name", NAMES)
TABLE_OUT, TABLE_ERRORS = Path("a.out.jsonl"), Path("a.out.jsonl.errors.jsonl")


def cells(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a table by the names of their columns; of text alone, unless it is a Parquet file."""
    if str(path).endswith(".parquet"):
        return pyarrow.parquet.read_table(path).to_pylist()
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t" if str(path).endswith(".tsv") else ",", strict=True))


def tabled(tmp_path: Path, name: str, *answers: Any) -> list[dict[str, Any]]:
    """The table of these records."""
    source, manifest = tmp_path / "x.jsonl", tmp_path / "x.run.json"
    source.write_bytes(b"".join(strict_dumps(record) for record in answers))
    manifest.write_text('{"format": 2, "state": "finished", "fingerprint": {}, "settings": {}}')
    (tmp_path / name).unlink(missing_ok=True)
    assert write_table(tmp_path / name, source, manifest)
    return cells(tmp_path / name)


@EVERY_KIND
def test_k4_a_table_has_the_answers_and_the_lines_of_json_stay(run, name):
    write(*PAGES, {"url": "https://c", "body": None})
    ended = run("-o", name, *TEMPLATE, "--id-field", "url", "--keep-fields", "title,tags")
    assert ended.code == 3
    assert f"answers are in {name}, and as lines of JSON in a.out.jsonl" in ended.err
    assert "1 row failed: 1 invalid_request; see a.out.jsonl.errors.jsonl" in ended.err
    rows, kept = cells(name), records(TABLE_OUT)
    assert [row["id"] for row in rows] == list(kept)
    assert set(records(TABLE_ERRORS)) == {"https://c"}
    named = {row["id"]: row for row in rows}
    assert named["https://a"]["text"] == kept["https://a"]["text"]
    assert named["https://a"]["row.title"] == "One"
    assert json.loads(named["https://a"]["row.tags"]) == ["x"]
    assert not named["https://b"]["row.title"]


def test_k4_records_of_batches_become_tables_by_the_same_rule(run):
    write(BATCH, {"prompt": "w1", "id": "b"})
    assert run("-o", "a.csv").code == 0
    named, kept = {row["custom_id"]: row for row in cells("a.csv")}, records(TABLE_OUT)
    assert json.loads(named["a"]["response.body.choices"]) == kept["a"]["response"]["body"]["choices"]
    assert (named["a"]["response.status_code"], named["a"]["error"]) == ("200", "")
    assert named[""]["text"] == kept["b"]["text"]


@EVERY_KIND
def test_k4_the_same_command_leaves_a_table_as_it_is_and_writes_one_that_is_missing(run, name):
    write(*PAGES)
    assert run("-o", name, *TEMPLATE).code == 0
    path, before = Path(name), Path(name).stat()
    ended = run("-o", name, *TEMPLATE)
    assert (ended.code, path.stat().st_mtime_ns, path.stat().st_ino) == (0, before.st_mtime_ns, before.st_ino)
    assert "written to" not in ended.err
    path.unlink()
    ended = run("-o", name, *TEMPLATE)
    assert (ended.code, len(cells(name))) == (0, 2)
    assert f"the answers were written to {name}" in ended.err


def test_k4_the_same_answers_may_become_tables_of_several_kinds(run):
    write(*PAGES)
    assert run("-o", "a.out.jsonl", *TEMPLATE).code == 0
    assert [run("-o", name, *TEMPLATE).code for name in (*NAMES, *NAMES)] == [0] * 6
    assert {len(cells(name)) for name in NAMES} == {2}


def test_k4_a_table_follows_rows_that_were_added_retried_and_begun_anew(run):
    write(PAGES[0], {"url": "https://b", "body": ""})
    flags = ("-o", "a.CSV", "--prompt-template", "{body}", "--id-field", "url")
    assert (run(*flags).code, len(cells("a.CSV"))) == (3, 1)
    write(PAGES[0], {"url": "https://b", "body": "w1"})
    assert (run(*flags, "--retry-failed").code, len(cells("a.CSV"))) == (0, 2)
    write(PAGES[0])
    assert run(*flags).code == 2
    assert (run(*flags, "--set-aside").code, len(cells("a.CSV"))) == (0, 1)
    write(*PAGES)
    assert (run(*flags, "--overwrite").code, len(cells("a.CSV"))) == (0, 2)


@EVERY_KIND
def test_k4_a_table_without_answers_has_columns(run, name):
    write()
    assert run("-o", name).code == 0
    assert cells(name) == []
    names = pyarrow.parquet.read_schema(name).names if name == NAMES[0] else Path(name).read_text()
    assert "row_hash" in names


def test_k4_a_table_of_answers_joins_with_the_table_of_its_rows(run):
    articles = {row["url"]: row["title"] for row in cells(ARTICLES)}
    flags = ("--prompt-template", "Summarize:\\n{body}", "--id-field", "url", "--keep-fields", "title")
    for name in NAMES:
        assert run(*flags, "-o", name, source=ARTICLES).code == 0
        assert {row["id"]: row["row.title"] for row in cells(name)} == articles


def test_k4_a_dry_run_writes_no_table(run):
    write(*PAGES)
    assert run("-o", "a.csv", *TEMPLATE, "--dry-run").code == 0
    assert run("-o", "a.out.jsonl", *TEMPLATE).code == 0
    assert run("-o", "a.csv", *TEMPLATE, "--dry-run").code == 0
    assert not Path("a.csv").exists()


def test_k4_shares_have_tables_of_their_own(run):
    write(*PAGES)
    for share in "12":
        assert run("-o", f"{share}.csv", *TEMPLATE, "--shard", f"{share}/2").code == 0
    assert [row["id"] for share in "12" for row in cells(f"{share}.csv")] == ["line-1", "line-2"]
    assert run("-o", "1.csv", *TEMPLATE, "--shard", "2/2").code == 2


def test_k4_a_link_to_a_table_stays_one(run):
    Path("there").mkdir()
    Path("a.csv").symlink_to("there/b.csv")
    write(*PAGES)
    assert [run("-o", "a.csv", *TEMPLATE).code for _ in range(2)] == [0, 0]
    assert Path("a.csv").is_symlink()
    assert len(cells("there/b.csv")) == 2


@pytest.mark.parametrize("flags", [(), ("--overwrite",), ("--set-aside",), ("--retry-failed",)], ids=" ".join)
def test_k5_a_table_of_somebody_else_is_refused_before_any_work(run, flags):
    write(*PAGES)
    Path("a.csv").write_text("mine")
    ended = run("-o", "a.csv", *TEMPLATE, *flags)
    assert ended.code == 2
    assert "the table a.csv exists, and is not a table that bmx wrote here, or was edited since" in ended.complaint[0]
    assert (Path("a.csv").read_text(), TABLE_OUT.exists()) == ("mine", False)
    assert run("-o", "a.out.jsonl", *TEMPLATE).code == 0
    assert run("-o", "a.csv", *TEMPLATE, *flags).code == 2
    assert Path("a.csv").read_text() == "mine"


def test_k5_a_table_that_was_edited_is_refused_until_it_is_moved_away(run):
    write(*PAGES)
    assert run("-o", "a.csv", *TEMPLATE).code == 0
    edited = Path("a.csv").read_text().replace("line-1", "my line")
    Path("a.csv").write_text(edited)
    assert (run("-o", "a.csv", *TEMPLATE, "--overwrite").code, Path("a.csv").read_text()) == (2, edited)
    Path("a.csv").rename("b.csv")
    assert (run("-o", "a.csv", *TEMPLATE).code, len(cells("a.csv"))) == (0, 2)


def test_k5_a_table_that_appears_while_the_run_is_at_work_stays(run, monkeypatch):
    def meddled(answers: Path) -> Any:
        Path("a.csv").write_text("mine")
        return columns(answers)

    columns = table_writer._columns
    monkeypatch.setattr(table_writer, "_columns", meddled)
    write(*PAGES)
    ended = run("-o", "a.csv", *TEMPLATE)
    assert (ended.code, Path("a.csv").read_text(), len(records(TABLE_OUT))) == (1, "mine", 2)
    assert "the answers are in a.out.jsonl; mend this, and the same command writes the table" in ended.err
    assert not Path(".a.csv.tmp").exists()


@pytest.mark.parametrize("name", ["a.csv", "a.out.jsonl"])
def test_k5_a_table_or_its_lines_of_json_that_are_the_input_are_refused(run, name):
    write({"prompt": "w1"}, to=Path(name))
    before = Path(name).read_bytes()
    assert run("-o", "a.csv", source=name).code in (2, 5)
    assert Path(name).read_bytes() == before


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a.csv.gz", "bmx compresses no output"),
        ("a.jsonl.zst", "bmx compresses no output"),
        ("a.XLSX", "bmx writes no files"),
        ("none/a.csv", "does not exist"),
        ("a.csv", "is a folder"),
    ],
)
def test_k5_a_place_where_no_table_can_be_is_refused_at_once(run, name, says):
    write(*PAGES)
    if says == "is a folder":
        Path(name).mkdir()
    ended = run("-o", name, *TEMPLATE)
    assert (ended.code, says in ended.complaint[0]) == (2, True)


@pytest.mark.parametrize("command", ["calibrate", "bench"])
def test_k5_measurements_are_no_table(bmx, command):
    write({"prompt": "w1"})
    ended = bmx(command, IN, "-m", "no-model", "-o", "a.csv")
    assert (ended.code, f"{command} writes JSON, not a table" in ended.complaint[0]) == (2, True)


def test_k5_without_pyarrow_a_line_names_the_extra_before_anything_is_loaded(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    write(*PAGES)
    ended = run("-o", "a.parquet", *TEMPLATE)
    assert (ended.code, TABLE_OUT.exists()) == (2, False)
    assert "[parquet]" in ended.complaint[1]
    assert run("-o", "a.csv", *TEMPLATE).code == 0


FAULTY = ("run", "in.jsonl", "-m", "fake", "--max-tokens", 3, *TEMPLATE, "-o", "a.csv")
CALLS = ("open", "fsync", "replace")


@pytest.mark.parametrize("do", ["SIGKILL", "ENOSPC"])
def test_k6_killed_or_out_of_disk_while_a_table_is_written_the_same_command_writes_it(tmp_path, do):
    """Whatever call to the system it befalls, answers stay, and no table is foreign to the run that made it."""
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    write(*PAGES[:1], to=before / "in.jsonl")
    assert forked_run(*FAULTY, cwd=before).code == 0
    write(*PAGES, to=before / "in.jsonl")
    shutil.copytree(before, after)
    assert forked_run(*FAULTY, cwd=after).code == 0
    tables = [(folder / "a.csv").read_bytes() for folder in (before, after)]
    for at in count(1):
        folder = tmp_path / str(at)
        shutil.copytree(before, folder)
        ended = forked_run(*FAULTY, cwd=folder, fault=Fault(do=do, at=at, calls=CALLS, lasts=True))
        if ended.code == 0:
            break
        assert (folder / "a.csv").read_bytes() in tables
        assert do == "SIGKILL" or "No space left" in ended.err
        assert forked_run(*FAULTY, cwd=folder).code == 0
        assert (folder / "a.csv").read_bytes() == tables[1]
    assert at > 5


def test_types_of_columns_in_parquet(tmp_path):
    tabled(
        tmp_path,
        "a.parquet",
        {"whole": 1, "large": 2**60, "huge": 2**64, "number": 1, "mixed": 1, "wide": 2**60, "flag": True, "none": None},
        {"whole": -5, "large": 1, "huge": 1, "number": 0.5, "mixed": "1", "wide": 0.5, "flag": None, "list": [1, "é"]},
    )
    table = pyarrow.parquet.read_table(tmp_path / "a.parquet")
    assert {field.name: str(field.type) for field in table.schema} == {
        "whole": "int64",
        "large": "int64",
        "huge": "string",
        "number": "double",
        "mixed": "string",
        "wide": "string",
        "flag": "bool",
        "none": "string",
        "list": "string",
    }
    assert table["huge"].to_pylist() == [str(2**64), "1"]
    assert table["list"].to_pylist() == [None, '[1, "é"]']
    assert table["flag"].to_pylist() == [True, None]


def test_parquet_is_written_in_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(table_writer, "BATCH_ROWS", 3)
    rows = [{"n": number} for number in range(8)]
    assert tabled(tmp_path, "a.parquet", *rows) == rows
    assert pyarrow.parquet.ParquetFile(tmp_path / "a.parquet").num_row_groups == 3


def test_too_many_columns_are_refused_and_the_answers_stay(run, monkeypatch):
    monkeypatch.setattr(table_writer, "MOST_COLUMNS", 20)
    write({"prompt": "w1", **{str(number): number for number in range(20)}})
    ended = run("-o", "a.csv", "--keep-fields", "all")
    assert (ended.code, len(records(TABLE_OUT)), Path("a.csv").exists()) == (1, 1, False)
    assert ended.log[-1] == "hint: the answers are in a.out.jsonl"


@given(rows=st.lists(ROWS, min_size=1, max_size=3))
@example(rows=[{"a": "x\ry", "b": "\r\n", "c": '"', "\n": ",", "\t": "\t", "": " ", "d": "\u2028", "e": "-"}])
@settings(
    deadline=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.filter_too_much,
        HealthCheck.function_scoped_fixture,
    ],
    max_examples=12,
)
def test_k4_whatever_kept_fields_hold_is_found_in_their_tables(tmp_path, rows):
    answers = [as_record(Result(id=f"line-{n}", text=""), KEY, row=row) for n, row in enumerate(rows)]
    for name in NAMES:
        table = tabled(tmp_path, name, *answers)
        assert len(table) == len(rows)
        for found, record in zip(table, answers, strict=True):
            wanted = dict(flattened(record))
            assert {name for name, cell in found.items() if cell not in (None, "")} <= wanted.keys()
            for column, value in wanted.items():
                check_cell(found[column], value)


def check_cell(cell: Any, value: Any) -> None:
    """A cell must say what a value was: itself, or as JSON; text as it is."""
    if value is None or isinstance(value, str):
        assert (cell or "") == (value or "")
    elif isinstance(cell, float):
        assert math.isclose(cell, value, rel_tol=0.0)
    else:
        assert (json.loads(cell) if isinstance(cell, str) else cell) == value


def test_what_has_no_effect_on_the_rows_is_said(run):
    write(BATCH)
    assert "keep_fields has no effect: none of the first rows is a plain one" in run("--keep-fields", "all").err
    write({"body": "w1", "max_tokens": 9})
    ended = run(*TEMPLATE, "-o", "other.jsonl")
    assert "with a template, 'max_tokens' in a row is data: what it asks stands in its object 'sampling'" in ended.err


def test_answers_that_are_cut_are_counted(run):
    write({"prompt": "w1 w2"})
    assert "1 answer was cut by max_tokens" in run("--max-tokens", 1, "--ignore-eos").err


def test_names_of_a_flag_that_is_repeated_add_up(run):
    write(*PAGES)
    assert run(*TEMPLATE, "--keep-fields", "url,title", "--keep-fields", "tags").code == 0
    assert records()["line-1"]["row"] == {"url": "https://a", "title": "One", "tags": ["x"]}
