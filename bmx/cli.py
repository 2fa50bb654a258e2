"""The front door: commands and flags. No logic: flags become a config, the config becomes a job.

Flags are made from the config's own fields, so that each setting is described once.
"""

from __future__ import annotations

import inspect
import os
import sys
from typing import Annotated, Any, get_args, get_origin

import typer

from bmx.config import RunConfig, Setting, all_settings
from bmx.errors import BmxError

EXIT_SOME_FAILED = 3
EXIT_INTERRUPTED = 130
SHORT = {"output_file": "-o", "model": "-m"}

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Offline batch LLM inference with the KV cache compressed while prompts are read (Batch-Max).",
)


def main() -> None:
    """Run the command line; every expected error is one line and a hint."""
    from bmx.display import Display

    try:
        app()
    except BmxError as error:
        Display().error(error.message, error.hint)
        sys.exit(error.exit_code)


@app.callback(invoke_without_command=True)
def front(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    """Offline batch LLM inference with the KV cache compressed while prompts are read (Batch-Max)."""
    if version:
        from bmx import __version__

        typer.echo(__version__)
        raise typer.Exit


def run(inputs: list[str], config: str | None, print_config: bool, **flags: Any) -> None:
    """Answer every prompt of INPUT (JSONL), as many at once as memory allows.

    A line is {"prompt": ...} or {"messages": [...]}, with an optional "id" and sampling fields, or a line of an
    OpenAI batch file.
    """
    from bmx.display import Display

    settings = RunConfig.gather(tuple(inputs), flags, config)
    if print_config:
        return _print_config(settings)
    from bmx.job import run as run_job

    display = Display(settings.job.progress)
    try:
        stats = run_job(settings, display)
    except BrokenPipeError:  # the reader of our output has gone, as in `bmx run ... -o - | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit from None
    except KeyboardInterrupt:
        display.error("interrupted", "answers that were finished are kept")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if stats.rows_failed:
        raise typer.Exit(EXIT_SOME_FAILED)
    return None


@app.command()
def env() -> None:
    """Show versions, devices, memory and the kernels chosen: what a bug report needs."""
    from bmx.display import environment

    for name, value in environment():
        typer.echo(f"{name:14} {value}")


def _print_config(settings: RunConfig) -> None:
    import yaml

    values = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.flat().items()}
    typer.echo(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), nl=False)


def _flag(title: str, setting: Setting) -> inspect.Parameter:
    """A command-line option for a setting; without a value it is None, so that the config file can speak."""
    name = f"--{setting.name.replace('_', '-')}"
    is_flag = setting.type is bool
    spelling = f"{name}/--no-{name[2:]}" if is_flag and setting.default else name
    option = typer.Option(
        *filter(None, (SHORT.get(setting.name), spelling)),
        help=_help(setting),
        rich_help_panel=title,
        envvar=f"BMX_{setting.name.upper()}",
        show_envvar=False,
        show_default=False,
    )
    return inspect.Parameter(
        setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[_cli_type(setting), option]
    )


def _help(setting: Setting) -> str:
    note = setting.note[0].upper() + setting.note[1:]
    return note if setting.default in (None, (), True, False) else f"{note} (default {setting.default})"


def _cli_type(setting: Setting) -> Any:
    """How the command line reads a setting: sizes and choices as text, the rest as what it is."""
    if setting.parse or setting.choices:
        return str | None
    if get_origin(setting.type) is tuple:
        return list[get_args(setting.type)[0]] | None  # type: ignore[misc]
    return setting.type | None


def _with_flags(command: Any) -> Any:
    """``command`` with one option per setting in its signature."""
    inputs = Annotated[list[str], typer.Argument(metavar="INPUT...", help="JSONL files of prompts; - is stdin.")]
    config = Annotated[
        str | None,
        typer.Option("--config", "-c", envvar="BMX_CONFIG", show_envvar=False, help="YAML file of settings."),
    ]
    shown = Annotated[bool, typer.Option("--print-config", help="Show the settings in force and exit.")]
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("inputs", keyword, annotation=inputs),
        inspect.Parameter("config", keyword, default=None, annotation=config),
        inspect.Parameter("print_config", keyword, default=False, annotation=shown),
        *(_flag(title, setting) for title, setting in all_settings()),
    ]
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


app.command("run")(_with_flags(run))
