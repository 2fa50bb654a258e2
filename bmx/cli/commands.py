"""The commands: flags become settings, settings become a job; errors become messages and exit codes.

A command's work is elsewhere and is imported when the command runs, so that ``--help`` stays fast.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bmx.cli.flags import known_variables, take_options, values_to_compare, with_flags
from bmx.config import EngineConfig
from bmx.errors import BmxError, UsageError
from bmx.run_config import RunConfig, given_settings

if TYPE_CHECKING:
    from bmx.shutdown import Stop
    from bmx.terminal.display import Display

RESUME_HINT = "finished answers are saved; run the same command again to resume"
INTERRUPTED_HINTS = {"bench": "finished cells are in the output file"}  # of other commands: RESUME_HINT
EXIT_SOME_FAILED = 3
EXIT_DOES_NOT_FIT = 4
INPUTS = Annotated[
    list[str], typer.Argument(metavar="INPUT...", help="JSONL files of prompts, also .gz and .zst; - is stdin")
]
PLAN_INPUTS = Annotated[
    list[str] | None, typer.Argument(metavar="[INPUT]...", help="JSONL files of prompts; none with --max-input")
]
BENCH_INPUTS = Annotated[
    list[str] | None, typer.Argument(metavar="[INPUT]...", help="JSONL files of prompts; none: random token ids")
]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Offline batch LLM inference with the KV cache compressed while prompts are read (Batch-Max).",
)


def main() -> None:
    """Run the command line; every expected error is one line and a hint."""
    from bmx.terminal.display import Display

    _open_standard_streams()
    with _errors_shown(Display()):
        app()


def _open_standard_streams() -> None:
    """Open /dev/null for closed streams (``2>&-``), so that no file of ours gets their number and their output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


@contextmanager
def _errors_shown(display: Display, interrupted_hint: str = RESUME_HINT) -> Iterator[None]:
    """Turn what ends a command early into a message and an exit code.

    Args:
        display: shows the message.
        interrupted_hint: what a signal leaves behind.
    """
    from bmx.shutdown import Interrupted

    try:
        yield
    except BrokenPipeError:  # the reader of our output has gone, as in `bmx run ... -o - | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(0)
    except BmxError as error:
        display.error(error.message, error.hint)
        sys.exit(error.exit_code)
    except Interrupted as interrupted:
        display.error(str(interrupted), interrupted_hint)
        sys.exit(interrupted.exit_code)


@contextmanager
def _session(
    command: str, inputs: list[str] | None, config_file: str | None, flags: dict[str, Any]
) -> Iterator[tuple[RunConfig, dict[str, Any], Display, Stop]]:
    """What a command runs in: its settings, its own options, its display, and signals that end it in order.

    Args:
        command: its name.
        inputs: the input files.
        config_file: a YAML file of settings.
        flags: settings and options given as flags or variables, by name; None for those not given.
    """
    from bmx.shutdown import Stop
    from bmx.terminal.display import Display
    from bmx.terminal.foreign import foreign_lines

    stop, interrupted_hint = Stop(), INTERRUPTED_HINTS.get(command, RESUME_HINT)
    early_display = Display(log_format=flags.get("log_format") or "text")  # for errors in the settings themselves
    with stop.install_handlers(), _errors_shown(early_display, interrupted_hint):
        options = take_options(command, flags)
        config = _gathered(inputs, flags, config_file)
        job = config.job
        stop.within = job.shutdown_timeout
        display = Display(job.progress, quiet=job.quiet, log_format=job.log_format)
        with foreign_lines(display), _errors_shown(display, interrupted_hint):
            yield config, options, display, stop


def _gathered(inputs: list[str] | None, flags: dict[str, Any], config_file: str | None) -> RunConfig:
    """Flags over the config file over defaults; a budget of ``auto`` is read from the calibration file."""
    from bmx.measure.calibration_file import with_calibration

    names = tuple(inputs or ())
    return RunConfig.of(names, with_calibration(names, given_settings(flags, config_file)))


@app.callback(invoke_without_command=True)
def front(version: Annotated[bool, typer.Option("--version", help="Show the version and exit")] = False) -> None:
    """Offline batch LLM inference with the KV cache compressed while prompts are read (Batch-Max)."""
    if version:
        from bmx import __version__

        typer.echo(__version__)
        raise typer.Exit


def run(inputs: list[str], config: str | None, **flags: Any) -> None:
    """Answer every prompt of INPUT (JSONL), as many at once as memory allows.

    A line is {"prompt": ...} or {"messages": [...]}, with an optional "id" and sampling fields, or a line of an
    OpenAI batch file.
    """
    with _session("run", inputs, config, flags) as (settings, options, display, stop):
        if options["print_config"]:
            _print_config(settings, display)
            return
        _warn_of_unknown_variables(display)
        from bmx.job.job import run as run_job

        if run_job(settings, display, stop).rows_failed:
            sys.exit(EXIT_SOME_FAILED)


def _print_config(settings: RunConfig, display: Display) -> None:
    import yaml

    values = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.flat().items()}
    display.data(yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip("\n"))


def _warn_of_unknown_variables(display: Display) -> None:
    """Name variables that look like settings but are not: a misspelt one would otherwise have no effect."""
    for name in sorted(os.environ):
        if name.startswith("BMX_") and name not in known_variables():
            display.warn(f"the variable {name} is not a setting of bmx")


def plan_batch(inputs: list[str] | None, config: str | None, **flags: Any) -> None:
    """Show what fits, item by item, and how fast it would be; loads no weights.

    Prompts come from INPUT, or are imagined with --max-input and --max-tokens. The machine is this one, a card by name
    (--gpu), or any GPU by its memory (--gpu-memory).
    """
    from bmx.measure.plan_batch import PlanBatchOptions
    from bmx.measure.plan_batch import plan_batch as run_plan_batch
    from bmx.terminal.display import Display
    from bmx.terminal.foreign import foreign_lines

    own = take_options("plan-batch", flags)
    as_json = own.pop("json")
    budgets = values_to_compare("kv_budget", flags["kv_budget"])
    flags["kv_budget"] = budgets[0] if budgets else None
    settings = _gathered(inputs, flags, config)
    resolved = tuple(settings.engine.kv_budget if budget == "auto" else budget for budget in budgets or ("auto",))
    options = PlanBatchOptions(budgets=resolved, as_json=as_json, **own)
    display = Display("none" if as_json else "auto")
    with foreign_lines(display):
        fits = run_plan_batch(settings, options, display)
    if options.check and not fits:
        raise typer.Exit(EXIT_DOES_NOT_FIT)


def calibrate(inputs: list[str], config: str | None, **flags: Any) -> None:
    """Measure how far compressed caches are from the full one on prompts of INPUT, and recommend settings.

    The full cache answers first; then each combination of policy, budget and format is compared with it. The smallest
    that holds --min-agreement goes into <input>.calibration.json, which `bmx run --kv-budget auto` reads.
    """
    from bmx.measure.calibrate import CalibrateOptions
    from bmx.measure.calibrate import calibrate as run_calibrate

    compared = {name: flags.pop(name) or None for name in ("kv_policy", "kv_budget", "kv_format", "kv_layer_budgets")}
    flags["kv_budget"] = EngineConfig().kv_budget  # a config file's `auto` would read what is measured here
    with _session("calibrate", inputs, config, flags) as (settings, own, display, stop):
        options = CalibrateOptions(
            policies=values_to_compare("kv_policy", compared["kv_policy"]) or (settings.engine.kv_policy,),
            budgets=values_to_compare("kv_budget", compared["kv_budget"]),
            formats=values_to_compare("kv_format", compared["kv_format"]) or (settings.engine.kv_format,),
            layers=tuple((compared["kv_layer_budgets"] or "uniform").split(",")),
            **{name: value for name, value in own.items() if value is not None},
        )
        if not run_calibrate(settings, options, display, stop):
            sys.exit(EXIT_SOME_FAILED)


def bench(inputs: list[str] | None, config: str | None, **flags: Any) -> None:
    """Measure the full cache, compression in decoding only, and Batch-Max, side by side at the same memory.

    Prompts are random token ids of --input-tokens, or those of INPUT; every side generates the same number of tokens.
    Decode-only is an upper bound that nobody implements: as many rows at once as fit with their whole prompts, cut to
    the budget at once and for free when they are read.
    """
    from bmx.measure.bench import BenchOptions
    from bmx.measure.bench import bench as run_bench

    with _session("bench", inputs, config, flags) as (settings, own, display, _):
        given, preset = given_settings(flags, config), own.pop("preset")
        if own["shape"] and "model" in given:
            raise UsageError("--shape stands for a model: it cannot be combined with --model", hint="choose one")
        if preset not in (None, "paper"):
            raise UsageError(f"no preset is called {preset}", hint="there is one: paper")
        paper = preset == "paper"
        options = BenchOptions(
            **{name: value for name, value in own.items() if value is not None},
            paper=paper,
            quarter=paper and "kv_budget" not in given,
        )
        run_bench(settings, options, display)


@app.command()
def env() -> None:
    """Show versions, devices, memory and the kernels chosen: what a bug report needs."""
    from bmx.terminal.display import Display
    from bmx.terminal.environment import environment
    from bmx.terminal.foreign import foreign_lines

    with foreign_lines(Display()):
        rows = environment()
    for name, value in rows:
        typer.echo(f"{name:14} {value}")


app.command("run")(with_flags("run", run, INPUTS))
app.command("plan-batch")(with_flags("plan-batch", plan_batch, PLAN_INPUTS))
app.command("calibrate")(with_flags("calibrate", calibrate, INPUTS))
app.command("bench")(with_flags("bench", bench, BENCH_INPUTS))
