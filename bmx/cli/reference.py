"""The reference page of all settings, from their descriptions: ``python -m bmx.cli.reference`` writes it.

Knows the form of the page; what it says comes from the settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bmx.cli.flags import OPTIONS
from bmx.run_config import all_settings
from bmx.settings import COMMANDS, Setting

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
INTRODUCTION = """# Settings

This page is written by `python -m bmx.cli.reference` from the settings' own descriptions; a test compares it with them.

A setting is a flag (`--kv-budget`), a key in the YAML file of `--config` (`kv_budget`; `kv-budget` works too) and an
environment variable (`BMX_KV_BUDGET`). Flags override variables, variables override the file, and the file overrides
the default. `bmx run --print-config` shows the settings in force, as such a file. A switch that is on by default is
turned off by a flag like `--no-resume`. Sampling settings may also be fields of an input row; then they hold for
that row.

*Answers* says whether a setting decides answers. If it does, a run with another value does not resume the same output.
*Calibrated* settings may be set by the file of `bmx calibrate`. Sizes are written like `300M`, `8G` (powers of ten) or
`8GiB` (powers of two), counts like `4096`, `32k` (32,000) or `32K` (32,768), times like `30`, `90s`, `5m` or `2h`.
"""
COLUMNS = ("flag", "YAML key, variable", "values", "default", "commands", "answers", "meaning")


def reference() -> str:
    """The page as Markdown: every setting by group, then the options of single commands."""
    groups = dict.fromkeys(setting.group for setting in all_settings())
    parts = [INTRODUCTION]
    for group in groups:
        rows = [_setting_row(setting) for setting in all_settings() if setting.group == group]
        parts.append(f"## {group}\n\n{_table(COLUMNS, rows)}")
    option_rows = [
        (_code(option.flag), option.commands[0], _values(option), option.help)
        for option in sorted(OPTIONS, key=lambda option: COMMANDS.index(option.commands[0]))
    ]
    parts.append(
        "## Options of single commands\n\nThese are flags alone: neither a file nor a variable sets them. All commands "
        "also take `--config` (`-c`, `BMX_CONFIG`), a YAML file of settings, and `--input-file` (`-i`) in the place "
        "of INPUT. `BMX_KERNELS` forces the kernels of that name.\n\n"
        + _table(("flag", "command", "values", "meaning"), option_rows)
    )
    return "\n".join(parts)


def _setting_row(setting: Setting) -> tuple[str, ...]:
    flags = [setting.short] if setting.short else []
    return (
        ", ".join(map(_code, [*flags, *"/".join(setting.spellings).split("/")])),
        f"{_code(setting.name)}, {_code(setting.variable)}",
        _values(setting),
        _default(setting),
        "all" if setting.commands == COMMANDS else ", ".join(setting.commands),
        setting.decides_answers.value,
        _meaning(setting),
    )


def _values(setting: Setting) -> str:
    if setting.type is bool:
        return "on or off"
    unit = "" if setting.unit in (None, "bytes", "seconds") else f" ({setting.unit})"  # sizes and times have units
    return ("a path" if setting.is_path else setting.expected) + unit


def _default(setting: Setting) -> str:
    if setting.default in (None, ()):
        return "-"
    return ("on" if setting.default else "off") if setting.type is bool else _code(f"{setting.default}")


def _meaning(setting: Setting) -> str:
    """The help text, with what differs in single commands."""
    sentences = [setting.help]
    sentences += [f"In `bmx {command}`: {text}" for command, text in (setting.help_in or {}).items()]
    sentences += [
        f"`bmx {command}` compares several: {_code(example)}"
        for command, example in (setting.compared_in or {}).items()
    ]
    return ". ".join([*sentences, *(["Calibrated"] if setting.calibrated else [])]) + "."


def _code(text: str) -> str:
    return f"`{text}`"


def _table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "".join(f"| {' | '.join(cell.replace('<', '&lt;') for cell in line)} |\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
