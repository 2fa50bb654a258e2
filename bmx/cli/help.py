"""Help texts: commands and flags as a person reads them, in 80 columns, on a terminal or in a pager.

Plain text on purpose: it is the same with and without colours. Knows the form; what is said about a flag comes from its
``Setting``.
"""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from typer.core import TyperCommand, TyperGroup

from bmx.cli.flags import flags_of, help_text
from bmx.settings import COMMANDS, Setting

NARROWEST, WIDEST = 40, 100  # columns
TEXT_COLUMN = 30  # where the explanations begin
GENERAL = "General"
FILES = "files of prompts: JSON lines or arrays, CSV, Parquet; also .gz and .zst"
INPUTS = {
    "run": ("INPUT...", f"{FILES}; - is standard input"),
    "plan-batch": ("[INPUT...]", f"{FILES}; none with --max-input"),
    "calibrate": ("INPUT...", f"{FILES}; - is standard input"),
    "bench": ("[INPUT...]", f"{FILES}; none: random token ids"),
}
EXAMPLES = {
    "": (
        "bmx run prompts.jsonl --model ./llama-8b",
        "bmx plan-batch prompts.jsonl --model ./llama-8b --memory-limit 16G",
    ),
    "run": (
        "bmx run prompts.jsonl --model ./llama-8b --memory-limit 16G",
        "bmx run docs.jsonl --prompt-template 'Summarize:\\n{document}' -o sums.jsonl",
    ),
    "plan-batch": (
        "bmx plan-batch prompts.jsonl --model ./llama-8b --kv-budget 512,1024",
        "bmx plan-batch --model ./llama-8b --max-input 4k --gpu H100",
    ),
    "calibrate": (
        "bmx calibrate prompts.jsonl --kv-budget 512,1024 --kv-format auto,int8",
        "bmx calibrate prompts.jsonl --quantization int8 --rows 32",
    ),
    "bench": (
        "bmx bench --shape llama-3.1-8b --memory-limit 24G",
        "bmx bench prompts.jsonl --model ./llama-8b --kv-budget 512",
    ),
    "env": ("bmx env", "bmx env > report.txt"),
}
FRONT_OPTIONS = (
    ("-h, --help", "Show this page; after a command, all about that command"),
    ("--version", "Show the version"),
    ("--install-completion", "Let the current shell complete commands and flags"),
    ("--show-completion", "Show what --install-completion would install"),
)
OPTIONS_OF_ALL = (
    ("-i, --input-file FILE", "INPUT, as vLLM's run-batch calls it"),
    ("-c, --config FILE", "YAML file of settings, as `bmx run --print-config` shows them"),
    ("-h, --help", "Show this page"),
)
STOPPED = ("129, 130, 143", "stopped by SIGHUP, SIGINT (Ctrl-C), SIGTERM")
FAILED = ("1", "the run failed; what is finished is saved")
USAGE = ("2", "wrong usage, or the output is another job's")
MEMORY = ("4", "does not fit in memory")
INPUT = ("5", "the input cannot be used")
LOCKED = ("75", "another run is at work on the same output")
EXIT_CODES = {
    "run": (
        ("0", "every row has its answer, or was skipped on request"),
        FAILED,
        USAGE,
        ("3", "finished, but some rows failed"),
        MEMORY,
        INPUT,
        LOCKED,
        STOPPED,
    ),
    "plan-batch": (
        ("0", "the plan was shown"),
        ("1", "it failed"),
        ("2", "wrong usage"),
        ("4", "with --check: not every row fits"),
        INPUT,
        STOPPED,
    ),
    "calibrate": (
        ("0", "measured, and settings are recommended"),
        FAILED,
        USAGE,
        ("3", "measured, but no combination was good enough"),
        MEMORY,
        INPUT,
        LOCKED,
        STOPPED,
    ),
    "bench": (("0", "measured"), FAILED, USAGE, MEMORY, INPUT, LOCKED, STOPPED),
    "env": (("0", "shown"), STOPPED),
}
NOTATIONS = (
    ("BYTES", "300M, 8G (powers of ten) or 8GiB (powers of two)"),
    ("SECONDS", "30, 90s, 5m or 2h"),
    ("TOKENS, ROWS", "4096; most also take 32k (32,000) or 32K (32,768)"),
)
VARIABLES = (
    ("BMX_<SETTING>", "any flag that is not of one command alone: BMX_KV_BUDGET=512"),
    ("BMX_CONFIG", "the file of --config"),
    ("HF_TOKEN, HF_HOME", "access to hub models, and where they are kept"),
    ("HF_HUB_OFFLINE=1", "stay off the network"),
    ("OMP_NUM_THREADS", "threads on a CPU (default: all usable cores)"),
    ("NO_COLOR, TERM=dumb", "no colours; no live display"),
)


class Command(TyperCommand):
    """A command whose help is that of this file."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help of the command."""
        formatter.write(_text(command_help(ctx.info_name, self.help or "")))


class Front(TyperGroup):
    """All commands together: their help is a page that names them."""

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 - the name that typer gives
        """Write the front page."""
        short = [(name, (command.help or "").split("\n\n")[0]) for name, command in self.commands.items()]
        formatter.write(_text(front_page(self.help or "", short)))


def _text(lines: Iterator[str]) -> str:
    return "".join(f"{line.rstrip()}\n" for line in lines)


def front_page(about: str, commands: Sequence[tuple[str, str]]) -> Iterator[str]:
    """The lines of ``bmx --help``.

    Args:
        about: what bmx is.
        commands: names of commands, and what each does.
    """
    yield "Usage: bmx COMMAND [OPTIONS] [INPUT...]"
    yield from _paragraphs(about)
    yield from _section("Commands", commands)
    yield from _examples("")
    yield from _section(GENERAL, FRONT_OPTIONS)
    yield from _paragraphs("`bmx COMMAND -h` shows the flags of a command, its exit codes and what variables it reads.")


def command_help(name: str, about: str) -> Iterator[str]:
    """The lines of a command's help: what it is for, examples, common flags, rare ones, exit codes and variables.

    Args:
        name: the command's.
        about: what it does.
    """
    flags = flags_of(name) if name in COMMANDS else []
    yield f"Usage: bmx {name}" + (f" [OPTIONS] {INPUTS[name][0]}" if flags else "")
    yield from _paragraphs(about)
    yield from _examples(name)
    yield from _section("Arguments", [INPUTS[name]] if flags else [])
    groups = sorted(dict.fromkeys(flag.group or GENERAL for flag in flags), key=GENERAL.__eq__)  # general ones last
    for group in groups or [GENERAL]:
        common = [_entry(flag) for flag in flags if (flag.group or GENERAL) == group and not flag.rare]
        yield from _section(group, common + (list(OPTIONS_OF_ALL) if group == GENERAL and flags else []))
    for group in groups:
        rare = [_entry(flag) for flag in flags if (flag.group or GENERAL) == group and flag.rare]
        yield from _section(f"{group.split(' (')[0]}, rarely needed", rare)
    if flags:
        yield from _section("Values", NOTATIONS)
        yield from _section("Environment variables", VARIABLES)
    yield from _section("Exit codes", EXIT_CODES[name])


def _entry(setting: Setting) -> tuple[str, str]:
    """A flag with its short form and its value, and what it does."""
    short = f"{setting.short}," if setting.short else "   "
    return f"{short} {setting.spellings[0].replace('/', ', ')} {setting.placeholder}".rstrip(), help_text(setting)


def _paragraphs(text: str) -> Iterator[str]:
    """A text in lines, an empty line before each of its paragraphs."""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        yield ""
        yield from _wrapped(paragraph, "", "")


def _examples(name: str) -> Iterator[str]:
    yield ""
    yield "Examples:"
    yield from (f"  {line}" for line in EXAMPLES[name])


def _section(title: str, entries: Sequence[tuple[str, str]]) -> Iterator[str]:
    """A title and its entries in two columns; the text of a long entry begins on the next line.

    Args:
        title: of the section; without entries there is none.
        entries: the left and the right column.
    """
    if entries:
        yield ""
        yield f"{title}:"
    column = min(TEXT_COLUMN, 4 + max((len(left) for left, _ in entries), default=0))
    for left, text in entries:
        head = f"  {left}"
        if len(head) + 2 > column:
            yield head
            head = ""
        yield from _wrapped(text, head.ljust(column), " " * column)


def _wrapped(text: str, first: str, later: str) -> list[str]:
    """Text in lines, with what the first line and the later ones begin with; flags are not broken at hyphens."""
    width = min(WIDEST, max(NARROWEST, shutil.get_terminal_size((80, 24)).columns))
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=later, break_on_hyphens=False)
