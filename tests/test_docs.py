"""What the README and the samples say is true of the program."""

from __future__ import annotations

import configparser
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from bmx.cli.commands import EXIT_SOME_FAILED
from bmx.config import JobConfig, RunConfig, all_settings
from bmx.errors import BmxError
from bmx.shutdown import STOPPING, Interrupted

ROOT = Path(__file__).parent.parent
SERVED = ("--served-model-name", "SmolLM2-135M-Instruct")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_flag_in_the_readme_exists():
    known = {f"--{setting.name.replace('_', '-')}" for _, setting in all_settings()}
    known |= {"--max-input", "--gpu", "--gpu-memory", "--check", "--measure", "--json"}  # of plan-batch alone
    known |= {"--min-agreement", "--rows", "--share-layers"}  # of calibrate alone
    known |= {"--shape", "--input-tokens", "--output-tokens", "--prompts", "--preset"}  # of bench alone
    known |= {f"--no-{name[2:]}" for name in known}  # switches that are on
    known |= {"--config", "--print-config", "--help", "--version", "--no-deps"}
    named = set(re.findall(r"--[a-z][a-z-]+", README))
    assert named
    assert named <= known


def test_every_file_in_the_readme_exists():
    named = set(re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.(?:py|md|yaml|jsonl))`", README)) - {
        "prompts.out.jsonl",
        "bmx.yaml",
    }
    assert named
    missing = {name for name in named if not (ROOT / name).exists() and not list((ROOT / "bmx").rglob(name))}
    assert missing == set()


@pytest.mark.parametrize("name", ["documents", "messages", "openai_batch"])
def test_the_sample_inputs_are_read_without_an_error(bmx, name):
    ended = bmx("run", ROOT / "sample_inputs" / f"{name}.jsonl", "-m", "fake", "-o", "out.jsonl", *SERVED)
    assert (ended.code, Path("out.jsonl.errors.jsonl").exists()) == (0, False)
    assert len(Path("out.jsonl").read_text(encoding="utf-8").splitlines()) >= 5


def blocks(section: str) -> list[str]:
    """The indented blocks of a section of the README."""
    text = README[README.index(f"## {section}\n") :].split("\n## ")[0]
    return [textwrap.dedent(block).strip("\n") for block in re.findall(r"(?m)(?:^    .*\n|^\n(?=    ))+", text)]


@pytest.fixture
def nightly(tmp_path):
    """The folder of the recipes, with the script and tonight's prompts; runs one of their commands, by a shell."""
    folder = tmp_path / "nightly"
    folder.mkdir()

    def here(text: str) -> str:
        return text.replace("/data/nightly", str(folder)).replace("/opt/bmx/bin/bmx", f"{sys.executable} -m bmx")

    [script] = [block for block in blocks("At night") if block.startswith("#!/bin/sh")]
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


def test_the_crontab_answers_at_night_goes_on_after_a_reboot_and_retries_failed_rows(nightly):
    [crontab] = [block.splitlines() for block in blocks("At night") if "@reboot" in block]
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
    [retry] = [block for block in blocks("At night") if "--retry-failed" in block]
    assert nightly(retry) == 0
    assert len(nightly.output.read_text().splitlines()) == 6
    nightly.log.write_text("")
    assert nightly(crontab[0].split(maxsplit=5)[5]) == 0
    assert nightly.log.read_text() == ""


def test_the_systemd_timer_is_made_of_two_units_and_a_command_that_runs(nightly):
    service, timer = (block for block in blocks("At night") if block.startswith("["))
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
    schema = re.search(r"`--stats-file` keeps.*?meaning\.", README, re.DOTALL)[0]
    named = set(re.findall(r"`([a-z_]+)`", schema)) - {"running", "finished", "interrupted", "failed"}
    deep = {"rows", "throughput", "slots", "memory"}
    assert named | {"failed"} == set(stats) | set().union(*(stats[name] for name in deep))


def test_the_table_of_exit_codes_is_that_of_the_errors():
    table = README[README.index("| exit code |") :].split("\n\n")[0]
    codes = {int(code) for cell in re.findall(r"(?m)^\| ([\d, ]+) \|", table) for code in cell.split(",")}
    raised = {error.exit_code for error in [BmxError, *BmxError.__subclasses__()]}
    stopped = {Interrupted(number).exit_code for number in STOPPING}
    assert codes == {0, EXIT_SOME_FAILED} | raised | stopped


def test_the_sample_config_is_valid():
    config = RunConfig.gather(("x",), {}, str(ROOT / "sample_inputs" / "bmx.yaml"))
    assert config.engine.kv_budget == 1024
