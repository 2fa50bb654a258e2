"""When memory runs out (faults G4 to G12): what can be answered is answered, once, as if nothing had happened.

The allocator is simulated by a dispatch mode that sees every operator, the model's own included, and may refuse the
tensor it makes; the last test takes real memory away from a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import as_requests, random_prompts, tiny_engine, word_tokenizer, words
from families import FAMILIES
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from bmx import Engine, EngineConfig, PromptConfig, Request, SamplingParams
from bmx.engine.backend import ModelBackend
from bmx.errors import DeviceError, MemoryLimitError
from bmx.hardware import free_host_memory
from bmx.model.loader import prepare
from bmx.plan.planner import Plan, ProfiledStep
from bmx.request import Result

OFTEN = SamplingParams(max_tokens=180, stop_token_ids=tuple(range(64)))  # large slots, and answers that end soon


# A simulated allocator


@dataclass(frozen=True, slots=True)
class Allocation:
    """A new tensor: the how many-th since the start, of which operator, and the bytes then held by all."""

    number: int
    operator: str
    held: int


def cuda_out_of_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")


class Allocator(TorchDispatchMode):
    """Sees each tensor that an operator makes while it is entered; views and writes in place make none.

    Args:
        refuses: whether an allocation fails.
        error: what is raised then. A new one each time: its traceback holds tensors.

    Attributes:
        made, refused: allocations so far, and those that failed.
        peak: the most bytes held.
        operators: names of those that made tensors, in the order of the allocations.
    """

    def __init__(
        self,
        refuses: Callable[[Allocation], bool] = lambda _: False,
        error: Callable[[], Exception] = cuda_out_of_memory,
    ) -> None:
        super().__init__()
        self.refuses, self.error = refuses, error
        self.made = self.refused = self.held = self.peak = 0
        self.operators: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operator(*args, **(kwargs or {}))
        given = set(storages((*args, *kwargs.values()) if kwargs else args))
        new = {at: storage for at, storage in storages((made,)).items() if at not in given}
        if new:
            self._count(operator.__name__.partition(".")[0], new.values())
        return made

    def _count(self, operator: str, new: Iterable[torch.UntypedStorage]) -> None:
        self.made += 1
        self.operators.append(operator)
        self.held += sum(storage.nbytes() for storage in new)
        for storage in new:
            weakref.finalize(storage, self._take_back, storage.nbytes())
        if self.refuses(Allocation(self.made, operator, self.held)):
            self.refused += 1
            raise self.error()
        self.peak = max(self.peak, self.held)

    def _take_back(self, nbytes: int) -> None:
        self.held -= nbytes


def storages(values: Iterable[Any]) -> dict[int, torch.UntypedStorage]:
    """The memory behind tensors, and behind those in lists, by address."""
    found = {}
    for value in values:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage
        elif isinstance(value, (list, tuple)):
            found |= storages(value)
    found.pop(0, None)  # of tensors without elements
    return found


def failing(first: int, times: int = 1) -> Callable[[Allocation], bool]:
    """So many allocations fail in a row, from the ``first``-th on."""
    return lambda allocation: first <= allocation.number < first + times


def always(_: Allocation) -> bool:
    return True


def memory_of(limit: int) -> Callable[[Allocation], bool]:
    """A machine with so many bytes for everything but the weights."""
    return lambda allocation: allocation.held > limit


# Runs


def one_layer() -> Any:
    config = FAMILIES["llama"]()
    config.num_hidden_layers = 1
    return seeded(config)


def seeded(config: Any) -> Any:
    """A model with random weights, large enough for attention to matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0, 0.35)
    return model


def evicting(slots: int) -> Engine:
    """Slots of 8 rows, prompts in chunks of 6, two chunks a step: a prompt of 9 evicts, and so does decoding."""
    small = dict(kv_budget=8, kv_recent=2, kv_sink=1, chunk_size=6, max_num_batched_tokens=12)
    return tiny_engine(one_layer(), max_num_seqs=slots, **small)


def roomy(slots: int) -> Engine:
    """Slots for all tokens, which with ``OFTEN`` are most of the memory."""
    return tiny_engine(one_layer(), kv_policy="none", chunk_size=6, max_num_batched_tokens=12, max_num_seqs=slots)


def mixed_requests() -> list[Request]:
    """Two greedy ones, and one that is drawn, with a penalty, looking out for a text."""
    drawn = SamplingParams(max_tokens=2, temperature=1.0, top_p=0.9, repetition_penalty=1.3, seed=3, stop=("w1 ",))
    params = (SamplingParams(max_tokens=2), drawn, SamplingParams(max_tokens=1))
    prompts = random_prompts((3, 9, 4))
    return [Request(id=str(i), prompt=words(p), params=params[i]) for i, p in enumerate(prompts)]


def planned(engine: Engine, requests: list[Request]) -> Plan:
    return engine.plan(engine.measure(requests))


def answer(result: Result) -> Any:
    """What a user sees of a result; what was evicted may depend on the slots that there were."""
    if result.error:
        return result.error.code
    return result.text, result.token_ids, result.finish_reason, result.usage


def run(engine: Engine, requests: list[Request], plan: Plan, allocator: Allocator | None = None) -> dict[Any, Any]:
    """Answers by id, each id exactly once."""
    with allocator or Allocator():
        results = list(engine.run(iter(requests), plan))
    assert sorted(result.id for result in results) == sorted(request.id for request in requests)
    return {result.id: answer(result) for result in results}


# One failure, anywhere


def sampled(operators: list[str]) -> list[int]:
    """Numbers of the allocations to refuse: each operator's first and last, and every seventh of all."""
    first = {operators.index(name) + 1 for name in set(operators)}
    last = {name: number for number, name in enumerate(operators, 1)}
    return sorted({*first, *last.values(), *range(1, len(operators) + 1, 7)})


def test_memory_that_runs_out_once_at_any_operator_changes_no_answer():
    """G6: in prefill, in decoding, in eviction, in sampling, and in making the slots."""
    engine, requests = evicting(2), mixed_requests()
    plan = planned(engine, requests)
    healthy = Allocator()
    expected = run(engine, requests, plan, healthy)
    assert not any(isinstance(found, str) for found in expected.values())
    for number in sampled(healthy.operators):
        allocator = Allocator(failing(number))
        assert run(engine, requests, plan, allocator) == expected, number
        assert len(engine.stats.shrunk_to) == allocator.refused == 1, number
    assert run(engine, requests, plan, Allocator(failing(healthy.made + 1))) == expected  # no allocation comes later
    assert engine.stats.shrunk_to == []
    everywhere = {"zeros", "empty", "full", "embedding", "linear", "baddbmm", "addmm", "softmax", "cat", "index"}
    sampling = {"sort", "cumsum", "argmax", "isfinite", "gather"}
    eviction = {"topk", "argsort", "argmin"}
    assert everywhere | sampling | eviction <= set(healthy.operators), healthy.operators


# Failures that repeat


@pytest.fixture(scope="module")
def six() -> tuple[Engine, list[Request], Plan]:
    """Six slots and eight requests."""
    engine = roomy(6)
    requests = [Request(id=str(i), prompt=words(p), params=OFTEN) for i, p in enumerate(random_prompts((9, 12) * 4))]
    return engine, requests, planned(engine, requests)


def test_each_failure_costs_one_step_down_and_in_the_end_one_row(six):
    """G6: capped retries."""
    engine, requests, plan = six
    expected = run(engine, requests, plan)
    run(engine, requests, plan, Allocator(always))
    down = engine.stats.shrunk_to
    assert [slots for slots, _ in down] == [4, 3, 2, 1]
    for times in range(1, 9):
        allocator = Allocator(failing(100, times))
        found = run(engine, requests, plan, allocator)
        lost = [name for name, value in found.items() if value == "out_of_memory"]
        assert allocator.refused == times
        assert engine.stats.shrunk_to == down[:times]
        assert len(lost) == max(0, times - 1 - len(down))
        assert {name: value for name, value in expected.items() if name not in lost}.items() <= found.items()


@pytest.mark.parametrize("first", [1, 60, 150])
def test_memory_that_never_comes_back_ends_the_run_with_an_error_for_each_row(six, first):
    """G6: it ends, after as many attempts as there are smaller plans and rows."""
    engine, requests, plan = six
    allocator = Allocator(lambda allocation: allocation.number >= first)
    found = run(engine, requests, plan, allocator)
    assert set(found.values()) == {"out_of_memory"}
    assert allocator.refused == 1 + 4 + len(requests)  # six slots, then 4, 3, 2, 1, then each row alone


@pytest.mark.parametrize("slots", [4, 3, 2, 1])
def test_a_machine_with_memory_for_fewer_slots_ends_with_as_many(six, slots):
    """G5: and not with fewer, which it would if a failed attempt left anything behind (G6, G8)."""
    engine, requests, plan = six
    enough = Allocator()
    expected = run(engine, requests, planned(roomy(slots), requests), enough)
    allocator = Allocator(memory_of(enough.peak))
    assert run(engine, requests, plan, allocator) == expected
    assert engine.stats.shrunk_to[-1][0] == engine.stats.slots == slots
    assert allocator.refused == len(engine.stats.shrunk_to)  # never the same size twice (G7)
    assert allocator.held < enough.peak / 2


def interrupted(engine: Engine, plan: Plan, refuses: Callable[[Allocator], Any]) -> tuple[Allocator, int]:
    """Let allocations fail from the first result on; returns prompt tokens computed after that, too."""
    requests = as_requests(random_prompts((9, 12, 10, 8)), max_tokens=5)
    requests[2] = Request(id="2", prompt=requests[2].prompt, params=SamplingParams(max_tokens=1))
    expected = run(engine, requests, plan)
    allocator = Allocator()
    with allocator:
        results = engine.run(iter(requests), plan)
        found, before = [next(results)], engine.stats.prompt_tokens
        assert found[0].id == "2"
        allocator.refuses = refuses(allocator)
        found += results
    assert sorted(result.id for result in found) == sorted(expected)
    assert {result.id: answer(result) for result in found} == expected
    return allocator, engine.stats.prompt_tokens - before


def test_what_was_handed_out_is_not_computed_again(six):
    """G6: only what is unfinished is tried again."""
    engine, _, plan = six
    allocator, computed = interrupted(engine, plan, lambda allocator: failing(allocator.made + 1))
    assert allocator.refused == 1
    assert computed == 9 + 12 + 8


def test_memory_that_is_taken_in_mid_run_by_another_process(six):
    """G5: shrink and go on."""
    engine, _, plan = six
    allocator, _ = interrupted(engine, plan, lambda allocator: memory_of(allocator.peak // 2))
    assert allocator.refused == len(engine.stats.shrunk_to)
    assert 1 < engine.stats.slots <= 3


def test_a_row_that_is_too_large_for_the_machine_fails_alone():
    """G6: a batch of one that fails is an error for that row only."""
    engine = roomy(4)
    requests = as_requests(random_prompts((8, 90, 11, 7, 10)), max_tokens=4)
    long, short = requests[1], requests[:1] + requests[2:]
    alone = Allocator()
    run(engine, [long], planned(engine, [long]), alone)
    expected = run(engine, short, planned(engine, short))
    found = run(engine, requests, planned(engine, requests), Allocator(memory_of(alone.peak - 1)))
    assert found.pop("1") == "out_of_memory"
    assert found == expected


@pytest.mark.parametrize("failure", [50, 400, 700])
def test_sampled_rows_and_stop_texts_survive_a_recovery(failure):
    """G6: a row that begins again draws the same numbers, and forgets the text that it had."""
    engine = evicting(4)
    params = dict(max_tokens=8, temperature=1.0, top_k=60, stop=("w1 ", "w100", "w7"))
    requests = as_requests(random_prompts((5, 17, 9, 30, 12, 6)), **params)
    plan = planned(engine, requests)
    expected = run(engine, requests, plan)
    assert {reason for _, _, reason, _ in expected.values()} == {"stop", "length"}
    allocator = Allocator(failing(failure))
    assert run(engine, requests, plan, allocator) == expected
    assert allocator.refused == 1


# Errors that do not say what they are


ALLOCATOR = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator:"
NO_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.00 MiB",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    f"{ALLOCATOR} can't allocate memory: you tried to allocate 64 bytes. Error code 12 (Cannot allocate memory)",
    f"{ALLOCATOR} not enough memory: you tried to allocate 64 bytes.",
    "std::bad_alloc",
    "could not create a memory object",
)


@pytest.mark.parametrize("error", [MemoryError(), *map(RuntimeError, NO_MEMORY)], ids=str)
def test_every_way_to_say_that_memory_is_out_is_understood(error):
    """G10."""
    engine, requests = evicting(2), mixed_requests()
    plan = planned(engine, requests)
    expected = run(engine, requests, plan)
    allocator = Allocator(failing(100), lambda: type(error)(*error.args))
    assert run(engine, requests, plan, allocator) == expected
    assert len(engine.stats.shrunk_to) == allocator.refused == 1


@pytest.mark.parametrize(
    "said",
    [
        "device-side assert triggered",
        "an illegal memory access was encountered",
        "uncorrectable ECC error encountered",
        "unspecified launch failure",
        "GPU is lost",
        "misaligned address",
        "CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`",
    ],
)
@pytest.mark.parametrize("kind", [RuntimeError, torch.AcceleratorError])
def test_a_dead_gpu_ends_the_run_at_once(said, kind):
    """G9: nothing is tried again, and what was handed out stays."""
    engine, requests = evicting(2), mixed_requests()
    plan = planned(engine, requests)
    allocator = Allocator(error=lambda: kind(f"CUDA error: {said}\nCUDA kernel errors might be reported later\n"))
    with allocator:
        results = engine.run(iter(requests), plan)
        assert next(results).error is None
        allocator.refuses, before = always, allocator.made
        with pytest.raises(DeviceError) as raised:
            list(results)
    assert allocator.made == before + 1
    assert str(raised.value) == f"the GPU stopped: CUDA error: {said}"
    assert raised.value.hint


def test_a_gpu_that_dies_in_the_rehearsal_is_no_lack_of_memory():
    engine, requests = evicting(2), mixed_requests()
    allocator = Allocator(always, lambda: RuntimeError("CUDA error: device-side assert triggered"))
    with allocator, pytest.raises(DeviceError, match="device-side assert"):
        planned(engine, requests)
    assert allocator.refused == 1


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("out of range"), KeyError("x")])
def test_any_other_error_comes_through_as_it_is(error):
    engine, requests = evicting(2), mixed_requests()
    plan = planned(engine, requests)
    allocator = Allocator(failing(50), lambda: error)
    with allocator, pytest.raises(type(error)) as raised:
        list(engine.run(iter(requests), plan))
    assert raised.value is error
    assert allocator.made == 50
    assert run(engine, requests, plan)  # the engine is of use again


# The rehearsal


def test_memory_that_runs_out_once_anywhere_in_the_rehearsal_still_gives_a_plan():
    """G6, G12."""
    engine, requests = evicting(4), mixed_requests()
    expected = run(engine, requests, planned(engine, requests))
    number, refused = 0, 1
    while refused:
        number += 1 if number < 20 else 3  # the first ones make the slots and the tokens, the others are like them
        allocator = Allocator(failing(number))
        with allocator:
            plan = planned(engine, requests)
        refused = allocator.refused
        assert 1 <= plan.slots <= 3
        assert plan.memory.total <= plan.limits.total
        assert len(plan.layouts) == len(plan.groups)
    assert number > 50
    assert run(engine, requests, plan) == expected


def test_a_rehearsal_that_always_fails_gives_the_smallest_plan_and_ends():
    engine, requests = evicting(4), mixed_requests()
    expected = run(engine, requests, planned(engine, requests))
    allocator = Allocator(always)
    with allocator:
        plan = planned(engine, requests)
    assert (plan.slots, plan.step.max_num_batched_tokens) == (1, plan.step.chunk_size)
    assert allocator.refused < 10
    assert run(engine, requests, plan) == expected


class Meter:
    """Measures what it is told to."""

    now = held = 0
    free_memory = staticmethod(free_host_memory)

    def __init__(self, peak: int, exact: bool = True) -> None:
        self.peak, self.exact = peak, exact

    def reset(self, spares_files: bool = False) -> None:
        pass


def rehearsed(peak: int, exact: bool = True, **config: Any) -> tuple[Engine, Plan]:
    """Six equal requests planned by an engine that measures this much in the rehearsal."""
    settings = EngineConfig(kv_policy="none", chunk_size=6, max_num_batched_tokens=12, **config)
    backend = ModelBackend(prepare(one_layer()), meter=Meter(peak, exact))
    engine = Engine(settings, PromptConfig(), word_tokenizer(), backend)
    requests = [Request(id=str(i), prompt=words(p), params=OFTEN) for i, p in enumerate(random_prompts((9,) * 6))]
    return engine, planned(engine, requests)


def test_a_step_that_takes_more_than_predicted_gets_room_from_the_slots():
    """G12."""
    _, free = rehearsed(0, max_num_seqs=6)
    limit, slot = free.memory.total, free.memory.pool // 6
    _, exact = rehearsed(limit - free.memory.pool + slot, memory_limit=limit)
    assert exact.slots == 6
    predicted = limit - free.memory.pool
    assert exact.profiled == ProfiledStep(predicted=predicted, measured=predicted)
    _, tight = rehearsed(limit - free.memory.pool + slot + 2 * slot, memory_limit=limit)
    assert tight.profiled == ProfiledStep(predicted=predicted, measured=predicted + 2 * slot)
    assert 4 <= tight.slots < 6
    assert tight.memory.total <= limit
    assert tight.memory.slack > free.memory.slack


def test_a_rehearsal_that_cannot_be_measured_changes_nothing():
    """G12."""
    _, free = rehearsed(0, max_num_seqs=6)
    _, plan = rehearsed(10**12, exact=False, memory_limit=free.memory.total)
    assert plan.slots == 6
    assert plan.profiled is None


# Memory of the host


@dataclass
class Stumbling:
    """A tokenizer that runs out of memory once: when it reads a prompt, or when it writes an answer."""

    inner: Any
    reads: int = 0
    writes: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.reads -= 1
        if self.reads == 0:
            raise MemoryError
        return self.inner(*args, **options)

    def decode(self, *args: Any, **options: Any) -> Any:
        self.writes -= 1
        if self.writes == 0:
            raise MemoryError
        return self.inner.decode(*args, **options)


@pytest.mark.parametrize("work", ["reads", "writes"])
def test_host_memory_that_runs_out_once_in_the_tokenizer_changes_no_answer(work):
    """G11: in reading a prompt, in looking out for a text, in writing an answer."""
    requests = as_requests(random_prompts((4, 9, 7)), max_tokens=2, stop=("w1 ",))
    engine = evicting(2)
    plan = planned(engine, requests)
    expected = run(engine, requests, plan)
    at, left = 0, 0
    while left <= 0:
        at += 1
        tokenizer = Stumbling(engine.tokenizer, **{work: at})
        assert run(Engine(engine.config, PromptConfig(), tokenizer, engine.backend), requests, plan) == expected, at
        left = getattr(tokenizer, work)
    assert at > len(requests)


def test_host_memory_that_runs_out_in_reading_rows_is_not_their_end():
    """G11: rows that can never be read again must not be missing from a run that ends well."""
    engine, requests = evicting(2), mixed_requests()
    plan = planned(engine, requests)

    def rows() -> Iterator[Request]:
        yield requests[0]
        raise MemoryError

    with pytest.raises(MemoryLimitError):
        list(engine.run(rows(), plan))


# Real memory


CHILD = """
import json, resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_memory import answer, hungry

def allow(pools):  # more than what is taken now, or less
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + int(pools * plan.memory.pool), -1))

engine, requests, plan = hungry()
expected = {result.id: answer(result) for result in engine.run(requests, plan)}
report = [plan.memory.pool]
for pools, results in ((0.6, 0), (-0.4, 1)):
    answering = engine.run(requests, plan)
    found = [next(answering) for _ in range(results)]
    allow(pools)
    found += answering
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    report.append([{r.id: answer(r) for r in found} == expected, len(found), engine.stats.shrunk_to[-1][0]])
print(json.dumps(report))
"""


def hungry() -> tuple[Engine, list[Request], Plan]:
    """Some 400 MB of slots, of which short answers use little."""
    config = FAMILIES["llama"]()
    config.head_dim, config.max_position_embeddings = 128, 2048
    engine = tiny_engine(seeded(config), kv_policy="none", chunk_size=16, max_num_batched_tokens=64, max_num_seqs=40)
    params = SamplingParams(max_tokens=2000, temperature=1.0, stop_token_ids=tuple(range(115)))
    prompts = random_prompts([5 + i % 20 for i in range(45)])
    requests = [Request(id=str(i), prompt=words(p), params=params) for i, p in enumerate(prompts)]
    return engine, requests, planned(engine, requests)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of the address space that is enforced")
def test_a_process_that_may_take_less_memory_than_when_it_planned():
    """G5, G11: 60 % of the slots' memory is there when they are made, or is left after the first answer."""
    ended = subprocess.run(
        [sys.executable, "-c", CHILD, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    pool, *runs = json.loads(ended.stdout.splitlines()[-1])
    assert pool > 300e6
    for same, answered, slots in runs:
        assert (same, answered) == (True, 45)
        assert 4 < slots < 40 * 0.7
