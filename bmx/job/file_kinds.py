"""What a file is that holds no JSON lines, from its first bytes and its name, and the command that converts it.

Knows formats of files; knows nothing of rows. A file is refused only where it is certain that no row could be read.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from bmx.errors import InputFileError

# In the commands, FILE stands for the file and OUT for the one that it becomes.
_PANDAS = (
    "python3 -c \"import pandas, sys; pandas.read_%s(sys.argv[1]).to_json('OUT', orient='records', lines=True)\" FILE"
)
_ARROW_STREAM = (
    'python3 -c "import pyarrow.ipc, sys; table = pyarrow.ipc.open_stream(sys.argv[1]).read_all();'
    " table.to_pandas().to_json('OUT', orient='records', lines=True)\" FILE"
)
_CSV = (
    'python3 -c "import csv, json, sys; csv.field_size_limit(10**9);'
    " [print(json.dumps(row)) for row in csv.DictReader(open(sys.argv[1], newline='', encoding='utf-8-sig')%s)]\""
    " FILE > OUT"
)
_REPR = 'python3 -c "import ast, json, sys; [print(json.dumps(ast.literal_eval(s))) for s in sys.stdin if s.strip()]"'
_YAML = (
    'python3 -c "import json, sys, yaml; rows = yaml.safe_load(sys.stdin);'
    ' [print(json.dumps(row, default=str)) for row in (rows if isinstance(rows, list) else [rows])]" < FILE > OUT'
)
_MAGIC = (  # first bytes, what the file is, and the command
    (b"PAR1", "a Parquet file", _PANDAS % "parquet"),
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
    ("UTF-16LE", (b"{\0", b"[\0")),
    ("UTF-16BE", (b"\0{", b"\0[")),
)
_COLUMN = re.compile(r'"[^"]+"|\w[\w.-]*(?: [\w.-]+)*')
_DELIMITERS = {",": "", "\t": ", delimiter='\\t'", ";": ", delimiter=';'"}
_YAML_START = re.compile(r"---\s*$|%YAML|- +[\w-]+:(\s|$)")
_REPR_START = re.compile(r"\{\s*'(?:[^'\\]|\\.)*'\s*:")
_LIST_OR_ROW = re.compile(r'"(?:(messages|prompt|conversations|contents|params|body)"\s*:|(\w+)"\s*:\s*\[\s*\{)')


def refuse_other_kinds(start: bytes, shown: str, name: str) -> None:
    """Refuse a file that is certainly no file of JSON lines.

    Args:
        start: its first bytes, decompressed.
        shown: its name in the message.
        name: its path in the command; empty for standard input.

    Raises:
        InputFileError: says what the file is, and which command converts it.
    """
    plain = name.removesuffix(".gz").removesuffix(".zst")
    found = _binary(start) or _text(start, Path(plain).suffix.lower())
    if found is None:
        return
    what, command = found
    path = Path(plain or "in.txt")
    out = path.with_suffix("" if path.stem.endswith(".jsonl") else ".jsonl")
    if out == path or out.exists():
        out = path.with_suffix(".lines.jsonl")
    if plain != name:
        unpack = "gunzip -k" if name.endswith(".gz") else "zstd -d"
        command = f"{unpack} {shlex.quote(name)} && {command}"
    hint = command.replace("FILE", shlex.quote(str(path))).replace("OUT", shlex.quote(str(out)))
    raise InputFileError(f"{shown} is {what}, not JSON lines in UTF-8", hint=hint)


def _binary(start: bytes) -> tuple[str, str] | None:
    for magic, what, command in _MAGIC:
        if start.startswith(magic):
            return what, command
    if start.startswith(b"PK\x03\x04"):
        return _zipped(start)
    if start[257:262] == b"ustar":
        return "a tar archive", "tar -xOf FILE > OUT"
    for encoding, starts in _ENCODINGS:
        if start.startswith(starts):
            return f"a file in {encoding}", f"iconv -f {encoding} -t UTF-8 < FILE > OUT"
    return None


def _zipped(start: bytes) -> tuple[str, str]:
    """A document of an office program, or any other archive."""
    if b"xl/" in start or b"opendocument.spreadsheet" in start:
        return "a spreadsheet", _PANDAS % "excel"
    if b"word/" in start or b"opendocument.text" in start:
        return "a text document", "pandoc -t plain --wrap=none FILE | jq -cRs '{prompt: .}' > OUT"
    return "a zip archive", "unzip -p FILE > OUT"


def _text(start: bytes, suffix: str) -> tuple[str, str] | None:
    text = start.decode("utf-8", "replace").lstrip("\ufeff")
    lines = [line.strip() for line in text.split("\n", maxsplit=200)[:200]]
    first, second, third = ([line for line in lines if line] + ["", "", ""])[:3]
    if first.startswith("["):
        return _array(first, second, third, cut="\n" not in text)
    if first.startswith("{"):
        return _object(first, second, text)
    if first.lower().startswith(("<!doctype", "<html", "<?xml")):
        return "a page of HTML or XML", 'write each text as a line such as {"prompt": "..."}'
    if first and (suffix in (".yaml", ".yml") or _YAML_START.match(first)) and not second.startswith("{"):
        return "YAML", _YAML
    return _table(first, second, suffix)


def _array(first: str, second: str, third: str, *, cut: bool) -> tuple[str, str] | None:
    """A JSON array, on one line or on several. ``cut`` says that not even its first line is known to its end."""
    of_objects = re.match(r"\[\s*(\{|$)", first) is not None
    whole = _json(first) is not None
    pretty = second and not whole and (_json(second) is None or third.startswith("]"))
    if of_objects and (pretty or (whole and not second) or (cut and not whole)):
        return "a JSON array", "jq -c '.[]' FILE > OUT"
    return None


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


def _table(first: str, second: str, suffix: str) -> tuple[str, str] | None:
    """A table whose first line names the columns."""
    if not first:
        return None
    named = {".csv": ",", ".tsv": "\t", ".tab": "\t"}.get(suffix)
    for delimiter, option in _DELIMITERS.items():
        columns = first.split(delimiter)
        header = len(columns) > 1 and all(_COLUMN.fullmatch(column) for column in columns)
        rows = not second.startswith(("{", "[")) and (delimiter in second or second.startswith('"'))
        if (header and rows) or (named == delimiter and first.count(";") <= first.count(delimiter)):
            return ("TSV" if delimiter == "\t" else "CSV"), _CSV % option
    return None


def _json(text: str) -> Any:
    """The value of a text that is JSON; None for anything else."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
