"""The engine: requests in, results out, as they finish. Down: schedule, run, update. Knows no files and no terminal."""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bmx import hardware, kernels
from bmx.compress.policy import CompressionPolicy
from bmx.config import EngineConfig, PromptConfig
from bmx.engine.runner import ModelRunner
from bmx.engine.scheduler import Scheduler, Step
from bmx.engine.sequence import Sequence
from bmx.errors import MemoryLimitError, RowError, UsageError
from bmx.model.loader import LoadedModel, find_source, load_model, load_tokenizer
from bmx.model.text import PromptEncoder
from bmx.planner import Limits, Plan, plan
from bmx.request import Request, Result
from bmx.stats import Stats

BATCHED_TOKENS = {"cpu": 1280, "cuda": 8192}  # two chunks and the decoding tokens; what fills a GPU
LOOKAHEAD = 64  # fewest requests that wait tokenised, so that a free slot of any size finds one


@dataclass(frozen=True, slots=True)
class Length:
    """What the plan needs to know of one request."""

    prompt_tokens: int
    max_tokens: int
    rows_needed: int


class Engine:
    """A model with its tokenizer, policy and limits. ``open`` makes one; ``generate`` is the work.

    Attributes:
        loaded: the model and its sizes.
        kernels: the attention that was chosen, and why.
        stats: counters of the run in progress, for whoever shows them.
    """

    def __init__(self, config: EngineConfig, prompt: PromptConfig, tokenizer: Any, loaded: LoadedModel) -> None:
        self.config = config
        self.loaded = loaded
        self.tokenizer = tokenizer
        self.policy = CompressionPolicy.from_config(config)
        self.kernels = kernels.choose(loaded.model.device.type)
        self.stats = Stats()
        self._encoder = PromptEncoder(tokenizer, prompt)
        self._max_length = config.max_model_len or loaded.spec.max_length
        self._running = False
        self._pair_bytes: Counter[int | None] = Counter()  # of one KV pair of all layers, by their windows
        for index, layer in enumerate(self.policy.layout(loaded.spec, 1).layers):
            if layer.owner == index:
                self._pair_bytes[layer.window] += layer.kv_bytes
        if self._max_length > loaded.spec.max_length:
            raise UsageError(
                f"max_model_len {self._max_length} is more than the {loaded.spec.max_length} of {loaded.spec.name}"
            )

    @classmethod
    def open(cls, config: EngineConfig | None = None, prompt: PromptConfig | None = None) -> Engine:
        """Load the model that the configuration names.

        Raises:
            ModelError: it cannot be found, loaded, or run rightly.
            UsageError: settings that this model cannot follow.
        """
        config, prompt = config or EngineConfig(), prompt or PromptConfig()
        source = find_source(config)
        tokenizer = load_tokenizer(source, config)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(hardware.usable_cores())
        return cls(config, prompt, tokenizer, load_model(source, config))

    def encode(self, request: Request) -> list[int]:
        """The token ids that the model reads for a request.

        Raises:
            RowError: there is no text, or the chat template refuses it.
        """
        return self._encoder.encode(request)

    def measure(self, requests: Iterable[Request]) -> list[Length]:
        """The length of each request that can be answered at all; nothing else is kept."""
        lengths = []
        for request in requests:
            try:
                sequence = self._sequence(request)
            except RowError:
                continue
            lengths.append(Length(len(sequence.prompt), sequence.max_tokens, sequence.rows_needed))
        return lengths

    def plan(self, lengths: Iterable[Length]) -> Plan:
        """What fits: slots in groups for these lengths, within the memory that may be used.

        Raises:
            MemoryLimitError: not even one slot fits.
        """
        spec, config = self.loaded.spec, self.config
        heads = max(layer.query_heads for layer in spec.layers)
        head_dim = max(max(layer.key_dim, layer.value_dim) for layer in spec.layers)
        return plan(
            spec,
            lambda capacity: self.policy.layout(spec, capacity),
            self._limits(),
            [length.rows_needed for length in lengths] or [1],
            chunk_size=config.chunk_size,
            max_num_batched_tokens=config.max_num_batched_tokens or BATCHED_TOKENS[self.loaded.model.device.type],
            runtime=self.loaded.runtime_bytes,
            workspace=lambda chunk, rows, slots: self.kernels.module.workspace_bytes(
                heads=heads, chunk=chunk, rows=rows, slots=slots, head_dim=head_dim, itemsize=spec.itemsize
            ),
        )

    def generate(self, requests: Iterable[Request], plan: Plan | None = None) -> Iterator[Result]:
        """Answer requests; results come as they finish, not in order. One run at a time.

        Args:
            requests: read lazily when a plan is given; otherwise all are read first, to make one.
            plan: from ``plan``; it must have been made from the lengths of these requests.
        """
        if self._running:
            raise UsageError("this engine is answering other requests", hint="finish or close that generator first")
        self._running = True
        try:
            if plan is None:
                requests = list(requests)
                plan = self.plan(self.measure(requests))
            with ModelRunner(self.loaded, self.policy, plan, self.kernels) as runner:
                self._begin(plan, runner)
                yield from self._loop(iter(requests), plan, runner)
        finally:
            self._running = False

    def _loop(self, source: Iterator[Request], plan: Plan, runner: ModelRunner) -> Iterator[Result]:
        scheduler = Scheduler(plan.groups, plan.chunk_size, plan.max_num_batched_tokens)
        waiting: deque[Sequence] = deque()
        while True:
            yield from self._read_ahead(source, waiting, max(LOOKAHEAD, 2 * plan.slots))
            yield from self._admit(scheduler, waiting)
            step = scheduler.schedule()
            if step is None:
                return
            yield from self._advance(scheduler, runner, step)

    def _begin(self, plan: Plan, runner: ModelRunner) -> None:
        stats = self.stats
        stats.slots = plan.slots
        stats.kv_bytes = runner.pool.nbytes
        stats.started = time.monotonic()

    def _read_ahead(self, source: Iterator[Request], waiting: deque[Sequence], enough: int) -> Iterator[Result]:
        """Tokenise requests until enough wait; those that cannot be answered are results at once."""
        while len(waiting) < enough:
            request = next(source, None)
            if request is None:
                return
            try:
                waiting.append(self._sequence(request))
            except RowError as error:
                yield Result(id=request.id, error=error)

    def _admit(self, scheduler: Scheduler, waiting: deque[Sequence]) -> Iterator[Result]:
        """Give slots to those who wait, in order; one that finds none lets others pass."""
        for sequence in list(waiting):
            if sequence.rows_needed > scheduler.largest:
                waiting.remove(sequence)
                message = f"it needs a slot of {sequence.rows_needed} rows; the plan's largest has {scheduler.largest}"
                yield Result(id=sequence.request.id, error=RowError("out_of_memory", message))
            elif scheduler.admit(sequence):
                waiting.remove(sequence)

    def _advance(self, scheduler: Scheduler, runner: ModelRunner, step: Step) -> Iterator[Result]:
        """Run one step and hand out the answers that it completes."""
        active = scheduler.running
        decodes = sum(chunk.sequence.decoding for chunk in step.chunks)
        before = time.monotonic()
        try:
            tokens = runner.run(step)
        except torch.OutOfMemoryError as error:
            hint = "lower --memory-limit or --max-num-seqs; answers that were finished are kept"
            raise MemoryLimitError("the device ran out of memory in a step", hint=hint) from error
        seconds = time.monotonic() - before
        finished = scheduler.update(step, tokens)
        held = scheduler.held_tokens + [sequence.computed for sequence in finished]
        self.stats.count_step(
            prompt_tokens=step.tokens - decodes,
            decode_tokens=decodes,
            sampled=len(tokens),
            seconds=seconds,
            active=active,
            full_cache_bytes=sum(map(self._full_cache_bytes, held)),
        )
        self.stats.memory_bytes = runner.memory_bytes()
        self.stats.work_saved += sum(sequence.max_tokens - len(sequence.answer) for sequence in finished)
        for sequence in finished:
            yield self._result(sequence, scheduler.capacity(sequence))

    def _full_cache_bytes(self, tokens: int) -> int:
        """What a full cache of so many tokens holds; windowed layers hold their window."""
        return sum(size * min(tokens, window or tokens) for window, size in self._pair_bytes.items())

    def _result(self, sequence: Sequence, capacity: int) -> Result:
        if sequence.error:
            error = RowError(sequence.error, "the model's logits are not numbers (overflow in this dtype?)")
            return Result(id=sequence.request.id, error=error)
        return sequence.result(capacity, capacity if self.policy.scorer is None else self.policy.budget)

    def _sequence(self, request: Request) -> Sequence:
        """A request as a sequence.

        Raises:
            RowError: it has no text, or its prompt leaves no room for an answer.
        """
        prompt = self.encode(request)
        room = self._max_length - len(prompt)
        if room < 1:
            message = f"the prompt has {len(prompt)} tokens; prompt and answer together may have {self._max_length}"
            raise RowError("context_length_exceeded", message)
        max_tokens = min(request.params.max_tokens, room)
        return Sequence(
            request=request,
            prompt=prompt,
            max_tokens=max_tokens,
            rows_needed=self.policy.rows_needed(len(prompt) + max_tokens),
            end_token_ids=self.loaded.end_token_ids,
            tokenizer=self.tokenizer,
        )

    def _limits(self) -> Limits:
        """What this run may use: the user's limit, or a share of what is free and what bmx holds already."""
        config, held = self.config, self.loaded.runtime_bytes + self.loaded.spec.weight_bytes
        on_gpu = self.loaded.model.device.type == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()  # what an earlier run left behind is free
        memory = hardware.free_gpu_memory() if on_gpu else hardware.free_host_memory()
        total = int((memory.free + held) * config.gpu_memory_utilization)
        source = f"{config.gpu_memory_utilization:.0%} of what is free, {memory.source}"
        if config.memory_limit is not None and config.memory_limit < total:
            total, source = config.memory_limit, "memory_limit"
        return Limits(total=total, pool=config.kv_cache_memory, slots=config.max_num_seqs, source=source)
