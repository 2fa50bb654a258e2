"""What the installed package must bring: its command, its sources for the compiler, its types, its licence."""

from __future__ import annotations

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_command_is_a_function_that_exists():
    for name, value in PROJECT["project"]["scripts"].items():
        assert callable(EntryPoint(name, value, "console_scripts").load())


def test_files_that_are_not_python_are_package_data():
    packed = {
        file
        for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
        for file in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    others = {file for file in (ROOT / "bmx").rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
    assert packed == others
    assert ROOT / "bmx" / "py.typed" in packed
    assert [ROOT / name for name in PROJECT["project"]["license-files"]] == [ROOT / "LICENSE"]
