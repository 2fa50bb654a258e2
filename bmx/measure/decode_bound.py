"""Times decode steps of slots that are never full, so that nothing is evicted.

Knows how to fill slots and how to time their steps; what the times mean is the caller's business.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace

from bmx.engine.backend import Runner, Sampled
from bmx.engine.engine import Engine
from bmx.engine.memory_meter import device_errors
from bmx.engine.scheduler import Chunk, Scheduler, Step
from bmx.engine.sequence import Sequence
from bmx.plan.memory import SlotGroup
from bmx.plan.planner import Plan
from bmx.request import Request, SamplingParams

TIMED_SHARE = 8  # one eighth of a slot's rows is filled by the timed steps


def decode_step_seconds(engine: Engine, plan: Plan, slots: int, rows: int, steps: int) -> float:
    """Seconds of a step in which every slot decodes and none is full.

    Reading the prompts that fill the slots is not timed, and neither is the first step.

    Args:
        engine: with the full cache.
        plan: limits the size of steps.
        slots: number of slots that decode together.
        rows: KV pairs that each slot holds.
        steps: most steps to time.
    """
    steps = min(steps, max(1, rows // TIMED_SHARE))
    tokens = max(1, rows - steps - 2)
    group = SlotGroup(tokens + steps + 2, slots)
    layout = engine.policy.layout(engine.spec, group.capacity)
    plan = replace(plan, groups=(group,), layouts=(layout,), prefix_slots=(), shared_slots=())
    scheduler = Scheduler(plan.groups, plan.step)
    for number in range(slots):
        scheduler.admit(sequence_of(engine, number, tokens, steps + 2))
    refused = None if engine.config.enforce_eager else engine.stats.note_eager
    with device_errors(), engine.backend.runner(plan, engine.policy, refused=refused) as runner:
        _read_prompts(scheduler, runner, plan.step.chunk_size)
        return timed_seconds(scheduler, runner, steps)


def sequence_of(engine: Engine, number: int, tokens: int, answer: int, rows: int | None = None) -> Sequence:
    """A sequence whose prompt is arbitrary tokens, different for each number.

    Args:
        engine: gives vocabulary and tokenizer.
        number: of the sequence.
        tokens: of its prompt.
        answer: tokens that it generates.
        rows: of a slot that it needs; one for each token if left out.
    """
    vocab = engine.spec.vocab
    return Sequence(
        request=Request(id=number, params=SamplingParams(max_tokens=answer, ignore_eos=True)),
        prompt=[(7919 * number + 31 * place) % vocab for place in range(tokens)],
        max_tokens=answer,
        rows_needed=rows or tokens + answer,
        end_token_ids=frozenset(),
        tokenizer=engine.tokenizer,
    )


def _read_prompts(scheduler: Scheduler, runner: Runner, chunk_size: int) -> None:
    """Read every prompt before any sequence decodes."""
    for sequence in scheduler.in_slots:
        while not sequence.decoding:
            chunk = Chunk(sequence, sequence.computed, sequence.chunk_length(chunk_size))
            run_step(scheduler, runner, Step((chunk,)))


def run_step(scheduler: Scheduler, runner: Runner, step: Step) -> None:
    """Launch a step, and wait for its tokens."""
    sampled = runner.run(step)
    scheduler.launched(step)
    scheduler.update(step, sampled.read())


def timed_seconds(scheduler: Scheduler, runner: Runner, steps: int) -> float:
    """Mean seconds of ``steps`` decode steps, after one that is not timed."""
    run_step(scheduler, runner, decode_step(scheduler, 1))
    started, left, in_flight = time.perf_counter(), steps, deque[tuple[Step, Sampled]]()
    while left or in_flight:
        if left:
            rounds = min(left, runner.rounds)
            step, left = decode_step(scheduler, rounds), left - rounds
            in_flight.append((step, runner.run(step)))
            scheduler.launched(step)
        if not left or len(in_flight) > runner.ahead:
            step, sampled = in_flight.popleft()
            scheduler.update(step, sampled.read())
    return (time.perf_counter() - started) / steps


def decode_step(scheduler: Scheduler, rounds: int) -> Step:
    """A step in which every sequence decodes ``rounds`` tokens."""
    return Step(tuple(Chunk(sequence, sequence.computed, rounds) for sequence in scheduler.in_slots))
