"""What a file is, from its first bytes and its name: lines, an array, a table, or what bmx cannot read.

Knows formats of files; knows nothing of rows. A file is taken for something else than JSON lines only where that is
certain. One that cannot be read is refused with the command that converts it.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bmx.errors import InputFileError

ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".tab", ".parquet")  # of files that bmx reads


@dataclass(frozen=True, slots=True)
class FileKind:
    """What a file holds, and how it is read.

    Attributes:
        format: lines of JSON, one JSON array, CSV (or TSV), or Parquet.
        delimiter: between the cells of CSV.
    """

    format: Literal["lines", "array", "csv", "parquet"]
    delimiter: str = ""


LINES, ARRAY, PARQUET = FileKind("lines"), FileKind("array"), FileKind("parquet")
# In the commands, FILE stands for the file and OUT for the one that it becomes.
_PANDAS = (
    "python3 -c \"import pandas, sys; pandas.read_%s(sys.argv[1]).to_json('OUT', orient='records', lines=True)\" FILE"
)
_ARROW_STREAM = (
    'python3 -c "import pyarrow.ipc, sys; table = pyarrow.ipc.open_stream(sys.argv[1]).read_all();'
    " table.to_pandas().to_json('OUT', orient='records', lines=True)\" FILE"
)
_REPR = 'python3 -c "import ast, json, sys; [print(json.dumps(ast.literal_eval(s))) for s in sys.stdin if s.strip()]"'
_YAML = (
    'python3 -c "import json, sys, yaml; rows = yaml.safe_load(sys.stdin);'
    ' [print(json.dumps(row, default=str)) for row in (rows if isinstance(rows, list) else [rows])]" < FILE > OUT'
)
_MAGIC = (  # first bytes, what the file is, and the command
    (b"ARROW1", "an Arrow file", _PANDAS % "feather"),
    (b"\xff\xff\xff\xff", "an Arrow stream", _ARROW_STREAM),
    (b"SQLite format 3\0", "an SQLite database", "sqlite3 -json FILE 'SELECT * FROM prompts' | jq -c '.[]' > OUT"),
    (b"%PDF-", "a PDF", "pdftotext FILE - | jq -cRs '{prompt: .}' > OUT"),
    (b"BZh", "compressed with bzip2", "bzip2 -dc FILE > OUT"),
    (b"\xfd7zXZ\0", "compressed with xz", "xz -dc FILE > OUT"),
    (b"version https://git-lfs", "a pointer of Git LFS in place of the file", "git lfs pull"),
)
_ENCODINGS = (  # byte order marks, and how a file begins without one; those of UTF-32 first, which begin alike
    ("UTF-32", (b"\xff\xfe\0\0", b"\0\0\xfe\xff")),
    ("UTF-32LE", (b"{\0\0\0", b"[\0\0\0")),
    ("UTF-32BE", (b"\0\0\0{", b"\0\0\0[")),
    ("UTF-16", (b"\xff\xfe", b"\xfe\xff")),
)
_COLUMN = re.compile(r'"(?:[^"]|"")+"|\w[\w.()/%#&-]*(?: [\w.()/%#&-]+)*')
_DELIMITERS = ",\t;"
_TABLES = (".csv", ".tsv", ".tab")
SEPARATOR = re.compile('"?sep=(.)"?', re.IGNORECASE)  # how a CSV file of Excel's may begin
_YAML_START = re.compile(r"---\s*$|%YAML|- +[\w-]+:(\s|$)")
_REPR_START = re.compile(r"\{\s*'(?:[^'\\]|\\.)*'\s*:")
_LIST_OR_ROW = re.compile(r'"(?:(messages|prompt|conversations|contents|params|body)"\s*:|(\w+)"\s*:\s*\[\s*\{)')


def without_row_suffix(name: str) -> str:
    """The name of a file of rows without what says its format; any other name as it is."""
    return next((name[: -len(suffix)] for suffix in ROW_SUFFIXES if name.lower().endswith(suffix)), name)


def file_kind(start: bytes, shown: str, name: str) -> FileKind:
    """What a file holds.

    Args:
        start: its first bytes, decompressed.
        shown: its name in the message.
        name: its path; empty for standard input.

    Raises:
        InputFileError: nothing that bmx reads; says what the file is, and which command converts it.
    """
    plain = name.removesuffix(".gz").removesuffix(".zst")
    if start.startswith(b"PAR1"):
        return PARQUET
    found = _binary(start) or _text(start, Path(plain).suffix.lower())
    if isinstance(found, FileKind):
        return found
    what, command = found
    path = Path(plain or "in.txt")
    out = path.with_suffix("" if path.stem.endswith(ROW_SUFFIXES) else ".jsonl")
    if path.suffix.lower() in _TABLES:  # in another encoding
        out = path.with_suffix(f".utf-8{path.suffix}")
    elif out == path or out.exists():
        out = path.with_suffix(".lines.jsonl")
    if plain != name:
        unpack = "gunzip -k" if name.endswith(".gz") else "zstd -d"
        command = f"{unpack} {shlex.quote(name)} && {command}"
    hint = command.replace("FILE", shlex.quote(str(path))).replace("OUT", shlex.quote(str(out)))
    raise InputFileError(f"{shown} is {what}, not JSON lines or a table in UTF-8", hint=hint)


def _binary(start: bytes) -> tuple[str, str] | None:
    for magic, what, command in _MAGIC:
        if start.startswith(magic):
            return what, command
    if start.startswith(b"PK\x03\x04"):
        return _zipped(start)
    if start[257:262] == b"ustar":
        return "a tar archive", "tar -xOf FILE > OUT"
    encoding = _encoding(start)
    return (f"a file in {encoding}", f"iconv -f {encoding} -t UTF-8 < FILE > OUT") if encoding else None


def _encoding(start: bytes) -> str | None:
    """Which encoding of several bytes a letter; None for any other."""
    for encoding, starts in _ENCODINGS:
        if start.startswith(starts):
            return encoding
    first, second, third, fourth = (byte == 0 for byte in start[:4].ljust(4, b" "))
    if second and fourth and not (first or third):
        return "UTF-16LE"
    return "UTF-16BE" if first and third and not (second or fourth) else None


def _zipped(start: bytes) -> tuple[str, str]:
    """A document of an office program, or any other archive."""
    if b"xl/" in start or b"opendocument.spreadsheet" in start:
        return "a spreadsheet", _PANDAS % "excel"
    if b"word/" in start or b"opendocument.text" in start:
        return "a text document", "pandoc -t plain --wrap=none FILE | jq -cRs '{prompt: .}' > OUT"
    return "a zip archive", "unzip -p FILE > OUT"


def _text(start: bytes, suffix: str) -> FileKind | tuple[str, str]:
    text = start.decode("utf-8", "replace").lstrip("\ufeff")
    lines = [line.strip() for line in text.split("\n", maxsplit=200)[:200]]
    first, second, third = ([line for line in lines if line] + ["", "", ""])[:3]
    is_table = suffix in _TABLES
    if first.startswith("["):
        if _is_array(first, second, third, cut="\n" not in text):
            return ARRAY
        is_table = is_table and _json(first) is None
    elif first.startswith("{"):
        return _object(first, second, text) or LINES
    elif first.lower().startswith(("<!doctype", "<html", "<?xml")):
        return "a page of HTML or XML", 'write each text as a line such as {"prompt": "..."}'
    elif suffix in (".yaml", ".yml") or (not is_table and _YAML_START.match(first)):
        return ("YAML", _YAML) if first and not second.startswith("{") else LINES
    delimiter = _named_delimiter(text, first) if is_table and first else _likely_delimiter(first, second)
    return FileKind("csv", delimiter) if delimiter else LINES


def _is_array(first: str, second: str, third: str, *, cut: bool) -> bool:
    """Whether it is a JSON array, on one line or on several. ``cut``: not even its first line is known to its end."""
    of_objects = re.match(r"\[\s*(\{|\]?$)", first) is not None
    whole = _json(first) is not None
    pretty = bool(second) and not whole and (_json(second) is None or third.startswith(("]", ",")))
    return of_objects and (pretty or (whole and not second) or (cut and not whole))


def _object(first: str, second: str, text: str) -> tuple[str, str] | None:
    """JSON objects over several lines, the rows themselves or one with a list of them; or Python's dicts."""
    if _REPR_START.match(first) and (not second or _REPR_START.match(second)):
        return "a file of Python dicts", f"{_REPR} < FILE > OUT"
    continued = second.startswith(('"', "}", "]")) or (second.startswith("{") and second.endswith((",", "{")))
    if first.endswith(("{", "[", ",", ":")) and continued and _json(first) is None:
        found = _LIST_OR_ROW.search(text)
        inner = f"'.{found[2]}[]'" if found and found[2] else "."
        return "JSON that spans lines", f"jq -c {inner} FILE > OUT"
    return None


def _named_delimiter(text: str, first: str) -> str:
    """The delimiter of a table that is called one: what its first line names, or what cuts its header best."""
    named = SEPARATOR.match(text)
    if named:
        return named[1]
    header = first.splitlines()[0]
    return "\t" if "\t" in header else max(",;", key=lambda delimiter: _columns(header, delimiter))


def _columns(header: str, delimiter: str) -> int:
    import csv

    return len(next(csv.reader([header], delimiter=delimiter)))


def _likely_delimiter(first: str, second: str) -> str | None:
    """The delimiter of a text that is certainly a table: its first line is nothing but names, and the next is cells."""
    named = SEPARATOR.fullmatch(first)
    if named:
        return named[1]
    for delimiter in _DELIMITERS:
        columns = first.split(delimiter)
        header = len(columns) > 1 and all(_COLUMN.fullmatch(column) for column in columns)
        if header and not second.startswith(("{", "[")) and (delimiter in second or second.startswith('"')):
            return delimiter
    return None


def _json(text: str) -> Any:
    """The value of a text that is JSON; None for anything else."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
