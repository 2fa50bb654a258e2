"""What answers the rows of a job: a model in this process, or workers. It is loaded, measured, planned and shown.

Knows the order of these steps; how rows are answered is the business of the engine and of the fleet.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from bmx.cluster.fleet import Fleet
from bmx.cluster.worker_state import WorkerState
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
from bmx.terminal.worker_lines import worker_plan_lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Answering:
    """Loaded models with their plans.

    Attributes:
        run: answers rows, as ``Engine.run`` does under its plan.
        plans: one for each model; the first is the one that is shown.
        record: the models and their plans, for the manifest.
        fleet: the workers; None where a model in this process answers.
    """

    run: Callable[..., Generator[Result]]
    plans: Sequence[Plan]
    record: dict[str, Any]
    fleet: Fleet | None = None


def prepare(state: JobState, display: Display, stats: Stats, stack: ExitStack) -> Answering:
    """The loaded models, and their plans for the rows that are left; they are shown.

    Args:
        state: the job.
        display: shows the plan.
        stats: is told how much work there is.
        stack: ends the workers.

    Raises:
        UsageError: the records that exist are those of another version of the model.
    """
    model = _opened(state.config, state.todo.left, display, stack)
    gc.freeze()  # libraries and the model stay: searching them for garbage would take a twentieth of the time
    atexit.register(gc.unfreeze)  # Triton lists what it believes to be leaks otherwise
    described = model.describe()
    if state.ledger.has_records:
        _check_same_model(state, described)
    every = sampling_step(state.todo.left)
    with display.waiting("measuring the prompts, making the plan"):
        lengths = model.measure(state.todo.sample(state.reader, every))
        plans = model.plan(lengths) if isinstance(model, Fleet) else [model.plan(lengths)]
    for warning in model.prompt_warnings():
        display.warn(warning)
    stats.prompt_work = every * sum(length.prompt_tokens for length in lengths)
    stats.answer_work = every * sum(length.max_tokens for length in lengths)
    display.report(plan_lines(described, plans[0], lengths, state.todo.left, every, model.budget))
    budget = model.budget and model.budget.record()
    record: dict[str, Any] = {"model": described, "plan": {"kv_budget": budget} | plan_record(plans[0])}
    if isinstance(model, Fleet):
        display.report(worker_plan_lines(model.workers))
        record["workers"] = [worker_record(worker) for worker in model.workers]
        return Answering(run=model.run, plans=plans, record=record, fleet=model)
    return Answering(run=partial(model.run, plan=plans[0]), plans=plans, record=record)


def worker_record(worker: WorkerState) -> dict[str, Any]:
    """A worker and its plan, for the manifest."""
    plan = plan_record(worker.plan) if worker.plan else None
    return {"worker": worker.number, "host": worker.host, "model": worker.model, "plan": plan}


def _opened(config: RunConfig, rows: int, display: Display, stack: ExitStack) -> Engine | Fleet:
    """A model in this process, or workers that each have one."""
    engine = config.engine
    if engine.trust_remote_code and not engine.revision and not Path(engine.model).exists():
        display.warn(f"code that comes with {engine.model} runs here, whatever its newest version is: pin --revision")
    unpacked = engine.model == "demo" or engine.model.lower().endswith(".gguf")
    once = " (a GGUF file is unpacked once, then kept)" if unpacked else ""
    if config.cluster.uses_ray:
        with display.waiting(f"starting workers, loading model {engine.model} in each{once}"):
            each = replace(config, engine=config.cluster.of_each_worker(engine, rows))
            return stack.enter_context(Fleet.open(each, display.warn))
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
