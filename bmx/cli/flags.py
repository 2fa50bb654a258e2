"""The flags of each command: one for every setting that the command takes, and those of its own options.

Everything about a flag comes from its ``Setting``. Knows no command's work.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from bmx.errors import UsageError
from bmx.model.random_models import SHAPES
from bmx.run_config import all_settings, setting_named
from bmx.settings import NEVER, Setting
from bmx.units import parse_bytes, parse_count, parse_counts, parse_memory, parse_names

CONFIG = Annotated[
    str | None, typer.Option("--config", "-c", envvar="BMX_CONFIG", show_envvar=False, help="YAML file of settings")
]
INPUT_FILE = Annotated[
    list[str] | None,
    typer.Option("--input-file", "-i", help="INPUT, as vLLM's run-batch calls it"),
]
OTHER_VARIABLES = ("BMX_CONFIG", "BMX_KERNELS")  # variables that are not settings


def _option(command: str, name: str, kind: Any, help_text: str, **more: Any) -> Setting:
    """An option of one command alone, which neither a config file nor a variable can set."""
    group = {"plan-batch": "Plan", "calibrate": "Calibration", "bench": "Bench"}.get(command, "")
    default = False if kind is bool else None
    return Setting(
        help_text,
        decides_answers=NEVER,
        commands=(command,),
        name=name,
        type=kind,
        default=default,
        group=group,
        **more,
    )


OPTIONS = (
    _option("run", "print_config", bool, "Show the settings in force and exit"),
    _option(
        "plan-batch",
        "max_input",
        int | None,
        "Plan for 1,000 imagined requests (or --limit) with this many prompt tokens each, instead of an INPUT (4k)",
        parse=parse_count,
        unit="tokens",
    ),
    _option(
        "plan-batch",
        "shape",
        str | None,
        f"Plan for a model of this shape, without its files; with --max-input: {', '.join(SHAPES)}",
        metavar="SHAPE",
    ),
    _option(
        "plan-batch",
        "gpu",
        str | None,
        "Plan for this card instead of this machine (H100, RTX-4090, ...)",
        metavar="CARD",
    ),
    _option(
        "plan-batch",
        "gpu_memory",
        int | None,
        "Plan for a GPU with this much memory (24G)",
        parse=parse_memory,
        unit="bytes",
    ),
    _option(
        "plan-batch",
        "check",
        bool,
        "Exit 4 when a row does not fit (memory, model), and say what would make it fit",
    ),
    _option(
        "plan-batch",
        "measure",
        bool,
        "Load the model, run the largest step, and show predicted and measured memory",
    ),
    _option("plan-batch", "json", bool, "Print JSON"),
    _option(
        "calibrate",
        "min_agreement",
        float | None,
        "Share of next tokens that must be the same as with the full cache (default 0.95)",
        metavar="SHARE",
    ),
    _option("calibrate", "rows", int | None, "Prompts to measure on, evenly spread over the input (default 16)"),
    _option(
        "calibrate",
        "share_layers",
        int | None,
        "Look for this many layers that can read the keys and values of another layer (KVSharer)",
        rare=True,
    ),
    _option(
        "bench",
        "shape",
        str | None,
        f"Random weights in the shape of a model, without a download: {', '.join(SHAPES)}",
        metavar="SHAPE",
    ),
    _option(
        "bench",
        "input_tokens",
        tuple[int, ...] | None,
        "Lengths of random prompts, each measured on its own: 1000,2000 (default 2000)",
        parse=parse_counts,
        unit="tokens",
    ),
    _option(
        "bench",
        "output_tokens",
        tuple[int, ...] | None,
        "Tokens generated for each prompt, each number measured on its own: 128,256 (default 128)",
        parse=parse_counts,
        unit="tokens",
    ),
    _option(
        "bench",
        "prompts",
        int | None,
        "Largest number of prompts in a measurement (default: twice the slots of Batch-Max, at least 8)",
        parse=parse_count,
        unit="prompts",
        metavar="N",
    ),
    _option(
        "bench",
        "preset",
        Literal["paper"],
        "1000,2000,4000 tokens in, 128,256 out, KV memory a quarter of the weights, budgets a quarter of prompts",
    ),
)


def flags_of(command: str) -> list[Setting]:
    """The command's own options and the settings that it takes, in the order of its help text."""
    settings = (setting.in_command(command) for setting in all_settings() if command in setting.commands)
    return [*(option for option in OPTIONS if command in option.commands), *settings]


def take_options(command: str, flags: dict[str, Any]) -> dict[str, Any]:
    """The values of a command's own options, which are removed from its flags; None where one was not given.

    Raises:
        UsageError: a value cannot be read.
    """
    options = [option for option in OPTIONS if command in option.commands]
    given = {option.name: flags.pop(option.name) for option in options}
    return {o.name: None if given[o.name] is None else o.coerce(given[o.name]) for o in options}


def values_to_compare(name: str, text: str | None) -> tuple[Any, ...]:
    """The values in a text like ``int8,int4``, of a setting that holds one of them; nothing for None.

    Raises:
        UsageError: one cannot be a value of that setting.
    """
    setting = setting_named(name)
    return () if text is None else tuple(setting.coerce(part) for part in text.split(","))


def known_variables() -> set[str]:
    """The environment variables that mean something to bmx."""
    return {setting.variable for setting in all_settings()} | set(OTHER_VARIABLES)


def with_flags(command: str, function: Any, metavar: str, about: str) -> Any:
    """``function`` with the command's flags in its signature, where typer looks for them.

    Args:
        command: its name on the command line.
        function: takes ``inputs``, ``config`` and a keyword for each flag.
        metavar: what the input files are called; in brackets if they may be left out.
        about: what they are.
    """

    def called(inputs: list[str] | None, input_file: list[str] | None, **flags: Any) -> None:
        names = {name: ",".join(flags[name]) for name in of_names if flags[name]}  # of a flag that is repeated, too
        function(inputs=_chosen_inputs(command, metavar, inputs, input_file), **flags | names)

    of_names = [setting.name for setting in flags_of(command) if setting.parse is parse_names]
    keyword = inspect.Parameter.KEYWORD_ONLY
    argument = Annotated[list[str] | None, typer.Argument(metavar=metavar, help=about)]
    parameters = [
        inspect.Parameter("inputs", keyword, default=None, annotation=argument),
        inspect.Parameter("input_file", keyword, default=None, annotation=INPUT_FILE),
        inspect.Parameter("config", keyword, default=None, annotation=CONFIG),
        *map(_parameter, flags_of(command)),
    ]
    called.__doc__ = function.__doc__
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called


def _chosen_inputs(
    command: str, metavar: str, inputs: list[str] | None, input_file: list[str] | None
) -> list[str] | None:
    """The input files, given as arguments or as --input-file.

    Raises:
        UsageError: given as both, or not at all where some are needed.
    """
    if inputs and input_file:
        raise UsageError("the input is given twice, as an argument and as --input-file", hint="give it once")
    if not (inputs or input_file or metavar.startswith("[")):
        raise UsageError(f"missing argument {metavar!r}", hint=f"bmx {command} -h shows what it takes")
    return inputs or input_file


def _parameter(setting: Setting) -> inspect.Parameter:
    """A setting or an option as a parameter. One that was not given is None, so that the config file can set it."""
    is_option = setting in OPTIONS
    option = typer.Option(
        *filter(None, (setting.short, *setting.spellings)),
        help=help_text(setting),
        metavar=setting.placeholder or None,
        autocompletion=_completer(setting.choices) if setting.choices else None,
        envvar=None if is_option else setting.variable,
        show_envvar=False,
        show_default=False,
    )
    return inspect.Parameter(
        setting.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=False if is_option and setting.type is bool else None,
        annotation=Annotated[_typer_type(setting), option],
    )


def _completer(words: tuple[str, ...]) -> Callable[[str], list[str]]:
    """What a shell asks for the words that begin in some way."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete


def help_text(setting: Setting) -> str:
    """What a setting does, its default unless that is nothing or the text says it, and its other names."""
    nothing = setting.default is None or setting.default is False or setting.default == ()
    default = "" if nothing or "(default" in setting.help else f" (default {_default(setting)})"
    others = "".join(f"; also {spelling.replace('/', ', ')}" for spelling in setting.spellings[1:])
    return f"{setting.help}{default}{others}"


def _default(setting: Setting) -> str:
    """A default as it would be typed."""
    default = setting.default
    if setting.type is bool:
        return "on"
    if setting.parse is parse_bytes:
        return f"{default / 1e6:g}M"
    return f"{default:g}" if isinstance(default, float) else f"{default}"


def _typer_type(setting: Setting) -> Any:
    """How typer reads a setting: all but switches as text, which the setting itself turns into its type."""
    if setting.type is bool:
        return bool | None
    return list[str] | None if setting.is_list and setting.parse in (None, parse_names) else str | None
