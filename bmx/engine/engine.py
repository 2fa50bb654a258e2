"""The engine: requests in, results out, as they finish. Down: schedule, run, update. Knows no files and no terminal."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from bmx import hardware, kernels
from bmx.compress.policy import CompressionPolicy
from bmx.config import CHUNK_SIZE, EngineConfig, PromptConfig
from bmx.engine.memory_meter import MemoryMeter, bound_kernel_caches, device_errors, is_out_of_memory, release
from bmx.engine.prefix_cache import Reuse
from bmx.engine.prompt_lengths import PromptMeasurer, max_length
from bmx.engine.run import Run, RunContext, Runner
from bmx.engine.sequence import Sequence
from bmx.errors import MemoryLimitError, UsageError
from bmx.kv.layout import KVLayout
from bmx.model.loader import RUNTIME_BYTES, LoadedModel, choose_device, find_source, load_model, load_tokenizer
from bmx.model.preview import preview_spec
from bmx.model.prompt_encoder import PromptEncoder
from bmx.model.spec import ModelSpec, share_layers
from bmx.plan.device import Device
from bmx.plan.forecast import fastest
from bmx.plan.machine_speed import TYPICAL, Rates, machine_rates
from bmx.plan.planner import Length, Limits, Plan, SlotGroup, StepSize, limits, plan, shrunk, step_sizes
from bmx.request import Request, Result
from bmx.shutdown import Stop
from bmx.stats import Stats

if TYPE_CHECKING:
    from bmx.engine.runner import Watch


class Engine:
    """A model with its tokenizer, policy and limits. ``open`` makes one; ``generate`` is the work.

    Attributes:
        loaded: the model and its sizes.
        kernels: the attention that was chosen, and why.
        stats: counters of the run in progress, for whoever shows them.
        probe: token ids that are asked after each chunk.
        watch: is shown the logits of every token that is to be sampled, if it is not None.
    """

    def __init__(self, config: EngineConfig, prompt: PromptConfig, tokenizer: Any, loaded: LoadedModel) -> None:
        self.config = config
        self._prompt, self._as_loaded = prompt, loaded
        self.loaded = replace(loaded, spec=share_layers(loaded.spec, config.kv_share_layers))
        self.tokenizer = tokenizer
        self.policy = CompressionPolicy.from_config(config)
        self.kernels = kernels.choose(self.device_type)
        self.stats = Stats()
        self.meter = MemoryMeter(self.device_type, loaded.runtime_bytes)
        reuse = None
        if config.prefix_reuse and loaded.rope is None:  # with such a rope, keys depend on the length of what follows
            reuse = Reuse(spec=self.loaded.spec, policy=self.policy, chunk_size=config.chunk_size or CHUNK_SIZE)
        self._measurer = PromptMeasurer(
            PromptEncoder(tokenizer, prompt), self.policy, max_length(config, loaded.spec), reuse
        )
        self._running = False
        self.probe = self._measurer.encoder.probe(config.kv_probe)
        self.watch: Watch | None = None

    @classmethod
    def open(cls, config: EngineConfig | None = None, prompt: PromptConfig | None = None) -> Engine:
        """Load the model that the configuration names.

        Raises:
            ModelError: it cannot be found, loaded, or run rightly.
            UsageError: settings that this model cannot follow.
        """
        config, prompt = config or EngineConfig(), prompt or PromptConfig()
        bound_kernel_caches()
        source = find_source(config)
        tokenizer = load_tokenizer(source, config)
        check_memory(config, partial(preview_spec, config))
        use_all_cores()
        return cls(config, prompt, tokenizer, load_model(source, config))

    def with_config(self, config: EngineConfig) -> Engine:
        """An engine with the same model and other settings of its cache and memory."""
        return Engine(config, self._prompt, self.tokenizer, self._as_loaded)

    @property
    def device_type(self) -> str:
        """``cpu`` or ``cuda``."""
        return str(self.loaded.model.device.type)

    def encode(self, request: Request) -> list[int]:
        """The token ids that the model reads for a request.

        Raises:
            RowError: there is no text, or the chat template refuses it.
        """
        return self._measurer.encoder.encode(request)

    def measure(self, requests: Iterable[Request]) -> list[Length]:
        """The length of each request that can be answered at all; nothing else is kept."""
        return self._measurer.measure(requests)

    def plan(self, lengths: Iterable[Length]) -> Plan:
        """What fits: slots in groups for these lengths, and steps of a size, within the memory that may be used.

        The largest step is run once, on made-up tokens, before the pool exists: where it takes more than the closed
        form says, the plan makes room for it.

        Raises:
            MemoryLimitError: not even one slot fits.
        """
        lengths = list(lengths) or [Length(1, 1, 1)]
        kind = self.device_type
        device = Device.of(kind, self.loaded.spec, self.loaded.runtime_bytes, self.config)
        sizes = step_sizes(self.config, kind, lengths, len(self.probe))
        made = self._planned(lengths, self._limits(), device, sizes)
        measured = self._rehearse(made)
        allowed = made.limits
        while measured is None:
            smaller = self._shrunk(made)
            if smaller is None:
                return made  # its rows will fail one by one, or find that memory is back
            made, measured = smaller, self._rehearse(smaller)
            allowed = replace(allowed, slots=made.slots)
        predicted = made.memory.step
        if not self.meter.exact:
            return made
        self.stats.rehearsed = (predicted, measured)
        if measured <= predicted:
            return made
        device = replace(device, slack=device.slack + measured - predicted)
        tokens = made.step.max_num_batched_tokens
        smaller_steps = [size for size in sizes if size.max_num_batched_tokens < tokens]
        return self._planned(lengths, allowed, device, [made.step, *smaller_steps])

    def _planned(self, lengths: list[Length], limits: Limits, device: Device, sizes: Seq[StepSize]) -> Plan:
        """The plan that is expected to be the fastest among those with these sizes of steps."""
        spec = self.loaded.spec
        return fastest(
            [partial(plan, spec, self._layout, limits, lengths, size, device) for size in sizes],
            spec,
            lengths,
            self.kernels.name,
            lambda: self._rates(device.kind),
        )

    def _rates(self, kind: str) -> Rates:
        """The machine's rates; typical ones where there is no memory to measure them."""
        try:
            described = self.describe()
            return machine_rates(kind, described["dtype"], described["device"])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        release()
        return TYPICAL

    def _layout(self, capacity: int) -> KVLayout:
        return self.policy.layout(self.loaded.spec, capacity)

    def _rehearse(self, made: Plan) -> int | None:
        """Bytes that the largest step takes, the slots left out; None if it runs out of memory."""
        last = len(made.groups) - 1
        alone = replace(
            made, groups=(SlotGroup(made.groups[last].capacity, 1),), layouts=(made.layouts[last],), prefix_slots=()
        )
        self.meter.reset()
        try:
            with device_errors(), self._runner(alone) as runner:
                runner.profile_step(made.step, made.slots)  # type: ignore[attr-defined]
                return self.meter.peak - runner.kv_bytes
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        return None

    def _shrunk(self, made: Plan) -> Plan | None:
        """A smaller plan, for when memory ran out under this one; None if there is none."""
        release()
        device = Device.of(self.device_type, self.loaded.spec, self.loaded.runtime_bytes, self.config)
        return shrunk(made, self.loaded.spec, self._layout, device)

    def generate(
        self,
        requests: Iterable[Request | None],
        plan: Plan | None = None,
        *,
        stop: Stop | None = None,
        row_timeout: float | None = None,
    ) -> Generator[Result]:
        """Answer requests; results come as they finish, not in order. One run at a time.

        When memory runs out, what is unfinished begins again under a smaller plan; a row that finds too little even
        alone is an error. A row's answer does not depend on how often it was begun.

        Args:
            requests: read lazily when a plan is given; otherwise all are read first, to make one. None among them says
                that there is none for now: more is asked for after the next step.
            plan: from ``plan``; it must have been made from the lengths of these requests.
            stop: looked at between steps; when it is requested, nothing is begun any more.
            row_timeout: seconds that a sequence may have its slot; one that takes longer is an error.

        Raises:
            DeviceError: the GPU failed; what was handed out before is all there is.
        """
        if self._running:
            raise UsageError("this engine is answering other requests", hint="finish or close that generator first")
        self._running = True
        try:
            if plan is None:
                all_of_them = [request for request in requests if request]
                requests, plan = all_of_them, self.plan(self.measure(all_of_them))
            yield from Run(self._setup(stop or Stop(), row_timeout), requests).results(plan)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            hint = "answers that were finished are kept; close other programs, or lower --memory-limit"
            raise MemoryLimitError("memory ran out, and not only for a step", hint=hint) from error
        finally:
            self._running = False

    def _setup(self, stop: Stop, row_timeout: float | None) -> RunContext:
        return RunContext(
            spec=self.loaded.spec,
            policy=self.policy,
            meter=self.meter,
            stats=self.stats,
            runner=self._runner,
            read=self._sequence,
            shrunk=self._shrunk,
            chunk_size=None if self.config.chunking_is_free else self.config.chunk_size or CHUNK_SIZE,
            stop=stop,
            row_timeout=row_timeout,
        )

    def _runner(self, plan: Plan) -> AbstractContextManager[Runner]:
        from bmx.engine.runner import ModelRunner

        refused = None if self.config.enforce_eager else self.stats.note_eager
        return ModelRunner(self.loaded, self.policy, plan, self.kernels, self.probe, self.watch, refused)

    def describe(self) -> dict[str, Any]:
        """What computes the answers, for the record."""
        import torch

        model = self.loaded.model
        on_gpu = model.device.type == "cuda"
        return {
            "architecture": self.loaded.spec.name,
            "commit": getattr(model.config, "_commit_hash", None),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(model.device) if on_gpu else hardware.cpu_name(),
            "attention": self.kernels.name,
        }

    def _sequence(self, request: Request) -> Sequence:
        """A request as a sequence.

        Raises:
            RowError: it has no text, or its prompt leaves no room for an answer.
        """
        reading = self._measurer.read(request)
        return Sequence(
            request=request,
            prompt=reading.prompt,
            max_tokens=reading.length.max_tokens,
            rows_needed=reading.length.rows_needed,
            truncated=reading.truncated,
            spans=reading.spans,
            end_token_ids=self.loaded.end_token_ids,
            tokenizer=self.tokenizer,
        )

    def _limits(self) -> Limits:
        on_gpu = self.device_type == "cuda"
        if on_gpu:
            import torch

            torch.cuda.empty_cache()  # what an earlier run left behind is free
        memory = hardware.free_gpu_memory() if on_gpu else hardware.free_host_memory()
        return limits(self.config, memory, held=self.meter.now)


def use_all_cores() -> None:
    """Let torch compute on every core that this process may use, unless the environment says how many."""
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(hardware.usable_cores())


def check_memory(config: EngineConfig, foreseen: Callable[[str], ModelSpec]) -> None:
    """Refuse, before weights are loaded, a model of which not one short sequence would fit.

    Args:
        foreseen: what the model would be on a kind of device.

    Raises:
        MemoryLimitError: says what would be enough.
    """
    kind = choose_device(config).type
    seen = hardware.visible_gpus() if kind == "cuda" else []
    if kind == "cuda" and (not seen or seen[0].free is None or seen[0].mig):
        return  # what is free is known when CUDA has begun
    spec = share_layers(foreseen(kind), config.kv_share_layers)
    policy, held = CompressionPolicy.from_config(config), 0 if kind == "cuda" else hardware.resident_bytes()
    if kind == "cuda":
        memory = hardware.FreeMemory(seen[0].free or 0, seen[0].total or 0, "NVML", hardware.holders(seen[0]))
    else:
        memory = hardware.free_host_memory()
    shortest = Length(1, 1, policy.rows_needed(1, 1))
    device = Device.of(kind, spec, held or RUNTIME_BYTES[kind], config)
    step = step_sizes(config, kind, [shortest])[-1]
    plan(spec, partial(policy.layout, spec), limits(config, memory, held), [shortest], step, device)
