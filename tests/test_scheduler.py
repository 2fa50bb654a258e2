"""The scheduler under random loads: every token once and in order, no slot shared, always progress; without tensors."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmx.engine.scheduler import Scheduler, Step
from bmx.engine.sequence import Sequence
from bmx.planner import SlotGroup
from bmx.request import Request, SamplingParams

END, WORD = 0, 1


class Letters:
    """A tokenizer that nothing here depends on."""

    def decode(self, ids, **_):
        return "x" * len(ids)


@dataclass(frozen=True)
class Job:
    """A request by its sizes; `last` is the number of the token that ends it early, `broken` whether by no number."""

    prompt: int
    max_tokens: int
    last: int = 10**9
    broken: bool = False

    def sequence(self, name: str, budget: int = 10**9) -> Sequence:
        params = SamplingParams(max_tokens=self.max_tokens, stop_token_ids=(END,))
        return Sequence(
            request=Request(id=name, prompt="", params=params),
            prompt=[WORD] * self.prompt,
            max_tokens=self.max_tokens,
            rows_needed=min(self.prompt + self.max_tokens, budget),
            end_token_ids=frozenset(),
            tokenizer=Letters(),
        )

    def next_token(self, answered: int) -> int | None:
        if answered + 1 < self.last:
            return WORD
        return None if self.broken else END


@dataclass(frozen=True)
class Load:
    """What a scheduler is given."""

    jobs: tuple[Job, ...]
    groups: tuple[SlotGroup, ...]
    budget: int
    chunk_size: int
    max_tokens: int


@dataclass
class Trace:
    """What a scheduler did: its steps, who was running before each, and the sequences by name."""

    steps: list[Step] = field(default_factory=list)
    running: list[list[Sequence]] = field(default_factory=list)
    sequences: dict[str, Sequence] = field(default_factory=dict)
    finished: list[str] = field(default_factory=list)

    def chunks(self) -> dict[str, list[tuple[int, int]]]:
        """(start, length) of each sequence's chunks, in order."""
        found = defaultdict(list)
        for step in self.steps:
            for chunk in step.chunks:
                found[chunk.sequence.request.id].append((chunk.start, chunk.length))
        return found

    def prompt_chunks(self) -> dict[str, list[tuple[int, int]]]:
        """The same of prompts alone."""
        return {
            name: [chunk for chunk in chunks if chunk[0] < len(self.sequences[name].prompt)]
            for name, chunks in self.chunks().items()
        }


def drive(load: Load) -> Trace:
    """Run a load to its end as the engine does: admit in order whoever finds a slot, schedule, update."""
    scheduler = Scheduler(load.groups, load.chunk_size, load.max_tokens)
    jobs = {str(i): job for i, job in enumerate(load.jobs)}
    trace = Trace(sequences={name: job.sequence(name, load.budget) for name, job in jobs.items()})
    waiting, running = list(trace.sequences.values()), []
    most_steps = sum(sequence.total for sequence in waiting)
    for steps in count():
        admitted = [sequence for sequence in waiting if scheduler.admit(sequence)]
        waiting = [sequence for sequence in waiting if sequence not in admitted]
        running += admitted
        assert scheduler.running == len(running)
        step = scheduler.schedule()
        if step is None:
            assert not running
            assert not waiting
            return trace
        assert steps < most_steps
        trace.steps.append(step)
        trace.running.append(list(running))
        sampling = [chunk.sequence for chunk in step.chunks if chunk.samples]
        finished = scheduler.update(step, [jobs[s.request.id].next_token(len(s.answer)) for s in sampling])
        trace.finished += [sequence.request.id for sequence in finished]
        running = [sequence for sequence in running if sequence not in finished]
    raise AssertionError


@st.composite
def loads(draw):
    job = st.builds(Job, st.integers(1, 60), st.integers(1, 12), st.integers(1, 14), st.booleans())
    jobs = tuple(draw(st.lists(job, min_size=1, max_size=12)))
    budget = draw(st.integers(4, 100))
    largest = max(job.sequence("").rows_needed for job in jobs)
    capacities = {*draw(st.lists(st.integers(1, 72), max_size=3)), min(largest, budget)}
    groups = tuple(SlotGroup(capacity, draw(st.integers(1, 4))) for capacity in sorted(capacities))
    return Load(jobs, groups, budget, draw(st.integers(1, 20)), draw(st.integers(1, 48)))


FUZZ = settings(max_examples=150, deadline=None, derandomize=True)


@FUZZ
@given(loads())
def test_every_token_is_computed_once_and_in_order(load):
    trace = drive(load)
    chunks = trace.chunks()
    for name, sequence in trace.sequences.items():
        computed = [start + i for start, length in chunks[name] for i in range(length)]
        unseen_last = 0 if sequence.error else 1  # the last token of an answer is never read by the model
        assert computed == list(range(len(sequence.prompt) + len(sequence.answer) - unseen_last))
        assert sequence.computed == len(computed)


@FUZZ
@given(loads())
def test_all_finish_once_and_as_they_should(load):
    trace = drive(load)
    assert sorted(trace.finished) == sorted(trace.sequences)
    for job, sequence in zip(load.jobs, trace.sequences.values(), strict=True):
        if job.last > job.max_tokens:
            assert (sequence.finish_reason, len(sequence.answer)) == ("length", job.max_tokens)
        elif job.broken:
            assert (sequence.finish_reason, len(sequence.answer)) == ("error", job.last - 1)
        else:
            assert (sequence.finish_reason, len(sequence.answer)) == ("stop", job.last)


@FUZZ
@given(loads())
def test_no_two_sequences_are_in_a_slot_and_each_slot_is_large_enough(load):
    for running in drive(load).running:
        homes = [sequence.slot for sequence in running]
        assert len(set(homes)) == len(homes)
        for sequence, (group, slot) in zip(running, homes, strict=True):
            assert load.groups[group].capacity >= sequence.rows_needed
            assert 0 <= slot < load.groups[group].slots


@FUZZ
@given(loads())
def test_a_sequence_keeps_its_slot_until_it_is_done(load):
    trace = drive(load)
    homes = defaultdict(set)
    for step in trace.steps:
        for chunk in step.chunks:
            homes[chunk.sequence.request.id].add(chunk.sequence.slot)
    assert all(len(home) == 1 for home in homes.values())


def prompts_of(step: Step, trace: Trace) -> list:
    starts = {name: len(sequence.prompt) for name, sequence in trace.sequences.items()}
    return [chunk for chunk in step.chunks if chunk.start < starts[chunk.sequence.request.id]]


@FUZZ
@given(loads())
def test_a_step_holds_every_decoding_sequence_and_then_prompts_within_the_token_budget(load):
    trace = drive(load)
    computed = dict.fromkeys(trace.sequences, 0)
    slots = sum(group.slots for group in load.groups)
    for step, running in zip(trace.steps, trace.running, strict=True):
        decoding = {s.request.id for s in running if computed[s.request.id] >= len(s.prompt)}
        prompts = prompts_of(step, trace)
        heads = step.chunks[: len(decoding)]
        assert {chunk.sequence.request.id for chunk in heads} == decoding
        assert all(chunk.length == 1 for chunk in heads)
        assert [chunk.sequence.slot for chunk in heads] == sorted(chunk.sequence.slot for chunk in heads)
        assert tuple(step.chunks[len(decoding) :]) == tuple(prompts)
        assert step.tokens <= load.max_tokens or len(prompts) <= 1
        assert step.tokens <= max(load.max_tokens, slots + load.chunk_size)  # what the memory plan counts on
        for chunk in step.chunks:
            computed[chunk.sequence.request.id] += chunk.length


@FUZZ
@given(loads())
def test_the_prompt_that_was_admitted_first_is_never_passed_over(load):
    trace = drive(load)
    computed = dict.fromkeys(trace.sequences, 0)
    for step, running in zip(trace.steps, trace.running, strict=True):
        reading = [s.request.id for s in running if computed[s.request.id] < len(s.prompt)]
        served = [chunk.sequence.request.id for chunk in prompts_of(step, trace)]
        assert served == reading[: len(served)]
        assert bool(served) == bool(reading)
        for chunk in step.chunks:
            computed[chunk.sequence.request.id] += chunk.length


@FUZZ
@given(loads(), st.integers(1, 48))
def test_where_a_prompt_is_cut_depends_on_that_prompt_alone(load, max_tokens):
    """What is evicted depends on where chunks end: in company, alone and with another token budget it is the same."""
    together = drive(load).prompt_chunks()
    for i, job in enumerate(load.jobs):
        room = (SlotGroup(job.prompt + job.max_tokens, 1),)
        alone = drive(Load((job,), room, load.budget, load.chunk_size, max_tokens))
        assert together[str(i)] == alone.prompt_chunks()["0"]


@FUZZ
@given(st.integers(1, 3000), st.integers(1, 600))
def test_chunks_are_as_few_and_as_even_as_can_be(prompt, chunk_size):
    trace = drive(Load((Job(prompt, 1),), (SlotGroup(prompt + 1, 1),), 10**9, chunk_size, 1))
    lengths = [length for _, length in trace.prompt_chunks()["0"]]
    assert sum(lengths) == prompt
    assert len(lengths) == -(-prompt // chunk_size)
    assert max(lengths) <= chunk_size
    assert max(lengths) - min(lengths) <= 1


def test_prompts_share_a_step_as_long_as_they_fit():
    load = Load((Job(10, 1),) * 5, (SlotGroup(11, 5),), 100, chunk_size=10, max_tokens=30)
    assert [step.tokens for step in drive(load).steps] == [30, 20]


def test_a_prompt_chunk_larger_than_the_budget_goes_alone():
    load = Load((Job(10, 1),) * 2, (SlotGroup(11, 2),), 100, chunk_size=10, max_tokens=3)
    assert [step.tokens for step in drive(load).steps] == [10, 10]


@pytest.mark.parametrize(("needs", "capacity"), [(1, 16), (16, 16), (17, 64), (64, 64)])
def test_a_sequence_gets_the_smallest_slot_that_is_large_enough(needs, capacity):
    scheduler = Scheduler([SlotGroup(64, 1), SlotGroup(16, 1)], chunk_size=8, max_num_batched_tokens=8)
    sequence = Job(needs, 1).sequence("a", budget=needs)
    assert scheduler.admit(sequence)
    assert scheduler.capacity(sequence) == capacity


def test_a_sequence_waits_while_no_slot_is_large_enough():
    scheduler = Scheduler([SlotGroup(16, 2), SlotGroup(64, 1)], chunk_size=8, max_num_batched_tokens=8)
    assert scheduler.largest == 64
    assert scheduler.admit(Job(40, 2).sequence("a"))
    assert not scheduler.admit(Job(40, 2).sequence("b"))
    assert scheduler.admit(Job(10, 2).sequence("c"))
    assert not scheduler.admit(Job(64, 1).sequence("d"))
    assert scheduler.running == 2


def test_a_freed_slot_serves_the_next_sequence():
    load = Load((Job(5, 2),) * 3, (SlotGroup(7, 1),), 100, chunk_size=5, max_tokens=5)
    trace = drive(load)
    assert {sequence.slot for sequence in trace.sequences.values()} == {(0, 0)}
    assert [len(running) for running in trace.running] == [1] * 6
    assert trace.finished == ["0", "1", "2"]


def test_held_tokens_are_those_computed_by_the_sequences_that_run():
    scheduler = Scheduler([SlotGroup(16, 2)], chunk_size=4, max_num_batched_tokens=8)
    for name, length in (("a", 4), ("b", 8)):
        assert scheduler.admit(Job(length, 3).sequence(name))
    assert scheduler.held_tokens == [0, 0]
    step = scheduler.schedule()
    assert scheduler.update(step, [WORD]) == []
    assert scheduler.held_tokens == [4, 4]


def test_an_idle_scheduler_has_no_step():
    assert Scheduler([SlotGroup(16, 2)], chunk_size=4, max_num_batched_tokens=8).schedule() is None


def test_the_scheduler_loads_neither_torch_nor_transformers():
    code = "import sys, bmx.engine.scheduler; print(*sorted({'torch', 'transformers'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "\n"
