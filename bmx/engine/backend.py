"""The seam between the engine and what computes its steps: a model on its device, or a stand-in for one.

The engine plans, schedules and collects; a backend says how large its model is and computes the steps of a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from bmx import hardware
from bmx.compress.policy import CompressionPolicy
from bmx.engine.memory_meter import MemoryMeter
from bmx.engine.scheduler import Step
from bmx.kernels import Kernels, choose
from bmx.kv.layout import SlotIndex
from bmx.model.loader import LoadedModel
from bmx.model.spec import ModelSpec
from bmx.plan.memory import StepSize
from bmx.plan.planner import Plan

if TYPE_CHECKING:
    from bmx.engine.runner import Watch


class Sampled(Protocol):
    """The tokens that a launched step gives."""

    def read(self) -> list[int | None]:
        """Wait for the tokens: one for each sampling chunk, in order; None where the logits were not numbers."""


class Runner(Protocol):
    """Computes the steps of one plan.

    Attributes:
        kv_bytes: bytes of the slots that it holds on the device.
        ahead: steps that may be launched before the tokens of an earlier one are read.
        rounds: most tokens that sequences should decode in one step.
        modules: of the model, by kind: how many kernels compute, and how many torch does.
    """

    kv_bytes: int
    ahead: int
    rounds: int
    modules: Mapping[str, Any]

    def run(self, step: Step) -> Sampled:
        """Launch a step."""

    def copy(self, source: SlotIndex, target: SlotIndex, tokens: int) -> None:
        """Copy the state of a sequence's first ``tokens`` tokens from one slot to another.

        Args:
            source: (group, slot) that is copied.
            target: (group, slot) that is overwritten.
            tokens: tokens of the sequence whose state it is.
        """

    def profile_step(self, size: StepSize, sampled: int) -> None:
        """Compute the largest step that a plan allows, on made-up tokens, so that its memory can be measured.

        Args:
            size: how large the step is.
            sampled: rows of logits.
        """


class Backend(Protocol):
    """A model that an engine can run: its sizes, its device, and the runners that compute a plan's steps."""

    @property
    def spec(self) -> ModelSpec:
        """The model's sizes."""

    @property
    def end_token_ids(self) -> frozenset[int]:
        """Token ids that end an answer."""

    @property
    def device_type(self) -> str:
        """``cpu`` or ``cuda``."""

    @property
    def kernels(self) -> Kernels:
        """The kernels that compute attention, and why they were chosen."""

    def try_kernels(self, spec: ModelSpec, policy: CompressionPolicy) -> None:
        """Find out whether the kernels compute this model under a policy; those that do not are replaced.

        Args:
            spec: the model's sizes, with the layers that share their KV pairs.
            policy: which KV pairs stay in a slot.
        """

    def replace_kernels(self, error: Exception) -> bool:
        """Let plain torch compute what kernels do, if they may have raised an error; returns whether it does."""

    @property
    def meter(self) -> MemoryMeter:
        """Measures the memory that is held."""

    @property
    def runtime_bytes(self) -> int:
        """Bytes that the process holds beside the model."""

    @property
    def measurable(self) -> bool:
        """Whether steps take memory and time worth measuring: if so, plans are chosen by speed and profiled."""

    @property
    def shares_prefixes(self) -> bool:
        """Whether the keys of a token depend on the tokens before it alone, so that prompts can share them."""

    @property
    def model(self) -> Any:
        """The torch module, for measurements of its weights; None for a stand-in."""

    def runner(
        self,
        plan: Plan,
        policy: CompressionPolicy,
        *,
        probe: tuple[int, ...] = (),
        watch: Watch | None = None,
        refused: Callable[[str], None] | None = None,
    ) -> AbstractContextManager[Runner]:
        """What computes the steps of a plan; it holds the slots from now until the context ends.

        Args:
            plan: slots and sizes of steps.
            policy: which KV pairs stay in a slot.
            probe: token ids that are asked after each chunk.
            watch: is shown the logits of every token that is to be sampled.
            refused: is told why decoding could not be captured as CUDA graphs; None if it shall not be captured.
        """

    def describe(self) -> dict[str, Any]:
        """What computes the answers, for the record: architecture, commit, dtype, device, attention."""


class ModelBackend:
    """A loaded model on its device.

    Args:
        loaded: the model and its sizes.
        kernels: what computes attention, taken as they are; those chosen for the device, and tried, if left out.
        meter: measures memory; one of the device if left out.
    """

    measurable = True

    def __init__(self, loaded: LoadedModel, kernels: Kernels | None = None, meter: MemoryMeter | None = None) -> None:
        self.loaded = loaded
        self.device_type = str(loaded.model.device.type)
        self.kernels, self._tries = kernels or choose(self.device_type), kernels is None
        self.meter = meter or MemoryMeter(self.device_type, loaded.runtime_bytes)

    def with_kernels(self, kernels: Kernels) -> ModelBackend:
        """The same model with other kernels."""
        return ModelBackend(self.loaded, kernels, self.meter)

    def try_kernels(self, spec: ModelSpec, policy: CompressionPolicy) -> None:
        """See ``Backend``."""
        if self._tries:
            from bmx.engine.kernel_trials import tried

            self.kernels = tried(self.kernels, self.loaded.model, spec, policy)

    def replace_kernels(self, error: Exception) -> bool:
        """See ``Backend``."""
        if not self._tries or self.kernels.name != "triton":
            return False
        from bmx.kernels.trial import without

        self.kernels = without(self.kernels, error)
        return True

    @property
    def spec(self) -> ModelSpec:
        """The model's sizes."""
        return self.loaded.spec

    @property
    def end_token_ids(self) -> frozenset[int]:
        """Token ids that end an answer."""
        return self.loaded.end_token_ids

    @property
    def runtime_bytes(self) -> int:
        """Bytes that the process holds beside the model."""
        return self.loaded.runtime_bytes

    @property
    def shares_prefixes(self) -> bool:
        """Not where the rotary embedding depends on the length of the whole sequence."""
        return self.loaded.rope is None

    @property
    def model(self) -> Any:
        """The torch module."""
        return self.loaded.model

    def runner(
        self,
        plan: Plan,
        policy: CompressionPolicy,
        *,
        probe: tuple[int, ...] = (),
        watch: Watch | None = None,
        refused: Callable[[str], None] | None = None,
    ) -> AbstractContextManager[Runner]:
        """See ``Backend``."""
        from bmx.engine.runner import ModelRunner

        return ModelRunner(self.loaded, policy, plan, self.kernels, probe, watch, refused)

    def describe(self) -> dict[str, Any]:
        """See ``Backend``."""
        import torch

        model = self.loaded.model
        on_gpu, kernels = self.device_type == "cuda", self.kernels
        reasons: dict[str, Any] = {"attention_why": kernels.why} if on_gpu else {}
        reasons |= {"replaced_kernels": dict(kernels.replaced)} if kernels.replaced else {}
        return {
            "architecture": self.spec.name,
            "commit": self.loaded.commit,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(model.device) if on_gpu else hardware.cpu_name(),
            "attention": kernels.name,
            **reasons,
        }
