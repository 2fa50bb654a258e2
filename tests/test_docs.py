"""What the README and the samples say is true of the program."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bmx.config import RunConfig, all_settings
from bmx.jsonl import Reader
from bmx.request import Request, SamplingParams

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_flag_in_the_readme_exists():
    known = {f"--{setting.name.replace('_', '-')}" for _, setting in all_settings()}
    known |= {"--max-input", "--gpu", "--gpu-memory", "--check", "--measure", "--json"}  # of plan-batch alone
    known |= {"--config", "--print-config", "--help", "--version", "--no-deps"}
    named = set(re.findall(r"--[a-z][a-z-]+", README))
    assert named
    assert named <= known


def test_every_file_in_the_readme_exists():
    named = set(re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.(?:py|md|yaml|jsonl))`", README)) - {
        "prompts.out.jsonl",
        "bmx.yaml",
    }
    assert len(named) > 15
    missing = {name for name in named if not (ROOT / name).exists() and not list((ROOT / "bmx").rglob(name))}
    assert missing == set()


def test_every_module_is_in_how_it_works():
    story = README[README.index("## How it works") :]
    modules = {p.name for p in (ROOT / "bmx").rglob("*.py")} - {"__init__.py", "__main__.py"}
    unnamed = {name for name in modules if name not in story}
    assert unnamed <= {"errors.py", "request.py", "stats.py", "hardware.py", "demo.py", "reference.py", "cpu.py"}


@pytest.mark.parametrize("name", ["documents", "messages", "openai_batch"])
def test_the_sample_inputs_are_read_without_an_error(name):
    rows = list(Reader(paths=(ROOT / "sample_inputs" / f"{name}.jsonl",), defaults=SamplingParams()))
    assert len(rows) >= 5
    assert all(isinstance(row, Request) for row in rows)


def test_the_sample_config_is_valid():
    config = RunConfig.gather(("x",), {}, str(ROOT / "sample_inputs" / "bmx.yaml"))
    assert config.engine.kv_budget == 1024
