"""The front door: commands and flags. No logic: flags become a config, the config becomes a job.

Flags are made from the config's own fields, so that each setting is described once.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

import typer

from bmx.config import EngineConfig, RunConfig, Setting, all_settings, given_settings, read_yaml, setting_named
from bmx.errors import BmxError, UsageError
from bmx.model.random_models import SHAPES
from bmx.units import parse_budgets, parse_bytes, parse_count, parse_setting

if TYPE_CHECKING:
    from bmx.terminal.display import Display

ANSWERS_KEPT = "answers that were finished are kept; the same command goes on"
EXIT_SOME_FAILED = 3
EXIT_DOES_NOT_FIT = 4
COMPARED = {
    "kv_policy": "window,keydiff",
    "kv_budget": "256,25%",
    "kv_format": "auto,int8",
    "kv_layer_budgets": "uniform,measured",
}
CALIBRATED_JOB = {
    *("output_file", "overwrite", "limit", "shard", "lock_wait", "shutdown_timeout", "max_line_bytes"),
    *("served_model_name", "progress", "quiet", "log_format"),
}
PAPER = "paper: 1000,2000,4000 in, 128,256 out, KV memory a quarter of the weights, budgets a quarter of prompts."
MEASURED_JOB = {
    *("output_file", "overwrite", "lock_wait", "max_line_bytes", "served_model_name"),
    *("progress", "quiet", "log_format"),
}
WORDS = {"kv_protect", "kv_probe", "kv_probe_weight", "calibration", "prefix_reuse", "on_too_long"}  # not of a bench
PLANNED_JOB = {"limit", "shard", "max_line_bytes", "served_model_name"}  # what a plan wants to know of the job
CONFIG = Annotated[
    str | None, typer.Option("--config", "-c", envvar="BMX_CONFIG", show_envvar=False, help="YAML file of settings.")
]
INPUTS = Annotated[
    list[str], typer.Argument(metavar="INPUT...", help="JSONL files of prompts, .gz and .zst too; - is stdin.")
]
SHORT = {"output_file": "-o", "model": "-m", "quiet": "-q", "verbose": "-v"}

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
    with _ending(Display()):
        app()


@contextmanager
def _ending(display: Display, kept: str = ANSWERS_KEPT) -> Iterator[None]:
    """Turn what ends a command early into a message and an exit code.

    Args:
        kept: what is not lost by a signal.
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
        display.error(str(interrupted), kept)
        sys.exit(interrupted.exit_code)


def _open_standard_streams() -> None:
    """Open /dev/null where they are closed (``2>&-``): a file of ours with their number would get what others print."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


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
    from bmx.shutdown import Stop
    from bmx.terminal.display import Display

    stop = Stop()
    with stop.install_handlers(), _ending(Display(log_format=flags.get("log_format") or "text")):
        settings = _gathered(inputs, flags, config)
        if print_config:
            _print_config(settings)
            return
        job = settings.job
        display = Display(job.progress, quiet=job.quiet, log_format=job.log_format)
        stop.within = job.shutdown_timeout
        with _ending(display):
            _warn_of_variables(display)
            from bmx.job.job import run as run_job

            if run_job(settings, display, stop).rows_failed:
                sys.exit(EXIT_SOME_FAILED)


def _gathered(inputs: list[str] | None, flags: dict[str, Any], config_file: str | None) -> RunConfig:
    """Flags over the config file over defaults; a budget of ``auto`` is read from the calibration file."""
    from bmx.measure.calibration_file import with_calibration

    names = tuple(inputs or ())
    return RunConfig.of(names, with_calibration(names, given_settings(flags, config_file)))


def _warn_of_variables(display: Display) -> None:
    """Name variables that look like settings and are none: a misspelt one would pass unseen."""
    known = {f"BMX_{setting.name.upper()}" for _, setting in all_settings()} | {"BMX_CONFIG", "BMX_KERNELS"}
    for name in sorted(os.environ):
        if name.startswith("BMX_") and name not in known:
            display.warn(f"the variable {name} is no setting of bmx")


def plan_batch(inputs: list[str] | None, config: str | None, **flags: Any) -> None:
    """Say what fits, item by item, and how fast it would be; loads no weights.

    Prompts come from INPUT, or are imagined with --max-input and --max-tokens. The machine is this one, a card by name
    (--gpu), or any GPU by its memory (--gpu-memory).
    """
    from bmx.measure.plan_batch import PlanBatchOptions
    from bmx.measure.plan_batch import plan_batch as run_plan_batch
    from bmx.terminal.display import Display

    names = {name: flags.pop(name) for name in ("max_input", "gpu", "gpu_memory", "check", "measure", "json")}
    budgets = parse_setting("kv_budget", flags.get("kv_budget"), parse_budgets) or ()
    flags["kv_budget"] = budgets[0] if budgets else None
    settings = _gathered(inputs, flags, config)
    options = PlanBatchOptions(
        budgets=tuple(settings.engine.kv_budget if b == "auto" else b for b in budgets or ("auto",)),
        max_input=parse_setting("max_input", names["max_input"], parse_count),
        gpu=names["gpu"],
        gpu_memory=parse_setting("gpu_memory", names["gpu_memory"], parse_bytes),
        check=bool(names["check"]),
        measure=bool(names["measure"]),
        as_json=bool(names["json"]),
    )
    fits = run_plan_batch(settings, options, Display("none" if options.as_json else "auto"))
    if options.check and not fits:
        raise typer.Exit(EXIT_DOES_NOT_FIT)


def calibrate(inputs: list[str], config: str | None, **flags: Any) -> None:
    """Measure how far compressed caches are from the full one on prompts of INPUT, and recommend settings.

    The full cache answers first; then each combination of policy, budget and format is compared with it. The smallest
    that holds --min-agreement goes into <input>.calibration.json, which `bmx run --kv-budget auto` reads.
    """
    from bmx.measure.calibrate import CalibrateOptions
    from bmx.measure.calibrate import calibrate as run_calibrate
    from bmx.shutdown import Stop
    from bmx.terminal.display import Display

    own = {name: flags.pop(name) for name in ("min_agreement", "rows", "share_layers")}
    lists = {name: (flags.pop(name) or None) for name in COMPARED}
    flags["kv_budget"] = EngineConfig().kv_budget  # a file's `auto` waits for what is measured here
    stop = Stop()
    with stop.install_handlers(), _ending(Display(log_format=flags.get("log_format") or "text")):
        settings = _gathered(inputs, flags, config)
        job, engine = settings.job, settings.engine
        options = CalibrateOptions(
            policies=_listed("kv_policy", lists, engine.kv_policy),
            budgets=parse_setting("kv_budget", lists["kv_budget"], parse_budgets) or (),
            formats=_listed("kv_format", lists, engine.kv_format),  # type: ignore[arg-type]
            layers=tuple((lists["kv_layer_budgets"] or "uniform").split(",")),
            **{name: value for name, value in own.items() if value is not None},
        )
        stop.within = job.shutdown_timeout
        display = Display(job.progress, quiet=job.quiet, log_format=job.log_format)
        with _ending(display):
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
    from bmx.shutdown import Stop
    from bmx.terminal.display import Display

    own = {name: flags.pop(name) for name in ("shape", "input_tokens", "output_tokens", "prompts", "preset")}
    stop, kept = Stop(), "cells that were finished are in the output file"
    with stop.install_handlers(), _ending(Display(log_format=flags.get("log_format") or "text"), kept):
        given = (read_yaml(config) if config else {}) | {k: v for k, v in flags.items() if v is not None}
        if own["shape"] and "model" in given:
            raise UsageError("--shape stands for a model: it cannot be combined with --model", hint="choose one")
        if own["preset"] not in (None, "paper"):
            raise UsageError(f"no preset is called {own['preset']}", hint="there is one: paper")
        settings = _gathered(inputs, flags, config)
        paper = own["preset"] == "paper"
        options = BenchOptions(
            shape=own["shape"],
            input_tokens=parse_setting("input_tokens", own["input_tokens"], _counts) or (),
            output_tokens=parse_setting("output_tokens", own["output_tokens"], _counts) or (),
            prompts=parse_setting("prompts", own["prompts"], parse_count),
            paper=paper,
            quarter=paper and "kv_budget" not in given,
        )
        job = settings.job
        display = Display(job.progress, quiet=job.quiet, log_format=job.log_format)
        with _ending(display, kept):
            run_bench(settings, options, display)


def _counts(text: str) -> tuple[int, ...]:
    """Counts like ``1000,2k``."""
    return tuple(map(parse_count, text.split(",")))


def _listed(name: str, lists: dict[str, str | None], default: str) -> tuple[str, ...]:
    """Values like ``int8,int4`` of a setting that takes one."""
    setting = setting_named(name)
    return tuple(setting.coerce(part) for part in (lists[name] or default).split(","))


@app.command()
def env() -> None:
    """Show versions, devices, memory and the kernels chosen: what a bug report needs."""
    from bmx.terminal.display import environment

    for name, value in environment():
        typer.echo(f"{name:14} {value}")


def _print_config(settings: RunConfig) -> None:
    import yaml

    from bmx.terminal.display import Display

    values = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.flat().items()}
    Display().data(yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip("\n"))


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
    shown = Annotated[bool, typer.Option("--print-config", help="Show the settings in force and exit.")]
    keyword = inspect.Parameter.KEYWORD_ONLY
    first = inspect.Parameter("inputs", keyword, annotation=INPUTS)
    printing = inspect.Parameter("print_config", keyword, default=False, annotation=shown)
    return _signed(command, first, [printing, *(_flag(title, setting) for title, setting in all_settings())])


def _own_flags(own: tuple[tuple[str, Any, str], ...], panel: str) -> list[inspect.Parameter]:
    """A command's options that are no settings: name, type and help of each."""
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=False if kind is bool else None,
            annotation=Annotated[kind, typer.Option(f"--{name.replace('_', '-')}", help=note, rich_help_panel=panel)],
        )
        for name, kind, note in own
    ]


def _signed(command: Any, inputs: inspect.Parameter, parameters: list[inspect.Parameter]) -> Any:
    """``command`` with these parameters in its signature."""
    config = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=CONFIG)
    signature = inspect.Signature([inputs, config, *parameters])
    command.__signature__ = signature
    command.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    return command


def _plan_flags(command: Any) -> Any:
    """``plan_batch`` with the settings that matter to a plan, and its own."""
    inputs = Annotated[
        list[str] | None, typer.Argument(metavar="[INPUT]...", help="JSONL files of prompts; none with --max-input.")
    ]
    own = (
        ("max_input", str | None, "Prompt tokens of imagined requests, instead of an INPUT (4k)."),
        ("gpu", str | None, "Plan for this card instead of this machine (H100, RTX-4090, ...)."),
        ("gpu_memory", str | None, "Plan for a GPU with so much memory (24G)."),
        ("check", bool, "Exit 4 when not every row fits, and say what would make it fit."),
        ("measure", bool, "Load the model, run the largest step, and show predicted against measured memory."),
        ("json", bool, "Print JSON."),
    )
    shown = [(t, s) for t, s in all_settings() if t != "Job" or s.name in PLANNED_JOB]
    flags = [_flag(t, _compared(s, "512,1024,2048") if s.name == "kv_budget" else s) for t, s in shown]
    first = inspect.Parameter("inputs", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=inputs)
    return _signed(command, first, [*_own_flags(own, "Question"), *flags])


def _calibrate_flags(command: Any) -> Any:
    """``calibrate`` with the settings of a run, some of which take lists, and its own."""
    own = (
        ("min_agreement", float | None, "Share of next tokens that must be the full cache's (default 0.95)."),
        ("rows", int | None, "Prompts to measure on, evenly spread over the input (default 16)."),
        ("share_layers", int | None, "Find so many layers that can read the keys and values of another (KVSharer)."),
    )
    shown = [(t, s) for t, s in all_settings() if t != "Job" or s.name in CALIBRATED_JOB]
    flags = [_flag(t, _compared(s, COMPARED[s.name]) if s.name in COMPARED else s) for t, s in shown]
    first = inspect.Parameter("inputs", inspect.Parameter.KEYWORD_ONLY, annotation=INPUTS)
    return _signed(command, first, [*_own_flags(own, "Calibration"), *flags])


def _bench_flags(command: Any) -> Any:
    """``bench`` with the settings that matter to it, and its own."""
    inputs = Annotated[
        list[str] | None, typer.Argument(metavar="[INPUT]...", help="JSONL files of prompts; none: random token ids.")
    ]
    own = (
        ("shape", str | None, f"Random weights in the shape of a model, without a download: {', '.join(SHAPES)}."),
        ("input_tokens", str | None, "Tokens of random prompts; several to measure each: 1000,2000 (default 2000)."),
        ("output_tokens", str | None, "Tokens that each prompt is answered with; several: 128,256 (default 128)."),
        ("prompts", str | None, "Most prompts of a measurement (default: twice the slots of Batch-Max, at least 8)."),
        ("preset", str | None, PAPER),
    )
    shown = [(t, s) for t, s in all_settings() if s.name not in WORDS and (t != "Job" or s.name in MEASURED_JOB)]
    flags = [_flag(t, _for_bench(s)) for t, s in shown if not t.startswith("Sampling") or s.name == "seed"]
    first = inspect.Parameter("inputs", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=inputs)
    return _signed(command, first, [*_own_flags(own, "Bench"), *flags])


def _for_bench(setting: Setting) -> Setting:
    """A setting with the words that are true of a bench."""
    notes = {"output_file": "where the measurements go (default bench.json)", "seed": "of the random prompts"}
    notes["overwrite"] = "replace an output that exists"
    return replace(setting, note=notes.get(setting.name, setting.note))


def _compared(setting: Setting, several: str) -> Setting:
    """A setting of which several values can be compared."""
    return replace(setting, note=f"{setting.note}; several to compare: {several}", type=str | None, parse=None)


app.command("run")(_with_flags(run))
app.command("plan-batch")(_plan_flags(plan_batch))
app.command("calibrate")(_calibrate_flags(calibrate))
app.command("bench")(_bench_flags(bench))
