"""Steps in which slots decode and nothing else happens: how long they take when nothing is ever evicted.

Knows how to bring sequences into slots and how to time them; what is made of the times is the caller's business.
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
from bmx.plan.planner import Plan, SlotGroup
from bmx.request import Request, SamplingParams

PART = 8  # of a slot's rows that the timed steps fill


def free_decoding(engine: Engine, plan: Plan, slots: int, rows: int, steps: int) -> float:
    """Seconds of a step in which every slot decodes, in slots of so many rows that are never full.

    The slots are filled by real prompts first, which is not timed, and neither is the first step.

    Args:
        engine: with the full cache.
        plan: says how large steps may get.
        slots, rows: how many decode together, and the KV pairs that each holds.
        steps: most to be timed.
    """
    steps = min(steps, max(1, rows // PART))
    tokens = max(1, rows - steps - 2)
    group = SlotGroup(tokens + steps + 2, slots)
    layout = engine.policy.layout(engine.spec, group.capacity)
    alone = replace(plan, groups=(group,), layouts=(layout,), prefix_slots=())
    scheduler = Scheduler(alone.groups, alone.step)
    for number in range(slots):
        scheduler.admit(_sequence(engine, number, tokens, steps + 2))
    refused = None if engine.config.enforce_eager else engine.stats.note_eager
    with device_errors(), engine.backend.runner(alone, engine.policy, refused=refused) as runner:
        _fill(scheduler, runner, alone.step.chunk_size)
        return _seconds(scheduler, runner, steps)


def _sequence(engine: Engine, number: int, tokens: int, answer: int) -> Sequence:
    """A prompt of tokens that mean nothing, and differ from sequence to sequence."""
    vocab = engine.spec.vocab
    return Sequence(
        request=Request(id=number, params=SamplingParams(max_tokens=answer, ignore_eos=True)),
        prompt=[(7919 * number + 31 * place) % vocab for place in range(tokens)],
        max_tokens=answer,
        rows_needed=tokens + answer,
        end_token_ids=frozenset(),
        tokenizer=engine.tokenizer,
    )


def _fill(scheduler: Scheduler, runner: Runner, chunk_size: int) -> None:
    """Read every prompt before any sequence decodes."""
    for sequence in scheduler.in_slots:
        while not sequence.decoding:
            step = Step((Chunk(sequence, sequence.computed, sequence.chunk_length(chunk_size)),))
            _taken(scheduler, runner, step)


def _taken(scheduler: Scheduler, runner: Runner, step: Step) -> None:
    sampled = runner.run(step)
    scheduler.launched(step)
    scheduler.update(step, sampled.read())


def _seconds(scheduler: Scheduler, runner: Runner, steps: int) -> float:
    """The mean over so many steps, after a first one."""
    _taken(scheduler, runner, _decoding(scheduler, 1))
    begun, left, on_their_way = time.perf_counter(), steps, deque[tuple[Step, Sampled]]()
    while left or on_their_way:
        if left:
            rounds = min(left, runner.rounds)
            step, left = _decoding(scheduler, rounds), left - rounds
            on_their_way.append((step, runner.run(step)))
            scheduler.launched(step)
        if not left or len(on_their_way) > runner.ahead:
            step, sampled = on_their_way.popleft()
            scheduler.update(step, sampled.read())
    return (time.perf_counter() - begun) / steps


def _decoding(scheduler: Scheduler, rounds: int) -> Step:
    """A step in which all sequences decode so many tokens."""
    return Step(tuple(Chunk(sequence, sequence.computed, rounds) for sequence in scheduler.in_slots))
