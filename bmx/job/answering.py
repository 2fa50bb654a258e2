"""What answers the rows of a job: a model in this process. It is loaded, measured, planned and shown.

Knows the order of these steps; how rows are answered is the business of the engine.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bmx.engine.engine import Engine
from bmx.engine.prompt_lengths import sampling_step
from bmx.errors import UsageError
from bmx.job.job_state import JobState
from bmx.job.journal import REMEDY
from bmx.plan.planner import Plan, plan_record
from bmx.request import Result
from bmx.run_config import RunConfig
from bmx.stats import Stats
from bmx.terminal.display import Display
from bmx.terminal.reports import plan_lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Answering:
    """Loaded models with their plans.

    Attributes:
        run: answers rows, as ``Engine.run`` does under its plan.
        plans: one for each model; the first is the one that is shown.
        record: the models and their plans, for the manifest.
    """

    run: Callable[..., Generator[Result]]
    plans: Sequence[Plan]
    record: dict[str, Any]


def prepare(state: JobState, display: Display, stats: Stats) -> Answering:
    """The loaded models, and their plans for the rows that are left; they are shown.

    Args:
        state: the job.
        display: shows the plan.
        stats: is told how much work there is.

    Raises:
        UsageError: the records that exist are those of another version of the model.
    """
    model = _opened(state.config, display)
    gc.freeze()  # libraries and the model stay: searching them for garbage would take a twentieth of the time
    atexit.register(gc.unfreeze)  # Triton lists what it believes to be leaks otherwise
    described = model.describe()
    if state.ledger.has_records:
        _check_same_model(state, described)
    every = sampling_step(state.todo.left)
    with display.waiting("measuring the prompts, making the plan"):
        lengths = model.measure(state.todo.sample(state.reader, every))
        plans = [model.plan(lengths)]
    for warning in model.prompt_warnings():
        display.warn(warning)
    stats.prompt_work = every * sum(length.prompt_tokens for length in lengths)
    stats.answer_work = every * sum(length.max_tokens for length in lengths)
    display.report(plan_lines(described, plans[0], lengths, state.todo.left, every, model.budget))
    budget = model.budget and model.budget.record()
    record = {"model": described, "plan": {"kv_budget": budget} | plan_record(plans[0])}
    return Answering(run=partial(model.run, plan=plans[0]), plans=plans, record=record)


def _opened(config: RunConfig, display: Display) -> Engine:
    """The loaded model."""
    engine = config.engine
    if engine.trust_remote_code and not engine.revision and not Path(engine.model).exists():
        display.warn(f"code that comes with {engine.model} runs here, whatever its newest version is: pin --revision")
    unpacked = engine.model == "demo" or engine.model.lower().endswith(".gguf")
    once = " (a GGUF file is unpacked once, then kept)" if unpacked else ""
    if config.cluster.uses_ray:
        raise UsageError("several workers cannot answer a job yet", hint="leave --workers and --ray-address out")
    with display.waiting(f"loading model {engine.model}{once}"):
        return Engine.open(config.engine, config.prompt)


def _check_same_model(state: JobState, model: dict[str, Any]) -> None:
    """Refuse to resume with a model that has changed at its source.

    Raises:
        UsageError: names both.
    """
    earlier = (state.manifest or {}).get("model", model)
    for name in ("commit", "dtype"):
        if earlier.get(name) not in (None, model[name]):
            flag = f"--{'revision' if name == 'commit' else name} {earlier.get(name)}"
            raise UsageError(
                f"the output {state.paths.output} was made with {name} {earlier.get(name)} of the model, "
                f"now {model[name]}",
                hint=f"{flag} resumes with the earlier one; {REMEDY}",
            )
