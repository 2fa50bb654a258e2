"""Files without lines or a table are refused as a whole, in one line: what they are, and how to convert them."""

from __future__ import annotations

import csv
import gzip
import io
import json
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import zstandard

from bmx.errors import InputFileError
from bmx.job.input_rows import Reader

ROWS = [{"id": "a1", "prompt": 'Name a bird,\n"please"; thanks'}, {"id": "a2", "prompt": "Größe"}]
LINES = [json.dumps(row) for row in ROWS]


def table(delimiter: str, mark: bytes = b"") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["id", "prompt"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return mark + text.getvalue().encode()


def zipped(name: str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(name, "x")
    return packed.getvalue()


def pretty(value: object) -> bytes:
    return json.dumps(value, indent=2).encode()


KINDS = {
    "object.json": (pretty(ROWS[0]), "JSON that spans lines", "jq -c . object.json > object.jsonl"),
    "of one row.json": (pretty(ROWS[0]), "JSON that spans lines", "'of one row.json' > 'of one row.jsonl'"),
    "object.jsonl": (pretty(ROWS[0]), "JSON that spans lines", "jq -c . object.jsonl > object.lines.jsonl"),
    "objects.json": (b"\n".join(map(pretty, ROWS)), "JSON that spans lines", "jq -c . "),
    "messages.json": (pretty({"messages": [{"role": "user"}]}), "JSON that spans lines", "jq -c . "),
    "inner.json": (pretty({"version": 1, "rows": ROWS}), "JSON that spans lines", "jq -c '.rows[]' "),
    "dicts.txt": ("\n".join(map(repr, ROWS)).encode(), "a file of Python dicts", "ast.literal_eval"),
    "in.yaml": (b"id: a\nprompt: x\n", "YAML", "yaml.safe_load"),
    "list.txt": (b"- id: a\n  prompt: x\n", "YAML", "yaml.safe_load"),
    "page.jsonl": (b"<!DOCTYPE html>\n<html>", "a page of HTML or XML", "prompt"),
    "page.csv": (b"<!DOCTYPE html>\n<html>", "a page of HTML or XML", "prompt"),
    "wide.csv": (table("\t").decode().encode("utf-16"), "a file in UTF-16", "< wide.csv > wide.utf-8.csv"),
    "little.csv": (table(";").decode().encode("utf-16-le"), "a file in UTF-16LE", "iconv -f UTF-16LE"),
    "big.csv": (table(";").decode().encode("utf-16-be"), "a file in UTF-16BE", "iconv -f UTF-16BE"),
    "pointer.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid x\n", "a pointer of Git LFS", "git lfs pull"),
    "in.arrow": (b"ARROW1\0\0", "an Arrow file", "pandas.read_feather"),
    "stream.arrow": (b"\xff\xff\xff\xff\x10\0", "an Arrow stream", "pyarrow.ipc.open_stream"),
    "in.xlsx": (zipped("xl/workbook.xml"), "a spreadsheet", "pandas.read_excel"),
    "in.docx": (zipped("word/document.xml"), "a text document", "pandoc"),
    "in.zip": (zipped("in.jsonl"), "a zip archive", "unzip -p in.zip > in.jsonl"),
    "in.db": (b"SQLite format 3\0", "an SQLite database", "sqlite3 -json"),
    "in.pdf": (b"%PDF-1.7\n", "a PDF", "pdftotext"),
    "in.jsonl.xz": (b"\xfd7zXZ\0", "compressed with xz", "xz -dc in.jsonl.xz > in.jsonl"),
    "in.csv.xz": (b"\xfd7zXZ\0", "compressed with xz", "xz -dc in.csv.xz > in.csv"),
    "in.jsonl.bz2": (b"BZh91AY", "compressed with bzip2", "bzip2 -dc"),
}


def refusal(path: Path) -> InputFileError:
    with pytest.raises(InputFileError) as refused:
        list(Reader(paths=(path,)).rows())
    assert "\n" not in refused.value.message + str(refused.value.hint)
    return refused.value


@pytest.mark.parametrize(("name", "content", "what", "command"), [(n, *kind) for n, kind in KINDS.items()], ids=KINDS)
def test_d5_a_file_of_another_kind_is_called_what_it_is(tmp_path, monkeypatch, name, content, what, command):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    refused = refusal(Path(name))
    assert refused.message.startswith(f"{name} is {what}")
    assert command in refused.hint


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
@pytest.mark.parametrize("name", ["object.json", "dicts.txt", "in.arrow"])
def test_d5_a_compressed_file_of_another_kind_too(tmp_path, monkeypatch, name, suffix, pack):
    monkeypatch.chdir(tmp_path)
    content, what, _ = KINDS[name]
    path = Path(name + suffix)
    path.write_bytes(pack(content))
    refused = refusal(path)
    assert refused.message.startswith(f"{path} is {what}")
    assert f"{path} && " in refused.hint


@pytest.mark.parametrize("name", ["object.json", "dicts.txt", "in.arrow", "wide.csv"])
def test_d5_standard_input_of_another_kind_ends_with_5_before_the_model_is_loaded(bmx, name):
    content, what, _ = KINDS[name]
    ended = bmx("run", "-", "-o", "out.jsonl", "-m", "fake", stdin=content)
    assert ended.code == 5
    assert f"standard input is {what}" in ended.err
    assert "loading" not in ended.err
    assert not Path("out.jsonl").exists()


@pytest.mark.parametrize("name", ["dicts.txt", "wide.csv", "little.csv", "big.csv"])
def test_d5_the_command_converts_the_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(KINDS[name][0])
    command = refusal(Path(name)).hint.replace("python3", shlex.quote(sys.executable), 1)
    subprocess.run(["sh", "-c", command], check=True)
    [converted] = set(tmp_path.iterdir()) - {tmp_path / name}
    rows = list(Reader(paths=(converted,)).rows())
    assert [row.id for row in rows] == ["a1", "a2"]
    assert [row.request.prompt.replace("\r", "") for row in rows] == [row["prompt"] for row in ROWS]


def test_d5_the_command_writes_over_no_file_that_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("object.json").write_bytes(KINDS["object.json"][0])
    Path("object.jsonl").touch()
    assert refusal(Path("object.json")).hint.endswith("> object.lines.jsonl")


@pytest.mark.parametrize(
    "first",
    [
        *("[", "[1, 2]", '[{"id": 1}]', '["a"', "{", '{"id": 1,', '{"data": [', "{'id': 1}", "id,prompt", "a\tb"),
        *("- id: 1", "---", "id: 1", "null", "5", '"text"', "Hello, world", "PAR", "BZ", "<", "}"),
    ],
)
def test_d5_a_single_bad_line_before_good_ones_is_an_error_of_its_row_alone(tmp_path, first):
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join([first, *LINES]) + "\n")
    bad, *good = Reader(paths=(path,)).rows()
    assert bad.error is not None
    assert [row.id for row in good] == ["a1", "a2"]
    assert all(row.request for row in good)


# Outputs in place of inputs

ANSWERS = {
    "bmx": {"id": "a", "text": "x", "finish_reason": "stop", "row_hash": "0" * 16},
    "bmx error": {"id": "a", "error": {"code": "timeout", "message": "x"}, "row_hash": "0" * 16},
    "openai": {"id": "batch_req_1", "custom_id": "a", "response": {"body": {}}, "error": None},
    "anthropic": {"custom_id": "a", "result": {"type": "succeeded", "message": {}}},
    "gemini": {"key": "a", "response": {"candidates": []}},
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_d5_an_output_in_place_of_an_input_is_refused_as_a_whole(bmx, answer, count):
    rows = [json.loads(json.dumps(answer).replace('"a"', f'"a{n}"')) for n in range(count)]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = bmx("run", "in.jsonl", "-m", "fake")
    assert ended.code == 5
    assert "the input holds answers" in ended.err
    assert "loading" not in ended.err


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_d5_a_single_answer_among_prompts_is_an_error_of_its_row(tmp_path, answer):
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join([json.dumps(answer), *LINES]))
    bad, *good = Reader(paths=(path,)).rows()
    assert "an answer of an earlier run" in bad.error.message
    assert all(row.request for row in good)
    assert len(list(Reader(paths=(path,)).identities())) == 3


def test_d5_answers_may_be_the_data_of_a_template(bmx):
    Path("in.jsonl").write_text(json.dumps(ANSWERS["bmx"]) + "\n")
    assert bmx("run", "in.jsonl", "-m", "fake", "--prompt-template", "Shorten: {text}").code == 0
