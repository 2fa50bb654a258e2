"""A model that several processes share, as a backend: the engine sees one model, with the sizes of one part of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bmx.compress.policy import CompressionPolicy
from bmx.config import EngineConfig
from bmx.engine.backend import ModelBackend, Runner
from bmx.engine.group import Group
from bmx.engine.group_runner import LeadingRunner
from bmx.engine.memory_meter import MemoryMeter
from bmx.errors import MemoryLimitError
from bmx.hardware import FreeMemory
from bmx.model.loader import LoadedModel, choose_device, load_model
from bmx.model.spec import ModelSpec
from bmx.plan.planner import Plan

if TYPE_CHECKING:
    from bmx.engine.runner import Watch

EAGER = "steps of a model that several devices share are not captured"


class GroupBackend(ModelBackend):
    """A model over ``tensor_parallel_size`` devices; this process has the first part of it.

    Args:
        config: the settings.
        source: folder or hub id of the model.
        tokenizer: the model's.

    Raises:
        DeviceError: another process failed.
        MemoryLimitError: a device has no room for its part.
        ModelError: as ``load_model``; or it cannot be split.
        UsageError: there are too few GPUs.
    """

    def __init__(self, config: EngineConfig, source: str, tokenizer: Any) -> None:
        self._config, self._source, self._tokenizer = config, source, tokenizer
        self._tried: ModelSpec | None = None
        self._group, loaded = self._open()
        super().__init__(loaded)
        self.meter = GroupMeter(self.device_type, loaded.runtime_bytes, config.tensor_parallel_size, self._free)

    def _open(self) -> tuple[Group, LoadedModel]:
        """Start the processes, and load all parts at once: they compute with each other while they are inspected."""
        config = self._config
        try:
            group = Group(config, self._source, choose_device(config).type)
            with group.failures():
                loaded = load_model(self._source, config, self._tokenizer)
        except MemoryError as error:
            hint = "split it over more devices, or choose a smaller one"
            raise MemoryLimitError(f"a part of model {config.model} does not fit on its device", hint=hint) from error
        self._end = weakref.finalize(self, group.close)
        return group, loaded

    def _ready(self) -> Group:
        """The group; a new one, with all parts loaded again, if an error has ended it."""
        if self._group.closed:
            self._end.detach()
            del self.loaded
            self._group, self.loaded = self._open()
        return self._group

    def _free(self) -> list[int]:
        """Bytes that each of the other processes could hold on its device in all."""
        group = self._ready()
        with group.failures():
            group.tell("free")
            return group.answers()

    def try_kernels(self, spec: ModelSpec, policy: CompressionPolicy) -> None:
        """See ``Backend``; the other processes try theirs when a plan begins."""
        super().try_kernels(spec, policy)
        self._tried = spec

    def replace_kernels(self, error: Exception) -> bool:  # noqa: ARG002
        """They are not: the error has ended the other processes, which would choose the same again."""
        return False

    @contextmanager
    def runner(
        self,
        plan: Plan,
        policy: CompressionPolicy,
        *,
        probe: tuple[int, ...] = (),
        watch: Watch | None = None,
        refused: Callable[[str], None] | None = None,
    ) -> Iterator[Runner]:
        """See ``Backend``."""
        group = self._ready()
        if refused is not None and self.device_type == "cuda":
            refused(EAGER)
        with ExitStack() as stack:
            with group.failures():
                group.tell("begin", self._tried or self.spec, plan, policy, probe)
                runner = LeadingRunner(group, self.loaded, policy, plan, self.kernels, probe, watch)
                stack.enter_context(runner)
                group.answers()
            stack.callback(_end, group)
            yield runner

    def describe(self) -> dict[str, Any]:
        """See ``Backend``."""
        return {**super().describe(), "tensor_parallel_size": self._config.tensor_parallel_size}


class GroupMeter(MemoryMeter):
    """The memory of one of several processes that share a model, and what each of them may take.

    Args:
        device: ``cpu`` or ``cuda``.
        context_bytes: as ``MemoryMeter``.
        size: how many processes there are.
        others: bytes that each of the other processes could hold on its device in all.
    """

    def __init__(self, device: str, context_bytes: int, size: int, others: Callable[[], list[int]]) -> None:
        super().__init__(device, context_bytes)
        self._size, self._others, self._device = size, others, device

    def free_memory(self) -> FreeMemory:
        """What is free for one process: an equal part of the host's, or as much as on the GPU that has least."""
        free = super().free_memory()
        if self._device == "cpu":
            return free.divided(self._size)
        return replace(free, free=max(0, min(free.free, *(total - self.held for total in self._others()))))


def _end(group: Group) -> None:
    """Let the followers free a plan's slots, if they are still there."""
    if not group.closed:
        with suppress(OSError):
            group.tell("end")
