"""The scheduler under random loads: every token once and in order, no slot shared, always progress; without tensors."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field, replace
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmx.engine.scheduler import Scheduler, Step
from bmx.engine.sequence import Sequence
from bmx.kv.layout import NOT_READING, SlotIndex
from bmx.plan.chunks import chunk_ends
from bmx.plan.memory import SlotGroup, StepSize
from bmx.request import Request, SamplingParams

END, WORD = 0, 1


class Letters:
    """A tokenizer of 26 tokens, a letter each."""

    def decode(self, ids, **_):
        return "".join(chr(ord("a") + i % 26) for i in ids)


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
    draining: bool = False
    reading: int | None = None

    @property
    def size(self) -> StepSize:
        return StepSize(chunk_size=self.chunk_size, max_num_batched_tokens=self.max_tokens)

    def urgency(self, sequence: Sequence) -> tuple[int, int]:
        """Who comes before whom: in the order of the file, or, when no more will come, the longest first."""
        chunks = -(-len(sequence.prompt) // self.chunk_size)
        return (-(chunks + sequence.max_tokens) if self.draining else 0, int(sequence.request.id))


@dataclass
class Trace:
    """What a scheduler did: its steps, who was running and waiting before each, and the sequences by name."""

    steps: list[Step] = field(default_factory=list)
    running: list[list[Sequence]] = field(default_factory=list)
    waiting: list[list[Sequence]] = field(default_factory=list)
    sequences: dict[str, Sequence] = field(default_factory=dict)
    finished: list[str] = field(default_factory=list)
    reading: list[list[int]] = field(default_factory=list)

    def chunks(self) -> dict[str, list[tuple[int, int]]]:
        """(start, length) of each sequence's chunks, in order."""
        chunks = defaultdict(list)
        for step in self.steps:
            for chunk in step.chunks:
                chunks[chunk.sequence.request.id].append((chunk.start, chunk.length))
        return chunks

    def prompt_chunks(self) -> dict[str, list[tuple[int, int]]]:
        """The same of prompts alone."""
        return {
            name: [chunk for chunk in chunks if chunk[0] < len(self.sequences[name].prompt)]
            for name, chunks in self.chunks().items()
        }


def scheduler_of(groups, chunk_size=8, max_tokens=8) -> Scheduler:
    return Scheduler(groups, StepSize(chunk_size=chunk_size, max_num_batched_tokens=max_tokens))


def drive(load: Load) -> Trace:
    """Run a load to its end as the engine does: admit whoever finds a slot, schedule, update."""
    scheduler = Scheduler(load.groups, load.size, load.reading)
    jobs = {str(i): job for i, job in enumerate(load.jobs)}
    trace = Trace(sequences={name: job.sequence(name, load.budget) for name, job in jobs.items()})
    for sequence in trace.sequences.values():
        scheduler.enqueue(sequence)
    most_steps = sum(sequence.total for sequence in scheduler.waiting)
    running: list[Sequence] = []
    for steps in count():
        before = list(scheduler.waiting)
        scheduler.admit_waiting(load.draining)
        running += sorted((s for s in before if s not in scheduler.waiting), key=load.urgency)
        assert scheduler.running == len(running)
        assert set(scheduler.unfinished) == {*running, *scheduler.waiting}
        step = scheduler.schedule()
        if step is None:
            assert not running
            assert not scheduler.waiting
            return trace
        assert steps < most_steps
        trace.steps.append(step)
        trace.running.append(list(running))
        trace.waiting.append(list(scheduler.waiting))
        trace.reading.append([sequence.slot_index.reading for sequence in running if not sequence.decoding])
        sampling = [chunk.sequence for chunk in step.chunks if chunk.samples]
        scheduler.launched(step)
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
    return Load(jobs, groups, budget, draw(st.integers(1, 20)), draw(st.integers(1, 48)), draw(st.booleans()))


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
        for sequence, (group, slot, _) in zip(running, homes, strict=True):
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


@FUZZ
@given(loads(), st.integers(1, 3))
def test_a_prompt_has_a_slot_to_read_in_for_itself_and_frees_it_when_it_is_read(load, slots):
    trace = drive(replace(load, reading=slots))
    assert sorted(trace.finished) == sorted(trace.sequences)
    for reading in trace.reading:
        assert len(set(reading)) == len(reading) <= slots
        assert set(reading) <= set(range(slots))
    assert {sequence.slot_index.reading for sequence in trace.sequences.values()} == {NOT_READING}


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
def test_chunks_are_as_few_as_can_be_and_the_last_two_are_even(prompt, chunk_size):
    trace = drive(Load((Job(prompt, 1),), (SlotGroup(prompt + 1, 1),), 10**9, chunk_size, 1))
    lengths = [length for _, length in trace.prompt_chunks()["0"]]
    assert sum(lengths) == prompt
    assert len(lengths) == -(-prompt // chunk_size)
    assert max(lengths) <= chunk_size
    assert set(lengths[:-2]) <= {chunk_size}
    assert lengths[-1] - lengths[-2 % len(lengths)] in {0, 1}


@pytest.mark.parametrize(
    ("tokens", "ends"),
    [(1, [1]), (500, [500]), (512, [512]), (600, [300, 600]), (1024, [512, 1024]), (1300, [512, 906, 1300])],
)
def test_where_chunks_end(tokens, ends):
    assert chunk_ends(tokens, 512) == ends


@FUZZ
@given(st.integers(1, 3000), st.integers(1, 600))
def test_ends_before_an_end_are_multiples_of_the_chunk_size(prompt, chunk_size):
    """So that two prompts which both have a chunk end at some place have had the same ends before."""
    *before, _ = chunk_ends(prompt, chunk_size)
    for i, end in enumerate(before):
        assert before[:i] == list(range(chunk_size, end, chunk_size))


def test_prompts_share_a_step_as_long_as_they_fit():
    load = Load((Job(10, 1),) * 5, (SlotGroup(11, 5),), 100, chunk_size=10, max_tokens=30)
    assert [step.tokens for step in drive(load).steps] == [30, 20]


def test_a_prompt_chunk_larger_than_the_budget_goes_alone():
    load = Load((Job(10, 1),) * 2, (SlotGroup(11, 2),), 100, chunk_size=10, max_tokens=3)
    assert [step.tokens for step in drive(load).steps] == [10, 10]


@pytest.mark.parametrize(("needs", "capacity"), [(1, 16), (16, 16), (17, 64), (64, 64)])
def test_a_sequence_gets_the_smallest_slot_that_is_large_enough(needs, capacity):
    scheduler = scheduler_of([SlotGroup(64, 1), SlotGroup(16, 1)])
    sequence = Job(needs, 1).sequence("a", budget=needs)
    assert scheduler.admit(sequence)
    assert scheduler.capacity(sequence) == capacity


def test_a_sequence_waits_while_no_slot_is_large_enough():
    scheduler = scheduler_of([SlotGroup(16, 2), SlotGroup(64, 1)])
    assert scheduler.largest == 64
    assert scheduler.admit(Job(40, 2).sequence("a"))
    assert not scheduler.admit(Job(40, 2).sequence("b"))
    assert scheduler.admit(Job(10, 2).sequence("c"))
    assert not scheduler.admit(Job(64, 1).sequence("d"))
    assert scheduler.running == 2


def test_a_freed_slot_serves_the_next_sequence():
    load = Load((Job(5, 2),) * 3, (SlotGroup(7, 1),), 100, chunk_size=5, max_tokens=5)
    trace = drive(load)
    assert {sequence.slot for sequence in trace.sequences.values()} == {SlotIndex(0, 0)}
    assert [len(running) for running in trace.running] == [1] * 6
    assert trace.finished == ["0", "1", "2"]


def test_held_tokens_are_those_computed_by_the_sequences_that_run():
    scheduler = scheduler_of([SlotGroup(16, 2)], chunk_size=4)
    for name, length in (("a", 4), ("b", 8)):
        assert scheduler.admit(Job(length, 3).sequence(name))
    assert scheduler.held_tokens == [0, 0]
    step = scheduler.schedule()
    scheduler.launched(step)
    assert scheduler.update(step, [WORD]) == []
    assert scheduler.held_tokens == [4, 4]


def test_an_idle_scheduler_has_no_step():
    assert scheduler_of([SlotGroup(16, 2)]).schedule() is None


# ---- who comes first ----


@FUZZ
@given(loads())
def test_no_slot_is_idle_that_someone_waiting_could_have(load):
    trace = drive(load)
    for running, waiting in zip(trace.running, trace.waiting, strict=True):
        taken = [sequence.slot for sequence in running]
        idle = [
            group.capacity
            for i, group in enumerate(load.groups)
            for slot in range(group.slots)
            if SlotIndex(i, slot) not in taken
        ]
        assert all(capacity < sequence.rows_needed for capacity in idle for sequence in waiting)


@FUZZ
@given(loads())
def test_whoever_passes_another_takes_a_slot_that_is_too_small_for_it(load):
    """Without draining the order is the file's; when no more will come it is the longest first."""
    trace = drive(load)
    before: list[Sequence] = []
    for running, waiting in zip(trace.running, trace.waiting, strict=True):
        for sequence in running:
            if sequence not in before:
                passed = [other for other in waiting if load.urgency(other) < load.urgency(sequence)]
                capacity = load.groups[sequence.slot[0]].capacity
                assert all(other.rows_needed > capacity for other in passed)
        before = running


ASCENDING = tuple(Job(4, answer) for answer in range(2, 42))  # the worst order there is: the longest come last
ONE_IS_LONG = (*[Job(4, 6)] * 40, Job(4, 60))
LONG_PROMPT_LAST = (*[Job(4, 6)] * 40, Job(240, 1))


def orders(jobs, slots=4):
    """What happens in the file's order, and with the longest first."""
    groups = (SlotGroup(max(job.prompt + job.max_tokens for job in jobs), slots),)
    return [drive(Load(jobs, groups, 10**9, 4, 10**6, draining)) for draining in (False, True)]


def tail(trace, slots=4):
    """Steps in which some slot is empty."""
    return sum(len(running) < slots for running in trace.running)


@pytest.mark.parametrize("jobs", [ASCENDING, ONE_IS_LONG, LONG_PROMPT_LAST], ids=["ascending", "answer", "prompt"])
def test_a_drained_job_takes_fewer_steps_and_leaves_no_long_row_to_run_alone(jobs):
    in_order, drained = orders(jobs)
    lengths = [len(chunks) for chunks in drained.chunks().values()]
    assert len(drained.steps) < len(in_order.steps)
    assert len(drained.steps) <= max(*lengths, -(-sum(lengths) // 4) + min(lengths))
    assert tail(drained) <= min(lengths) < tail(in_order)


@pytest.mark.parametrize("jobs", [ASCENDING, ASCENDING[::-1], ONE_IS_LONG], ids=["ascending", "descending", "answer"])
def test_without_draining_the_order_of_the_file_is_kept(jobs):
    in_order, _ = orders(jobs)
    admitted = list(dict.fromkeys(s.request.id for running in in_order.running for s in running))
    assert admitted == [str(i) for i in range(len(jobs))]


def test_rows_of_one_length_are_drained_in_the_order_of_the_file():
    _, drained = orders((Job(6, 3),) * 9, slots=2)
    assert drained.finished == [str(i) for i in range(9)]


@FUZZ
@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 60))
def test_a_sequence_stays_for_its_chunks_and_its_answer(prompt, answer, chunk_size):
    """As the order of draining and the shares of slots have it; the last token of an answer is never read."""
    trace = drive(Load((Job(prompt, answer),), (SlotGroup(prompt + answer, 1),), 10**9, chunk_size, 10**6))
    assert len(trace.steps) == -(-prompt // chunk_size) + answer - 1
    assert 0 <= trace.sequences["0"].steps(chunk_size) - len(trace.steps) <= 1


def test_what_no_slot_can_ever_hold_waits_no_longer():
    scheduler = scheduler_of([SlotGroup(16, 1), SlotGroup(64, 1)])
    sizes = {"a": 65, "b": 64, "c": 500, "d": 10, "e": 17}
    for name, rows in sizes.items():
        scheduler.enqueue(Job(rows - 2, 2).sequence(name))
    assert [sequence.request.id for sequence in scheduler.reject_too_large()] == ["a", "c"]
    assert [sequence.request.id for sequence in scheduler.waiting] == ["b", "d", "e"]
    assert scheduler.reject_too_large() == []
    scheduler.admit_waiting()
    assert scheduler.running == 2
    assert scheduler.reject_too_large() == []  # "e" finds no slot now, and will later
    assert [sequence.request.id for sequence in scheduler.waiting] == ["e"]


# ---- beginning again ----


class Speaker:
    """Stands for a model whose next token is drawn, each from the sequence's own random numbers."""

    def __init__(self, **params):
        self.params = SamplingParams(**{"max_tokens": 12, "temperature": 1.0} | params)

    def sequence(self, name: str = "row", *, prompt: int = 9, seeded: bool = False) -> Sequence:
        return Sequence(
            request=Request(id=name, prompt="", params=self.params, seeded=seeded),
            prompt=[WORD] * prompt,
            max_tokens=self.params.max_tokens,
            rows_needed=prompt + self.params.max_tokens,
            end_token_ids=frozenset(),
            tokenizer=Letters(),
        )

    def run(self, sequences, groups, most_steps=10**9, chunk_size=4):
        """Up to so many steps; who is not finished is returned."""
        scheduler = scheduler_of(groups, chunk_size, 100)
        for sequence in sequences:
            scheduler.enqueue(sequence)
        for _ in range(most_steps):
            scheduler.admit_waiting()
            step = scheduler.schedule()
            if step is None:
                break
            sampling = [chunk.sequence for chunk in step.chunks if chunk.samples]
            scheduler.launched(step)
            scheduler.update(step, [int(26 * sequence.draw()) for sequence in sampling])
        return scheduler.unfinished


ROOM = (SlotGroup(40, 5),)
SPEAKERS = {
    "greedy": Speaker(temperature=0.0),
    "sampling": Speaker(),
    "sampling with a seed": Speaker(seed=7),
    "stop strings": Speaker(stop=("e", "ab", "fgh"), max_tokens=20),
    "stop tokens": Speaker(stop_token_ids=(3, 4)),
}


@pytest.mark.parametrize("seeded", [False, True], ids=["job's seed", "own seed"])
@pytest.mark.parametrize("speaker", SPEAKERS.values(), ids=SPEAKERS)
@pytest.mark.parametrize("steps", [1, 3, 4, 7])
def test_a_sequence_that_begins_again_answers_as_if_it_had_not(speaker, steps, seeded):
    """Begun among five, broken off after some steps, begun again alone; and once more."""
    undisturbed = [speaker.sequence(str(i), seeded=seeded) for i in range(5)]
    assert speaker.run(undisturbed, ROOM) == []
    disturbed = [speaker.sequence(str(i), seeded=seeded) for i in range(5)]
    for groups in (ROOM, (SlotGroup(25, 2), SlotGroup(40, 1))):
        unfinished = speaker.run([s for s in disturbed if not s.finish_reason], groups, most_steps=steps)
        assert unfinished
        again = {sequence.request.id: sequence.restarted() for sequence in unfinished}
        for sequence in again.values():
            assert (sequence.computed, sequence.promised, sequence.answer, sequence.slot) == (0, 0, [], None)
        disturbed = [again.get(sequence.request.id, sequence) for sequence in disturbed]
    assert speaker.run([s for s in disturbed if not s.finish_reason], (SlotGroup(40, 1),)) == []
    for first, again in zip(undisturbed, disturbed, strict=True):
        assert again.result(40) == first.result(40)
    if speaker.params.temperature and not seeded:
        assert len({sequence.result(40).text for sequence in undisturbed}) > 1


def test_random_numbers_begin_again_with_the_sequence():
    sequence = Speaker().sequence()
    first = [sequence.draw() for _ in range(20)]
    assert len(set(first)) == 20
    sequence = sequence.restarted()
    assert [sequence.draw() for _ in range(20)] == first


def test_half_a_stop_string_is_forgotten():
    """`a` before it began again and `b` after are not the `ab` that ends an answer."""
    sequence = Speaker(stop=("ab",), max_tokens=4).sequence()
    sequence.accept(0)
    sequence = sequence.restarted()
    for token in (1, 0, 2, 3):
        assert sequence.finish_reason is None
        sequence.accept(token)
    assert sequence.finish_reason == "length"
    assert sequence.result(40).text == "bacd"


def test_a_stop_string_met_before_it_began_again_is_met_again():
    sequence = Speaker(stop=("ab",), max_tokens=9).sequence()
    for token in (2, 0):
        sequence.accept(token)
    sequence = sequence.restarted()
    for token in (2, 0, 1):
        sequence.accept(token)
    assert sequence.finish_reason == "stop"
    assert sequence.result(40).text == "c"


def test_the_scheduler_loads_neither_torch_nor_transformers():
    code = "import sys, bmx.engine.scheduler; print(*sorted({'torch', 'transformers'} & set(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout == "\n"
