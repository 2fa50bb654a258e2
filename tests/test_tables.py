"""Rows of JSON arrays, CSV, TSV and Parquet are rows like those of JSON lines."""

from __future__ import annotations

import csv
import datetime as dt
import gzip
import io
import json
import sys
import tracemalloc
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from bmx.errors import InputFileError
from bmx.job.input_rows import InputRow, Reader

ROWS = [
    {"id": "a1", "prompt": 'Name a bird,\n"please"; thanks'},
    {"id": "a2", "prompt": "Größe"},
    {"id": "a3", "prompt": "Name a\ttown."},
]
MARK = b"\xef\xbb\xbf"


def as_csv(delimiter: str = ",", line_end: str = "\n", rows: list[dict[str, Any]] = ROWS) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator=line_end)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(table: Any, group: int = 2) -> bytes:
    file = io.BytesIO()
    parquet.write_table(table, file, row_group_size=group)
    return file.getvalue()


def as_lines(rows: list[Any] = ROWS) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


PARQUET = as_parquet(pa.Table.from_pylist(ROWS))
TABLES = {
    "in.csv": as_csv(),
    "windows.csv": MARK + as_csv(line_end="\r\n"),
    "old mac.csv": as_csv(line_end="\r"),
    "semicolons.csv": as_csv(";"),
    "tabs.csv": as_csv("\t"),
    "excel.csv": MARK + b"sep=;\r\n" + as_csv(";", "\r\n"),
    "IN.CSV": as_csv(),
    "in.tsv": as_csv("\t"),
    "in.tab": as_csv("\t"),
    "table.txt": as_csv(),
    "table.jsonl": as_csv(";"),
    "lines.csv": as_lines(),
    "lines.json": as_lines(),
    "in.json": json.dumps(ROWS).encode(),
    "pretty.json": json.dumps(ROWS, indent=2).encode(),
    "marked.json": MARK + json.dumps(ROWS, ensure_ascii=False).encode(),
    "rows of lines.json": b"[" + b",\n".join(as_lines().strip().split(b"\n")) + b"]",
    "leading commas.json": b"[\n" + b"\n,".join(as_lines().strip().split(b"\n")) + b"\n]\n",
    "array.jsonl": json.dumps(ROWS).encode(),
    "in.parquet": PARQUET,
    "parquet": PARQUET,
}


def rows_of(content: bytes, name: str = "in.csv", **options: Any) -> list[InputRow]:
    Path(name).write_bytes(content)
    return list(Reader(paths=(Path(name),), **options).rows())


def refused(content: bytes, name: str = "in.csv") -> str:
    with pytest.raises(InputFileError) as error:
        rows_of(content, name)
    assert "\n" not in error.value.message + str(error.value.hint)
    return f"{error.value.message} ({error.value.hint})"


def errors(rows: list[InputRow]) -> dict[Any, str]:
    return {row.id: f"{row.error.code}: {row.error.message}" for row in rows if row.error}


def table_of(**columns: Any) -> bytes:
    return as_parquet(pa.table(columns))


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", TABLES)
def test_d8_a_table_has_the_rows_that_its_lines_would_be(name):
    rows, lines = rows_of(TABLES[name], name), rows_of(as_lines(), "in.jsonl")
    assert [row.request for row in rows] == [row.request for row in lines]
    assert [(row.line, row.key) for row in rows] == [(row.line, row.key) for row in lines]


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
@pytest.mark.parametrize("name", ["in.csv", "in.tsv", "pretty.json", "in.parquet", "table.txt"])
def test_d8_a_compressed_table_too(name, suffix, pack):
    assert [row.id for row in rows_of(pack(TABLES[name]), name + suffix)] == ["a1", "a2", "a3"]


@pytest.mark.parametrize("name", ["in.csv", "in.json", "in.parquet"])
def test_d8_a_compressed_table_that_ends_too_early_is_refused(name):
    noise = b"".join(b"%d," % (number**5) for number in range(3000))  # more than a block that is unpacked at once
    content = PARQUET + noise if "parquet" in name else TABLES[name][:-1] + noise
    assert f"cannot read {name}.gz" in refused(gzip.compress(content)[:-500], f"{name}.gz")


@pytest.mark.parametrize(
    ("name", "output"),
    [
        *(("in.csv", "in"), ("in.tsv.gz", "in"), ("in.json", "in"), ("in.parquet", "in"), ("in.jsonl.gz", "in")),
        *(("IN.CSV", "IN"), ("in.txt", "in.txt"), ("in.csv.json", "in.csv")),
    ],
)
def test_d8_the_output_of_a_table_stands_beside_it(bmx, name, output):
    pack = gzip.compress if name.endswith(".gz") else bytes
    Path(name).write_bytes(pack(PARQUET if "parquet" in name else as_lines()))
    assert bmx("run", name, "-m", "fake").code == 0
    assert Path(f"{output}.out.jsonl").exists()


@pytest.mark.parametrize("name", ["in.csv", "in.json", "in.parquet", "semicolons.csv"])
def test_d8_a_table_may_come_from_standard_input(bmx, name):
    assert bmx("run", "-", "-o", "out.jsonl", "-m", "fake", stdin=TABLES[name]).code == 0
    assert Path("out.jsonl").read_text().count("row_hash") == 3


def test_d8_names_of_columns_may_have_units_and_doubled_quotes(bmx):
    table = b'Price (EUR);"The ""full"" text";R&D %\n17;"a\nb";4\n'
    ended = bmx("run", "-", "-o", "-", "-m", "fake", "--prompt-template", '{The "full" text}', stdin=table)
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("name", ["in.csv", "pretty.json", "in.parquet"])
def test_d8_a_run_of_a_table_goes_on_in_any_order_and_in_any_format(bmx, name):
    Path(name).write_bytes(TABLES[name])
    assert bmx("run", name, "-m", "fake", "-o", "out.jsonl", "--limit", 2).code == 0
    before = Path("out.jsonl").read_text()
    assert before.count("\n") == 2
    Path("in.jsonl").write_bytes(as_lines(ROWS[::-1]))
    assert bmx("run", "in.jsonl", "-m", "fake", "-o", "out.jsonl").code == 0
    assert Path("out.jsonl").read_text().startswith(before)
    assert Path("out.jsonl").read_text().count("\n") == 3


def test_d8_rows_of_a_table_are_shared_and_answered_again_by_their_places(bmx):
    Path("in.csv").write_bytes(b"prompt,max_tokens\na,1\nb,many\nc,1\nd,1\n")
    assert bmx("run", "in.csv", "-m", "fake", "--shard", "2/2").code == 3
    output = Path("in.2-of-2.out.jsonl")
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == ["line-4"]
    Path("in.csv").write_bytes(b"prompt,max_tokens\na,1\nb,1\nc,1\nd,1\n")
    assert bmx("run", "in.csv", "-m", "fake", "--shard", "2/2", "--retry-failed").code == 0
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == ["line-4", "line-2"]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"id,prompt\n", b"id,prompt\n\n", b"[]", b"[\n]\n"])
def test_d8_a_table_without_rows_has_none(content):
    assert rows_of(content, "in.json" if content.startswith(b"[") else "in.csv") == []


# CSV


def test_d8_an_empty_cell_is_empty_text_and_no_value_for_what_is_asked():
    content = b"id,prompt,max_tokens,temperature,stop,custom_id\n,hello,,,,\n,again,5,0.5,x,c\n"
    first, second = rows_of(content)
    assert first.id == "line-1"
    assert first.request.params == Reader(paths=()).defaults
    assert second.id == "c"
    assert (second.request.params.max_tokens, second.request.params.temperature) == (5, 0.5)
    filled, _ = rows_of(content, template="[{stop}] {prompt}", keep=("all",))
    assert filled.request.prompt == "[] hello"
    assert filled.kept["stop"] == ""


def test_d8_a_row_with_other_cells_than_the_header_fails_alone():
    rows = rows_of(b'id,prompt\na,b,c\nd\n\ne,"f"\n')
    assert errors(rows) == {
        "line-1": "invalid_request: line 1: the row has 3 cells, the header 2 (a cell with ',' in it needs quotes)",
        "line-2": "invalid_request: line 2: the row has 1 cell, the header 2",
    }
    assert rows[2].id == "e"


def test_d8_a_row_whose_quotes_are_not_doubled_fails_alone():
    rows = rows_of(b'id,prompt\na,"say \\"hi\\""\nb,5" of rain\nc,"d\ne,"f\ng,"h ""i"" "\n')
    assert [row.id for row in rows] == ["line-1", "b", "line-3", "g"]
    assert "line 1: wrong quotes: ',' expected after '\"' (a quote within" in rows[0].error.message
    assert "line 3: wrong quotes over 2 lines" in rows[2].error.message
    assert rows[3].request.prompt == 'h "i" '
    assert "the header of in.csv cannot be read (wrong quotes" in refused(b'id,"a"b\n1,2\n')


def test_d8_a_row_that_is_not_utf_8_fails_alone():
    bad, good = rows_of("id,prompt\na,Größe\nb,ok\n".encode("latin-1"))
    assert "byte 0xf6 is not UTF-8" in bad.error.message
    assert "iconv" in bad.error.message
    assert good.request.prompt == "ok"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"id,prompt,id", "two columns of in.csv are called 'id'"),
        (b"id, id", "two columns of in.csv are called 'id'"),
        (b",,", "in.csv has no header: its first row begins with ''"),
        (b"1,2.5", "in.csv has no header: its first row begins with '1'"),
        (b"a," + 300 * b"x", "in.csv has no header"),
        ("id,Größe".encode("latin-1"), "the header of in.csv is not in UTF-8 (iconv"),
    ],
)
def test_d8_a_header_that_names_no_columns_is_refused(header, message):
    assert message in refused(header + b"\n1,2,3\n")


def test_d8_a_column_without_a_name_is_called_as_pandas_calls_it():
    [row] = rows_of(b",prompt,\n7,Say hello,x\n", keep=("all",))
    assert row.kept == {"Unnamed: 0": "7", "prompt": "Say hello", "Unnamed: 2": "x"}


def test_d8_a_cell_that_never_ends_is_refused_and_its_row_named():
    assert "ends within a quoted cell that begins in row 2 (is a quote missing?" in refused(b'id,p\na,b\nc,"d\ne,f\n')
    assert "begins in the header" in refused(b'id,"p\na,b\n')


@pytest.mark.parametrize("long", [b"x" * 300, b'"' + b'x "" \r\n,' * 50 + b'"', b'"' + b"x" * 300 + b'"'])
def test_d8_a_row_that_is_too_long_fails_alone(long):
    rows = rows_of(b"id,prompt\na,b\nc," + long + b"\nd,e\n", longest=100)
    assert errors(rows) == {"line-2": "invalid_request: the line is longer than 100 bytes (--max-line-bytes)"}
    assert [row.id for row in rows] == ["a", "line-2", "d"]


def test_d8_a_huge_cell_takes_no_more_memory_than_is_allowed():
    content = b'id,prompt\na,"' + b"some words\n" * 100_000 + b'"\nb,c\n'
    Path("in.csv").write_bytes(content)
    tracemalloc.start()
    rows = list(Reader(paths=(Path("in.csv"),), longest=10_000).rows())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [row.id for row in rows] == ["line-1", "b"]
    assert peak < len(content) / 2


def test_d8_cells_longer_than_pythons_own_limit_are_read():
    [row] = rows_of(b"id,prompt\na," + b"x" * 200_000 + b"\n")
    assert len(row.request.prompt) == 200_000


# JSON arrays


def test_d8_an_item_that_is_no_row_fails_alone():
    items = '{"prompt": "a"}, {"prompt": "b", "prompt": "c"}, {"prompt": "d", "x": [{"y": 1, "y": 2}]}, 5, "x", null'
    rows = rows_of(f'[{items}, {{"prompt": "e", "x": 1e999}}, {{"prompt": "f"}}]'.encode(), "in.json")
    assert {name: text.partition(": ")[2] for name, text in errors(rows).items()} == {
        "line-2": "line 2: a key occurs twice",
        "line-3": "line 3: a key occurs twice",
        "line-4": "line 4 is not a JSON object",
        "line-5": "line 5 is not a JSON object",
        "line-6": "line 6 is not a JSON object",
        "line-7": "line 7: Infinity is not JSON",
    }


def test_d8_numbers_of_an_array_are_those_of_lines():
    text = '{"prompt": "a", "n": [1, -0.5, 1.10, 1e5, 123456789012345678901234567890]}'
    [row], [line] = rows_of(f"[{text}]".encode(), "in.json", keep=("n",)), rows_of(text.encode(), "l", keep=("n",))
    assert row.kept == line.kept


@pytest.mark.parametrize("half", [r"\ud83d", r"\ude00", r"\ud83d\u0041", r"\\\ud83d", r"\ude00\ud83d"])
def test_d8_half_a_surrogate_pair_fails_its_item_alone(half):
    whole = r"\ud83d\ude00 \\ud83d \u00e9 \ufdd1"
    good, bad = rows_of(rf'[{{"prompt": "{whole}"}}, {{"prompt": "x{half}"}}]'.encode(), "in.json")
    assert good.request.prompt == "\U0001f600 \\ud83d é \ufdd1"
    assert "half a surrogate pair" in bad.error.message


def test_d8_pairs_of_an_array_are_read_wherever_a_block_of_the_file_ends():
    texts = [("x" * length) + "\U0001f600" * 5000 for length in range(12)]
    rows = rows_of(json.dumps([{"prompt": text} for text in texts]).encode(), "in.json")
    assert [row.request.prompt for row in rows] == texts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"prompt": "a"}, {"prompt": "b', "in.json cannot be read after its row 1"),
        ('[{"prompt": "a"}, {"prompt": NaN}]', "Strict JSON is in UTF-8 and has no NaN"),
        ('[{"prompt": "a"},\n] x', "cannot be read after its row 1"),
        ('[{"prompt": "a"},\n{"prompt": "Größe"}]', "invalid bytes in UTF8"),
    ],
)
def test_d8_a_damaged_array_is_refused(text, message):
    assert message in refused(text.encode("latin-1"), "in.json")


@pytest.mark.parametrize("text", ['["a", "b"]\n["c"]', '["a", "b"]', "[1]", '[{"prompt": "a"}]\n{"prompt": "b"}'])
def test_d8_lines_that_are_arrays_stay_lines(text):
    rows = rows_of(text.encode(), "in.jsonl")
    assert rows[0].error.message == "line 1 is not a JSON object"
    assert len(rows) == 1 + text.count("\n")


# Parquet


def test_d8_values_of_parquet_that_json_lacks_become_text_or_null():
    second = dt.datetime(2024, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
    [row] = rows_of(
        table_of(
            prompt=["a"],
            id=[7],
            day=[second.date()],
            time=pa.array([second], pa.timestamp("ns", "UTC")),
            nested=pa.array([[{"t": 1001}]], pa.list_(pa.struct([("t", pa.timestamp("ns"))]))),
            clock=pa.array([1001], pa.time64("ns")),
            price=[Decimal("12.50")],
            text=[b"abc"],
            bytes=[b"\xff\xfe"],
            numbers=[[1.5, float("nan"), float("inf")]],
            map=pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
            kind=pa.array(["x"]).dictionary_encode(),
            none=pa.nulls(1),
        ),
        keep=("all",),
    )
    assert row.id == 7
    assert row.kept == {
        "prompt": "a",
        "id": 7,
        "day": "2024-01-02",
        "time": "2024-01-02T03:04:05+00:00",
        "nested": [{"t": "1970-01-01T00:00:00.000001"}],
        "clock": "00:00:00.000001",
        "price": "12.50",
        "text": "abc",
        "bytes": "//4=",
        "numbers": [1.5, None, None],
        "map": {"k": 1},
        "kind": "x",
        "none": None,
    }


def test_d8_a_value_of_parquet_that_cannot_be_read_fails_its_row_alone():
    texts = pa.Array.from_buffers(
        pa.string(),
        3,
        [None, pa.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0])), pa.py_buffer(b"a\xffb")],
    )
    good, bad, last = rows_of(table_of(prompt=texts))
    assert "can't decode byte 0xff" in bad.error.message
    assert (good.request.prompt, last.request.prompt) == ("a", "b")


def test_d8_a_long_row_of_parquet_or_of_an_array_fails_alone():
    rows = [{"prompt": "a"}, {"prompt": "x" * 200}, {"prompt": "b"}]
    for name, content in (("p", as_parquet(pa.Table.from_pylist(rows))), ("j", json.dumps(rows).encode())):
        read = rows_of(content, name, longest=100)
        assert errors(read) == {"line-2": "invalid_request: the line is longer than 100 bytes (--max-line-bytes)"}


def test_d8_a_damaged_parquet_file_is_refused():
    assert "the Parquet file in.csv cannot be read after its row 0" in refused(PARQUET[:-30])
    twice = pa.table([pa.array([1]), pa.array([2])], names=["a", "a"])
    assert "two columns of in.csv are called 'a'" in refused(as_parquet(twice))


def test_d8_without_pyarrow_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow, or bmx-llm[parquet]" in refused(PARQUET, "in.parquet")


# Memory


@pytest.mark.parametrize("kind", ["csv", "array", "parquet"])
def test_d8_a_table_takes_no_more_memory_when_it_is_longer(kind):
    rows = [{"id": f"r{number}", "prompt": f"{number} " + "some words " * 100} for number in range(4000)]
    content = {
        "csv": lambda: as_csv(rows=rows),
        "array": lambda: json.dumps(rows).encode(),
        "parquet": lambda: as_parquet(pa.Table.from_pylist(rows), 1000),
    }[kind]()
    Path("in.csv").write_bytes(content)
    tracemalloc.start()
    assert sum(1 for _ in Reader(paths=(Path("in.csv"),)).rows()) == len(rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_500_000
