"""How a plan is put together, in one place: limits, step sizes, slots, and the fastest of the plans that fit.

Runs, `bmx plan-batch`, `bmx bench` and the check before a model is loaded all make their plans here. Knows sizes and
rates; loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from bmx.compress.kernel_orders import left_to_kernels
from bmx.compress.policy import CompressionPolicy
from bmx.config import EngineConfig
from bmx.kernels import Kernels
from bmx.kernels.profile import KernelProfile
from bmx.kv.layout import KVLayout
from bmx.model.spec import ModelSpec
from bmx.plan.device import Device
from bmx.plan.forecast import Forecast, fastest, forecast
from bmx.plan.machine_speed import TYPICAL, Rates
from bmx.plan.memory import Limits, Memory, ReadingSlots, SlotGroup, StepSize, memory_needed
from bmx.plan.planner import Length, Plan, plan, shrunk, step_sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanBuilder:
    """Makes plans for one model under one set of settings.

    Attributes:
        config: the settings.
        spec: the model's sizes.
        policy: which KV pairs stay in a slot.
        device: the device, as the memory formula sees it.
        kernels: the kernels that compute attention there.
        limits: bytes and slots that may be used.
        rates: says how fast the device is; called only where several plans must be compared.
        probe_tokens: tokens of the probe that is asked after each chunk.
    """

    config: EngineConfig
    spec: ModelSpec
    policy: CompressionPolicy
    device: Device
    kernels: Kernels
    limits: Limits
    rates: Callable[[], Rates] = lambda: TYPICAL
    probe_tokens: int = 0

    def step_sizes(self, lengths: Sequence[Length]) -> list[StepSize]:
        """The step sizes to choose from, the largest first."""
        return step_sizes(self.config, self.device.kind, lengths, self.probe_tokens)

    def plan(self, lengths: Sequence[Length], sizes: Sequence[StepSize] | None = None) -> Plan:
        """The plan that is expected to answer these requests the fastest.

        Args:
            lengths: of the requests.
            sizes: step sizes to choose from; those of ``step_sizes`` if left out.

        Raises:
            MemoryLimitError: not even one slot fits.
        """
        sizes = self.step_sizes(lengths) if sizes is None else sizes
        plans: list[Callable[[], Plan]] = [
            partial(
                plan,
                self.spec,
                self.layout,
                self.limits,
                lengths,
                size,
                self.device,
                self._reading_layout,
                shares=self.kernels.capabilities.reads_shared_rows,
            )
            for size in sizes
        ]
        return fastest(plans, self.spec, lengths, self._profile, self.rates)

    def forecast(
        self, plan: Plan, lengths: Sequence[Length], rates: Rates, decode_layouts: Sequence[KVLayout] | None = None
    ) -> Forecast:
        """How long a run under a plan is expected to take.

        Args:
            plan: the plan.
            lengths: of the requests.
            rates: how fast the device is.
            decode_layouts: for each group, what is left of a slot once its prompt is read; all of it if left out.
        """
        return forecast(self.spec, plan, lengths, rates, self._profile, decode_layouts)

    @property
    def _profile(self) -> KernelProfile:
        """What the kernels make of the device's rates."""
        capabilities = self.kernels.capabilities
        return capabilities.profile_for(self.spec.itemsize, left_to_kernels(self.config, capabilities))

    def shrunk(self, plan: Plan) -> Plan | None:
        """A smaller plan, for when memory ran out under this one; None if this is the smallest."""
        return shrunk(plan, self.spec, self.layout, self.device)

    def memory_of_one(self, length: Length, size: StepSize) -> Memory:
        """The memory of a run with a single slot.

        Args:
            length: of the request that it holds.
            size: of the steps.
        """
        read_in = self._reading_layout
        reading = read_in and ReadingSlots(read_in(length.reading_rows), 1)
        return memory_needed(self.spec, self.layout, [SlotGroup(length.rows_needed, 1)], size, self.device, (), reading)

    def layout(self, capacity: int) -> KVLayout:
        """What a slot of ``capacity`` rows, on which an answer is written, holds layer by layer."""
        return self.policy.answering.layout(self.spec, capacity)

    @property
    def _reading_layout(self) -> Callable[[int], KVLayout] | None:
        """What a slot in which a prompt is read before it is archived holds; None where nothing is archived."""
        return partial(self.policy.layout, self.spec) if self.policy.archive else None
