"""The command, end to end, on a tiny model in a folder: files in, files out, exit codes, and what the terminal says."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import Ended, answers, as_requests, random_prompts, tiny_engine, words

FEW = random_prompts((5, 30, 17, 23, 9))
PLAIN = ("--progress", "plain")


@pytest.fixture
def run(bmx, model):
    """``bmx run`` with the tiny model, in float32."""

    def call(*args: Any, stdin: bytes = b"") -> Ended:
        return bmx("run", "--model", model, "--dtype", "float32", *args, stdin=stdin)

    return call


def jsonl(*rows: Any) -> str:
    """Lines of a file: text as it is, anything else as JSON."""
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def write(*rows: Any, to: str = "in.jsonl") -> Path:
    """An input file in the current folder."""
    Path(to).write_text(jsonl(*rows), encoding="utf-8")
    return Path(to)


def row(name: Any = "a", prompt: str = "w3 w4", **fields: Any) -> dict[str, Any]:
    """A row with a short answer."""
    return {"id": name, "prompt": prompt, "max_tokens": 3, **fields}


def records(text: str | Path) -> dict[Any, dict[str, Any]]:
    """Output records by id; every line must be whole and strict JSON, every id there once."""
    text = text.read_text(encoding="utf-8") if isinstance(text, Path) else text
    *lines, rest = text.split("\n")
    assert rest == ""
    found = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    by_id = {record["id"]: record for record in found}
    assert len(by_id) == len(found)
    return by_id


def folder() -> dict[str, bytes | None]:
    """What the current folder holds."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


# Answers


def test_every_row_is_answered_as_the_library_answers_it(run):
    source = write(*(row(str(i), words(prompt), max_tokens=8) for i, prompt in enumerate(FEW)))
    assert run(source, "--kv-format", "model", "--chunk-size", 7, "--max-num-seqs", 3).code == 0
    expected = answers(tiny_engine("llama", chunk_size=7), as_requests(FEW, max_tokens=8))
    found = records(Path("in.out.jsonl"))
    assert {name: record["text"] for name, record in found.items()} == {i: words(ids) for i, ids in expected.items()}
    for name, record in found.items():
        assert record["finish_reason"] == "length"
        assert record["usage"] == {"prompt_tokens": len(FEW[int(name)]), "completion_tokens": 8}
        assert record["kv"]["evicted"] == 0


def test_a_small_budget_evicts_and_says_so(run):
    source = write(row("long", words(FEW[1])), row("short", words(FEW[0])))
    assert run(source, "-o", "out.jsonl", "--kv-budget", 16, "--kv-recent", 4, "--chunk-size", 8).code == 0
    found = records(Path("out.jsonl"))
    assert found["long"]["kv"] == {"budget": 16, "kept": 16, "evicted": 16, "format": "int8/int4"}
    assert found["short"]["kv"]["evicted"] == 0


def test_bad_rows_become_error_records_and_exit_code_3(run):
    source = write(
        row("good"),
        "not JSON",
        {"id": "chat", "messages": [{"role": "user", "content": "w1"}]},
        row("long", words(range(3, 23))),
        row("hot", temperature=-1),
        row(7),
    )
    ended = run(source, "-o", "out.jsonl", "--max-model-len", 20)
    assert ended.code == 3
    assert "4 failed" in ended.err
    assert "4 rows failed: 2 invalid_request, 1 invalid_json, 1 context_length_exceeded; see out.jsonl" in ended.err
    assert set(records(Path("out.jsonl"))) == {"good", 7}
    failed = records(Path("out.jsonl.errors.jsonl"))
    assert {name: record["error"]["code"] for name, record in failed.items()} == {
        "line-2": "invalid_json",
        "chat": "invalid_request",
        "long": "context_length_exceeded",
        "hot": "invalid_request",
    }


def test_an_absurd_number_in_one_row_does_not_stop_the_others(run):
    rows = [row(i, temperature=1.0, **{name: 10**400}) for i, name in enumerate(("top_k", "max_tokens", "seed"))]
    assert run(write(*rows, row("good")), "-o", "out.jsonl").code in (0, 3)
    found = records(Path("out.jsonl"))
    assert list(found["good"]) == ["id", "text", "finish_reason", "usage", "kv", "truncated", "row_hash"]
    assert set(found) | set(records(Path("out.jsonl.errors.jsonl"))) == {0, 1, 2, "good"}


@pytest.mark.parametrize("lines", [(), ("", "  ")])
def test_a_file_without_rows_gives_an_empty_output(run, lines):
    ended = run(write(*lines), "-o", "out.jsonl")
    assert ended.code == 0
    assert "no rows" in ended.err
    assert Path("out.jsonl").read_bytes() == b""


def test_several_inputs_and_a_limit(run):
    first, second = write(row("a"), row("b"), to="1.jsonl"), write(row("c"), row("d"), to="2.jsonl")
    assert run(first, second, "--limit", 3, "-o", "out.jsonl").code == 0
    assert set(records(Path("out.jsonl"))) == {"a", "b", "c"}


def test_a_template_typed_in_a_shell_has_its_line_breaks(run):
    ended = run(
        write({"id": "a", "document": "w4"}), "--prompt-template", r"w3\n{document}", "--max-tokens", 1, "-o", "-"
    )
    assert records(ended.out)["a"]["usage"]["prompt_tokens"] == 2


# Standard input and output


def test_from_stdin_to_stdout_with_nothing_else_in_it(run):
    ended = run("-", "-o", "-", *PLAIN, stdin=jsonl(row("a"), row("b")).encode())
    assert ended.code == 0
    assert set(records(ended.out)) == {"a", "b"}
    assert "2 of 2 rows" in ended.err
    assert folder() == {}


def test_stdin_without_an_output_is_a_usage_error(run):
    ended = run("-", stdin=jsonl(row()).encode())
    assert ended.code == 2
    assert "output" in ended.complaint[0]


# Files that are in the way


def test_an_existing_output_is_refused_and_untouched(run):
    source = write(row())
    Path("out.jsonl").write_text("precious")
    ended = run(source, "-o", "out.jsonl")
    assert ended.code == 2
    assert "out.jsonl exists" in ended.complaint[0]
    assert "--overwrite" in ended.complaint[1]
    assert Path("out.jsonl").read_text() == "precious"


def test_an_existing_output_is_replaced_when_asked_for(run):
    assert run(write(row("old")), "-o", "out.jsonl").code == 0
    assert run(write(row()), "-o", "out.jsonl", "--overwrite").code == 0
    assert set(records(Path("out.jsonl"))) == {"a"}


@pytest.mark.parametrize("link", [None, Path.symlink_to, Path.hardlink_to], ids=["same", "symlink", "hard link"])
@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)], ids=["", "overwrite"])
def test_an_output_that_is_an_input_is_refused(run, link, overwrite):
    source, other = write(row()), write(row("b"), to="other.jsonl")
    before = source.read_bytes()
    output = Path("out.jsonl") if link else Path(".") / "." / "in.jsonl"
    if link:
        link(output, source)
    ended = run(other, source, "-o", output, *overwrite)
    assert ended.code == 2
    assert "also an input" in ended.complaint[0]
    assert source.read_bytes() == before


def test_a_dry_run_shows_the_plan_and_writes_nothing(run):
    source = write(row())
    before = folder()
    ended = run(source, "--dry-run", *PLAIN)
    assert (ended.code, ended.out) == (0, "")
    assert re.search(r"slots: 1 .*memory: .* MB", ended.err, re.DOTALL)
    assert folder() == before


@pytest.mark.parametrize(
    ("code", "args", "said"),
    [
        (2, ["in.jsonl", "--no-such-flag"], "--no-such-flag"),
        (2, [], "INPUT"),
        (2, ["in.jsonl", "--max-tokens", "many"], "max_tokens"),
        (2, ["in.jsonl", "--max-tokens", "0"], "max_tokens"),
        (2, ["in.jsonl", "--memory-limit", "much"], "memory_limit"),
        (2, ["in.jsonl", "--kv-policy", "magic"], "kv_policy"),
        (2, ["in.jsonl", "--kv-budget", "8"], "kv_budget"),
        (2, ["in.jsonl", "--prompt-template", "{a"], "prompt_template"),
        (2, ["in.jsonl", "--config", "missing.yaml"], "missing.yaml"),
        (2, ["in.jsonl", "-o", "."], "folder"),
        (2, ["in.jsonl", "-o", "missing/out.jsonl"], "missing"),
        (5, ["missing.jsonl"], "missing.jsonl"),
        (5, ["in.jsonl", "missing.jsonl"], "missing.jsonl"),
        (5, ["."], "folder"),
        (5, ["twice.jsonl"], "'[/b]', '1'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_job_that_cannot_start_ends_before_the_model_is_loaded(bmx, code, args, said):
    write(row())
    write(row("[/b]"), row(1), row("[/b]"), row("1"), to="twice.jsonl")
    before = folder()
    args = args if "-o" in args else [*args, "-o", "out.jsonl"]
    ended = bmx("run", *args, "--model", "./no-such-model")
    assert ended.code == code
    assert said in ended.err
    assert "no-such-model" not in ended.err
    assert ended.out == ""
    assert folder() == before


def test_a_full_disk_stops_the_run_with_the_name_of_the_file(run):
    ended = run(write(row()), "-o", "/dev/full", "--overwrite", "--progress", "none")
    assert ended.code == 1
    assert "/dev/full: No space left" in ended.complaint[0]


# Models and memory


@pytest.mark.parametrize("name", ["nobody/no-such-model", "./no-such-model", ".", "no-such-model.gguf"])
def test_an_unknown_model_is_one_line_and_a_hint(bmx, name):
    ended = bmx("run", write(row()), "--model", name)
    assert ended.code == 1
    assert name.removeprefix(".") in ended.complaint[0]
    assert not Path("in.out.jsonl").exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("share", [0, 0.5])
def test_a_model_that_was_copied_in_part_is_one_line_and_a_hint(bmx, model, file, share):
    broken = Path(shutil.copytree(model, "broken"), file)
    whole = broken.read_bytes()
    broken.write_bytes(whole[: int(len(whole) * share)])
    ended = bmx("run", write(row()), "--model", "broken")
    assert ended.code == 1
    assert "cannot load model broken" in ended.complaint[0] or f"cannot read broken/{file}" in ended.complaint[0]


def test_too_little_memory_says_how_much_is_missing(run):
    ended = run(write(row()), "--memory-limit", "2M")
    assert ended.code == 4
    numbers = [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) MB", ended.complaint[0])]
    needed, _, limit, missing = numbers  # and the weights' share of it
    assert limit == 2
    assert abs(needed - limit - missing) <= 1
    assert f"--memory-limit {needed}M" in ended.complaint[1]
    assert not Path("in.out.jsonl").exists()


# Settings


def test_flags_win_over_the_environment_over_the_config_file(bmx, model, monkeypatch):
    source = write({"id": "a", "prompt": "w3 w4"})
    Path("bmx.yaml").write_text(f"model: {model}\nmax-tokens: 2\noutput_file: '-'\n")

    def tokens(*args: Any) -> int:
        return records(bmx("run", source, "--config", "bmx.yaml", *args).out)["a"]["usage"]["completion_tokens"]

    assert tokens() == 2
    monkeypatch.setenv("BMX_MAX_TOKENS", "3")
    assert tokens() == 3
    assert tokens("--max-tokens", 4) == 4


# What the terminal shows


def test_plain_progress_has_no_escape_codes_no_markup_and_no_wrapping(run):
    name = "[b]answers[red] " + "long " * 20 + ".jsonl"
    ended = run(write(row()), "-o", name, *PLAIN)
    assert ended.code == 0
    assert "\x1b" not in ended.err
    assert f"answers are in {name}" in ended.log


def test_progress_none_prints_nothing(run):
    assert run(write(row()), "-o", "-", "--progress", "none").err == ""


def test_an_id_never_reaches_the_terminal_raw(run):
    ended = run(write(row("\x1b[31m"), row("\x1b[31m")), *PLAIN)
    assert ended.code == 5
    assert "\x1b" not in ended.err


def test_answers_keep_coming_when_the_log_is_on_a_full_disk(run, monkeypatch):
    source = write(row())
    with io.TextIOWrapper(Path("/dev/full").open("wb", buffering=0), write_through=True) as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert run(source, "-o", "out.jsonl", *PLAIN).code == 0
    assert set(records(Path("out.jsonl"))) == {"a"}


def test_env_shows_versions(bmx):
    ended = bmx("env")
    assert ended.code == 0
    for name in ("bmx", "python", "torch", "transformers"):
        assert re.search(rf"^{name} +\d+\.\d+", ended.out, re.MULTILINE)


@pytest.mark.parametrize("args", [["--help"], ["run", "--help"]], ids=" ".join)
def test_help_loads_no_torch(args):
    code = f"""
import sys
from bmx.cli.commands import main
sys.argv = ["bmx", *{args!r}]
try:
    main()
finally:
    print("loaded:", *{{"torch", "transformers", "numpy"}} & set(sys.modules), file=sys.stderr)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage: bmx" in ended.stdout
    assert ended.stderr == "loaded:\n"


# A process of its own


def started(*args: Any, **pipes: Any) -> subprocess.Popen[bytes]:
    """``bmx`` in a process that Ctrl-C reaches even where the tests run in the background."""
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\nfrom bmx.__main__ import main; main()"
    )
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], stderr=subprocess.PIPE, **pipes)


def test_ctrl_c_leaves_whole_lines_and_exit_code_130(tmp_path, model):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(jsonl(*(row(i, max_tokens=60) for i in range(1000))))
    with started("run", source, "-o", output, "-m", model, "--max-num-seqs", 4) as process:
        while process.poll() is None and not (output.exists() and b"\n" in output.read_bytes()):
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert b"interrupted" in err
    assert b"Traceback" not in err
    found = records(output)
    assert 0 < len(found) < 1000
    assert {record["usage"]["completion_tokens"] for record in found.values()} == {60}


def test_a_pipeline_of_processes(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": tmp_path}
    with started("run", "-", "-o", "-", "-m", "fake", **pipes) as process:
        out, err = process.communicate(jsonl(row("é"), "bad", row("😀")).encode())
    assert process.returncode == 3
    assert set(records(out.decode())) == {"é", "line-2", "😀"}
    assert b"\x1b" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_closes_standard_output_is_no_error(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(jsonl(*(row(i) for i in range(5000))))
    with started("run", source, "-o", "-", "-m", "fake", "--progress", "none", stdout=subprocess.PIPE) as process:
        assert json.loads(process.stdout.readline())["text"]
        process.stdout.close()
        assert process.stderr.read() == b""


def test_the_input_may_be_named_as_run_batch_of_vllm_names_it(bmx):
    Path("in.jsonl").write_text('{"prompt": "w1"}\n')
    flags = ("--kv-cache-memory-bytes", "8M", "--no-enable-prefix-caching", "--default-chat-template-kwargs", "{}")
    ended = bmx("run", "-i", "in.jsonl", "-o", "out.jsonl", "-m", "fake", *flags)
    assert (ended.code, len(Path("out.jsonl").read_text().splitlines())) == (0, 1)
    shown = bmx("run", "--input-file", "in.jsonl", "--print-config", *flags).out
    for line in ("kv_cache_memory: 8000000", "prefix_reuse: false", "chat_template_kwargs: {}"):
        assert f"\n{line}\n" in shown
    both = bmx("run", "in.jsonl", "-i", "in.jsonl", "-m", "fake")
    assert (both.code, "given twice" in both.err) == (2, True)
