"""The commands: flags become settings, settings become a job; errors become messages and exit codes.

A command's work is elsewhere and is imported when the command runs, so that ``--help`` stays fast.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from bmx import hardware
from bmx.cli.flags import known_variables, take_options, values_to_compare, with_flags
from bmx.cli.help import INPUTS, Command, Front
from bmx.cli.process import check_process
from bmx.config import EngineConfig
from bmx.errors import BmxError, UsageError
from bmx.run_config import RunConfig, given_settings, setting_named
from bmx.shutdown import Interrupted, Stop

if TYPE_CHECKING:
    from bmx.terminal.display import Display

RESUME_HINT = "finished answers are saved; run the same command again to resume"
INTERRUPTED_HINTS = {  # of other commands: RESUME_HINT
    "bench": "finished cells are in the output file",
    "plan-batch": "nothing was written",
}
REINSTALL = "install bmx again, in an environment of its own"
EXIT_SOME_FAILED = 3
EXIT_DOES_NOT_FIT = 4
ABOUT = "Offline batch LLM inference with the KV cache compressed while prompts are read (Batch-Max)."
HELP_FLAGS = {"help_option_names": ["-h", "--help"]}
MISUSE = cast("type[Exception]", typer.BadParameter.__base__)  # what typer raises for a wrong command line

app = typer.Typer(
    cls=Front, help=ABOUT, context_settings=HELP_FLAGS, rich_markup_mode=None, pretty_exceptions_enable=False
)


def main() -> None:
    """Run the command line; every expected error is one line and a hint."""
    from bmx.terminal.display import Display

    _open_standard_streams()
    display = Display()
    with _errors_shown(display):
        try:
            code = app(prog_name="bmx", standalone_mode=False)
            if sys.stdout:
                sys.stdout.flush()
        except MISUSE as misuse:
            display.error(*_said_of(misuse))
            sys.exit(UsageError.exit_code)
        except typer.Abort:
            sys.exit(Interrupted(signal.SIGINT).exit_code)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python writes when it ends
            display.error(
                f"there is no room left on a disk: {error}", "free some space, and run the same command again"
            )
            sys.exit(BmxError.exit_code)
        sys.exit(code or 0)


def _said_of(misuse: Any) -> tuple[str, str]:
    """The message and the hint about a command line that cannot be read."""
    message = " ".join(misuse.format_message().split()).rstrip(".")
    path = misuse.ctx.command_path if misuse.ctx else "bmx"
    return message[:1].lower() + message[1:], f"{path} -h shows what it takes"


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
    try:
        yield
    except BrokenPipeError:  # the reader of our output has gone, as in `bmx run ... -o - | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(0)
    except BmxError as error:
        display.error(error.message, error.hint)
        sys.exit(error.exit_code)
    except ImportError as error:
        display.error(f"a library cannot be loaded: {str(error).strip().partition(chr(10))[0]}", REINSTALL)
        sys.exit(BmxError.exit_code)
    except MemoryError:
        display.error("the system gives this process no more memory", "see `ulimit -v`, and what else runs here")
        sys.exit(EXIT_DOES_NOT_FIT)
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
    from bmx.terminal.display import Display
    from bmx.terminal.foreign import foreign_lines
    from bmx.terminal.reports import stopping_line

    stop, interrupted_hint = Stop(), INTERRUPTED_HINTS.get(command, RESUME_HINT)
    early_display = Display(log_format=flags.get("log_format") or "text")  # for errors in the settings themselves
    with stop.install_handlers(), _errors_shown(early_display, interrupted_hint):
        check_process()
        hardware.wait_briefly()
        options = take_options(command, flags)
        config = _gathered(command, inputs, flags, config_file)
        job = config.job
        stop.within = job.shutdown_timeout
        display = Display(job.progress, quiet=job.quiet, log_format=job.log_format)
        stop.acknowledge = lambda number: display.report([stopping_line(number, stop.within)])
        with foreign_lines(display), _errors_shown(display, interrupted_hint):
            yield config, options, display, stop


def _gathered(command: str, inputs: list[str] | None, flags: dict[str, Any], config_file: str | None) -> RunConfig:
    """Flags over the config file over defaults; a budget of ``auto`` is read from the calibration file."""
    from bmx.measure.calibration_file import with_calibration

    names = tuple(inputs or ())
    return RunConfig.of(names, with_calibration(names, given_settings(flags, config_file)), command)


@app.callback(invoke_without_command=True)
def front(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Show the version")] = False
) -> None:
    """What ``bmx`` does by itself: show its version, or its front page."""
    if version:
        from bmx import __version__

        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def run(inputs: list[str], config: str | None, **flags: Any) -> None:
    """Answer every prompt of INPUT, as many at once as memory allows.

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

    values = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.flat().items()}
    for name, value in values.items():
        if setting_named(name).from_file and str(value).startswith("@"):
            values[name] = f"@{value}"  # in a file of settings, a single @ would name a file
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

    budgets = values_to_compare("kv_budget", flags["kv_budget"])
    flags["kv_budget"] = budgets[0] if budgets else None
    with _session("plan-batch", inputs, config, flags) as (settings, own, display, _):
        as_json = own.pop("json")
        resolved = tuple(settings.engine.kv_budget if budget == "auto" else budget for budget in budgets or ("auto",))
        if own["shape"] and "model" in settings.given:
            raise UsageError("--shape stands for a model: it cannot be combined with --model", hint="choose one")
        options = PlanBatchOptions(budgets=resolved, as_json=as_json, **own)
        fits = run_plan_batch(settings, options, Display("none") if as_json else display)
        if options.check and not fits:
            sys.exit(EXIT_DOES_NOT_FIT)


def calibrate(inputs: list[str], config: str | None, **flags: Any) -> None:
    """Measure how far compressed caches are from the full one on prompts of INPUT, and recommend settings.

    The full cache answers first; then each combination of policy, budget, format and archive is compared with it: 14 if
    nothing else is asked for. The smallest that holds --min-agreement goes into <input>.calibration.json, which `bmx
    run --kv-budget auto` reads.
    """
    from bmx.measure.calibrate import CalibrateOptions
    from bmx.measure.calibrate import calibrate as run_calibrate
    from bmx.measure.candidates import Axes

    layers = flags.pop("kv_layer_budgets")
    names = ("kv_policy", "kv_budget", "kv_format", "kv_archive")
    compared = {name: values_to_compare(name, flags.pop(name) or None) for name in names}
    flags["kv_archive"] = max(compared["kv_archive"], key=lambda archive: archive != "none", default=None)  # for recall
    flags["kv_budget"] = EngineConfig().kv_budget  # a config file's `auto` would read what is measured here
    with _session("calibrate", inputs, config, flags) as (settings, own, display, stop):
        given = {
            name: compared[name] or ((getattr(settings.engine, name),) if name in settings.given else ())
            for name in ("kv_format", "kv_archive")
        }
        axes = Axes(
            policies=compared["kv_policy"] or (settings.engine.kv_policy,),
            budgets=compared["kv_budget"],
            formats=given["kv_format"],
            archives=given["kv_archive"],
            layers=tuple((layers or "uniform").split(",")),
        )
        options = CalibrateOptions(axes=axes, **{name: value for name, value in own.items() if value is not None})
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
        preset = own.pop("preset")
        if own["shape"] and "model" in settings.given:
            raise UsageError("--shape stands for a model: it cannot be combined with --model", hint="choose one")
        paper = preset == "paper"
        options = BenchOptions(
            **{name: value for name, value in own.items() if value is not None},
            paper=paper,
            quarter=paper and "kv_budget" not in settings.given,
        )
        run_bench(settings, options, display)


def env() -> None:
    """Show versions, devices, memory and the kernels chosen: what a bug report needs."""
    from bmx.terminal.display import Display
    from bmx.terminal.environment import environment
    from bmx.terminal.foreign import foreign_lines

    with foreign_lines(Display()):
        rows = environment()
    for name, value in rows:
        typer.echo(f"{name:14} {value}")


def _add(name: str, function: Any) -> None:
    """Make a function a command, with its help and, if it takes settings, their flags."""
    app.command(name, cls=Command, context_settings=HELP_FLAGS)(
        with_flags(name, function, *INPUTS[name]) if name in INPUTS else function
    )


_add("run", run)
_add("plan-batch", plan_batch)
_add("calibrate", calibrate)
_add("bench", bench)
_add("env", env)
