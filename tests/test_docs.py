"""What the documentation and the samples say is true of the program."""

from __future__ import annotations

import configparser
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import transformers
import typer
from families import FAMILIES
from test_structure import ROOMS
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from bmx.cli.commands import EXIT_SOME_FAILED, app
from bmx.cli.help import EXIT_CODES
from bmx.errors import BmxError
from bmx.run_config import JobConfig, RunConfig, given_settings
from bmx.shutdown import STOPPING, Interrupted

ROOT = Path(__file__).parent.parent
SERVED = ("--served-model-name", "SmolLM2-135M-Instruct")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CHANGELOG.md"]
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
COMMANDS = typer.main.get_command(app)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def flags_of(command: str | None = None) -> set[str]:
    """The long flags of one command, or of all of them."""
    commands = [COMMANDS.commands[command]] if command else [COMMANDS, *COMMANDS.commands.values()]
    options = [param for each in commands for param in each.params]
    return {flag for param in options for flag in (*param.opts, *param.secondary_opts)} | {"--help"}


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w/#-])--[a-z][a-z-]+", text))


def blocks(text: str, section: str) -> list[str]:
    """The indented blocks of a section of a page."""
    body = text[text.index(f"## {section}\n") :].split("\n## ", maxsplit=1)[0]
    return [textwrap.dedent(block).strip("\n") for block in re.findall(r"(?m)(?:^    .*\n|^\n(?=    ))+", body)]


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.lower().replace("`", "")).replace(" ", "-")


@EVERY_PAGE
def test_every_flag_exists(page):
    assert flags_in(page.read_text(encoding="utf-8")) <= flags_of()


@EVERY_PAGE
def test_every_command_is_one_that_bmx_takes(page):
    """Those in blocks are parsed, those in sentences have flags of the command that they name."""
    text = page.read_text(encoding="utf-8")
    for name, rest in re.findall(r"(?m)^    bmx ([a-z][a-z-]+)(.*)$", text):
        words = shlex.split(re.sub(r"<.*?>", "x", rest), comments=True)
        assert COMMANDS.commands[name].make_context(name, words).params
    named = re.findall(r"`bmx ([a-z][a-z-]+)([^`]*)`", text)
    assert [(name, rest) for name, rest in named if not flags_in(rest) <= flags_of(name)] == []


@EVERY_PAGE
def test_every_file_and_every_link_exists(page):
    text = page.read_text(encoding="utf-8")
    files = set(re.findall(r"`((?:[a-z_]+/)+[a-z0-9_]+\.(?:py|md|yaml|jsonl|sh))`", text))
    assert {name for name in files if not (ROOT / name).exists()} == set()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        headings = re.findall(r"(?m)^#+ (.*)$", file.read_text(encoding="utf-8")) if anchor else []
        assert not anchor or anchor in map(slug, headings), target


@EVERY_PAGE
def test_python_that_is_shown_runs(page, tmp_path):
    """With the fake model in place of a real one."""
    for number, block in enumerate(re.findall(r"(?ms)^```python\n(.*?)^```", page.read_text(encoding="utf-8"))):
        file = tmp_path / f"shown{number}.py"
        file.write_text(block.replace('"demo"', '"fake"'))
        runpy.run_path(str(file), {"texts": ["w1 w2", "w3"]}, "shown")


def test_the_readme_is_short():
    assert len(read("README.md").splitlines()) <= 150


def test_the_import_rule_is_that_of_the_test():
    [rule] = re.findall(r"\*\*The import rule:\*\*\s`(.*?)`", " ".join(read("docs/architecture.md").split()))
    assert tuple(rule.replace("ground files", "ground").split(", ")) == ROOMS


def test_every_fault_in_a_tests_name_is_explained():
    named = set()
    for file in (ROOT / "tests").glob("test_*.py"):
        for name in re.findall(r"def test_(\w+)", file.read_text(encoding="utf-8")):
            named |= set(re.match(r"(?:[a-z]\d+_(?:and_)?)*", name)[0].replace("_and_", "_").strip("_").split("_"))
    rows = re.findall(r"(?m)^\| ([a-z]\d+) \|.*\| (.*) \|$", read("docs/faults.md"))
    assert named - {""} <= {name for name, _ in rows}
    assert len(rows) == len(dict(rows))
    files = {file for _, cell in rows for file in re.findall(r"`(.*?)`", cell)}
    assert {file for file in files if not (ROOT / file).exists()} == set()


@pytest.mark.parametrize("name", ["documents", "long_documents", "messages", "openai_batch", "tools"])
def test_the_sample_inputs_are_read_without_an_error(bmx, name):
    ended = bmx("run", ROOT / "sample_inputs" / f"{name}.jsonl", "-m", "fake", "-o", "out.jsonl", *SERVED)
    assert (ended.code, Path("out.jsonl.errors.jsonl").exists()) == (0, False)
    assert len(Path("out.jsonl").read_text(encoding="utf-8").splitlines()) >= 5


def test_every_run_on_sample_inputs_in_the_guide_answers_all_rows(bmx, monkeypatch):
    """With the fake model, in a copy of the folder, one after the other."""
    shutil.copytree(ROOT / "sample_inputs", "sample_inputs")
    monkeypatch.setenv("BMX_MODEL", "fake")
    commands = re.findall(r"(?m)^    (bmx run sample_inputs/.*)$", read("docs/guide.md"))
    assert len(commands) > 1
    for command in commands:
        ended = bmx(*shlex.split(command, comments=True)[1:])
        assert (command, ended.code, "error" in ended.err) == (command, 0, False), ended.err


@pytest.fixture
def nightly(tmp_path):
    """The folder of the recipes, with the script and tonight's prompts; runs one of their commands, by a shell."""
    folder = tmp_path / "nightly"
    folder.mkdir()

    def here(text: str) -> str:
        return text.replace("/data/nightly", str(folder)).replace("/opt/bmx/bin/bmx", f"{sys.executable} -m bmx")

    [script] = [block for block in recipes() if block.startswith("#!/bin/sh")]
    (folder / "tonight").write_text(here(script) + "\n")
    (folder / "tonight").chmod(0o755)
    (folder / "bmx.yaml").write_text("model: fake\n")
    night = subprocess.run(["date", "+%F"], capture_output=True, text=True, check=True).stdout.strip()
    source = folder / f"{night}.jsonl"
    source.write_text("".join(f'{{"id": {i}, "prompt": "w {i}"}}\n' for i in range(5)) + "bad\n")

    def call(command: str) -> int:
        assert here(command) != command
        return subprocess.run(["sh", "-c", here(command)], check=False).returncode

    call.source, call.output, call.log = source, folder / f"{night}.out.jsonl", folder / "bmx.log"
    return call


def recipes() -> list[str]:
    return blocks(read("docs/guide.md"), "At night")


def test_the_crontab_answers_at_night_resumes_and_retries_failed_rows(nightly):
    [crontab] = [block.splitlines() for block in recipes() if "@reboot" in block]
    assert re.match(r"15 1 \* \* \*  /", crontab[0])
    assert re.match(r"@reboot     /", crontab[1])
    assert "%" not in "".join(crontab)  # which would end a command of a crontab
    assert nightly(crontab[0].split(maxsplit=5)[5]) == 3
    assert len(nightly.output.read_text().splitlines()) == 5
    assert "1 row failed: 1 invalid_json" in nightly.log.read_text()
    nightly.output.write_bytes(nightly.output.read_bytes()[:-150])  # as a power cut would leave it
    assert nightly(crontab[1].split(maxsplit=1)[1]) == 3
    assert len(nightly.output.read_text().splitlines()) == 5
    nightly.source.write_text(nightly.source.read_text().replace("bad", '{"prompt": "good"}'))
    [retry] = [block for block in recipes() if "--retry-failed" in block]
    assert nightly(retry) == 0
    assert len(nightly.output.read_text().splitlines()) == 6
    nightly.log.write_text("")
    assert nightly(crontab[0].split(maxsplit=5)[5]) == 0
    assert nightly.log.read_text() == ""


def test_the_systemd_timer_is_two_units_and_a_command_that_runs(nightly):
    service, timer = (block for block in recipes() if block.startswith("["))
    units = []
    for text in (service, timer):
        unit = configparser.ConfigParser()
        unit.optionxform = str
        unit.read_string(text)
        units.append(unit)
    assert [unit.sections() for unit in units] == [["Unit", "Service"], ["Timer", "Install"]]
    assert float(units[0]["Service"]["TimeoutStopSec"]) > JobConfig().shutdown_timeout
    assert nightly(units[0]["Service"]["ExecStart"]) == 3
    stats = json.loads((nightly.source.parent / "stats.json").read_text())
    schema = re.search(r"`--stats-file` keeps.*?meaning\.", read("docs/reference.md"), re.DOTALL)[0]
    named = set(re.findall(r"`([a-z_]+)`", schema)) - {"running", "finished", "interrupted", "failed"}
    deep = {"rows", "throughput", "slots", "memory"}
    assert named | {"failed"} == set(stats) | set().union(*(stats[name] for name in deep))


def test_the_table_of_exit_codes_is_that_of_the_errors():
    table = read("docs/reference.md").split("| exit code |")[1].split("\n\n")[0]
    codes = {int(code) for cell in re.findall(r"(?m)^\| ([\d, ]+) \|", table) for code in cell.split(",")}
    raised = {error.exit_code for error in [BmxError, *BmxError.__subclasses__()]}
    stopped = {Interrupted(number).exit_code for number in STOPPING}
    assert codes == {0, EXIT_SOME_FAILED} | raised | stopped
    in_help = {int(code) for cell, _ in EXIT_CODES["run"] for code in cell.split(",")}
    assert in_help == codes


def documented(section: str) -> set[str]:
    """Names in the first columns of a section's table of fields."""
    body = read("docs/reference.md").split(f"\n## {section}\n")[1].split("\n## ")[0]
    return {name for cell in re.findall(r"(?m)^\| (`.*?) \|", body) for name in re.findall(r"`(\w+)`", cell)}


def test_the_tables_of_fields_are_those_of_a_run(bmx):
    Path("in.jsonl").write_text('{"id": "a", "prompt": "x", "num_beams": 2}\nbad\n')
    flags = ("--keep-fields", "id", "--ignore-unsupported", "num_beams")
    assert bmx("run", "in.jsonl", "-m", "fake", *flags).code == EXIT_SOME_FAILED
    record = json.loads(Path("in.out.jsonl").read_text())
    manifest = json.loads(Path("in.out.jsonl.run.json").read_text())
    failed = json.loads(Path("in.out.jsonl.errors.jsonl").read_text())
    seldom = {"max_tokens", "reasoning"}  # where the former was lowered, and of models that think
    assert documented("The output") == set(record) | seldom
    elsewhere = {"modules", "tables", "workers"}  # on a GPU, of a table, of several workers
    assert documented("The manifest") == set(manifest) | elsewhere
    assert failed["error"]["code"] in documented("The error file")


def test_the_sample_config_is_valid():
    config = RunConfig.of(("x",), given_settings({}, str(ROOT / "sample_inputs" / "bmx.yaml")))
    assert config.engine.kv_budget == 1024


def test_the_page_of_models_says_what_was_found(monkeypatch):
    """Each family of the tests is exact there, and every model type of transformers has a row."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from models_page import PAGE, RESULTS, page, read_results

    results = read_results(RESULTS)
    assert PAGE.read_text(encoding="utf-8") == page(results), "python benchmarks/models_page.py writes it"
    assert {name for name in FAMILIES if name not in results or results[name].state != "exact"} == set()
    if {found.transformers for found in results.values()} == {transformers.__version__}:
        types = {found.type for found in results.values()}
        assert types >= {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
