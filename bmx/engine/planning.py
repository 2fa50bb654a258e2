"""Plans for a loaded model: made from its sizes, then checked against a run of the largest step.

Knows the closed form and the measurement that corrects it; how requests are answered under a plan is the run's
business.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from bmx.compress.policy import CompressionPolicy
from bmx.config import EngineConfig
from bmx.engine.backend import Backend
from bmx.engine.memory_meter import device_errors, is_out_of_memory, release
from bmx.engine.prompt_lengths import window_bytes
from bmx.errors import BmxError
from bmx.model.spec import ModelSpec
from bmx.plan.builder import PlanBuilder
from bmx.plan.device import Device
from bmx.plan.machine_speed import TYPICAL, Rates, machine_rates
from bmx.plan.memory import Limits, SlotGroup, limits
from bmx.plan.planner import Length, Plan, ProfiledStep
from bmx.stats import Stats


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlanner:
    """Makes the plans of an engine.

    Attributes:
        config: the settings.
        spec: the model's sizes, with the layers that share their KV pairs.
        policy: which KV pairs stay in a slot.
        backend: the model on its device.
        probe: token ids that are asked after each chunk.
        formats_bytes: bytes that the formats of answers take, where the device is the CPU.
    """

    config: EngineConfig
    spec: ModelSpec
    policy: CompressionPolicy
    backend: Backend
    probe: tuple[int, ...] = ()
    formats_bytes: int = 0

    def plan(self, lengths: Iterable[Length]) -> Plan:
        """The plan that answers these lengths the fastest within the memory that may be used.

        The largest step is run once, on made-up tokens, before the slots exist: where it takes more than the closed
        form says, the plan makes room for it. Where kernels fail in it that passed their trials, plain torch computes.

        Raises:
            MemoryLimitError: not even one slot fits.
            DeviceError: the GPU failed.
        """
        lengths = list(lengths) or [Length(1, 1, 1)]
        try:
            return self._plan(lengths)
        except Exception as error:
            known = isinstance(error, BmxError) or is_out_of_memory(error)
            if known or not self.backend.replace_kernels(error):
                raise
        release()
        return self._plan(lengths)

    def _plan(self, lengths: list[Length]) -> Plan:
        """See ``plan``, with the kernels that there are."""
        meter = self.backend.meter
        builder = self._builder(limits(self.config, meter.free_memory(), held=meter.held))
        if builder.device.kind == "cpu":
            builder = replace(builder, device=replace(builder.device, window=window_bytes(lengths)))
        sizes = builder.step_sizes(lengths)
        if not self.backend.measurable:
            return builder.plan(lengths, sizes[:1])
        plan = builder.plan(lengths, sizes)
        while not (step := self._profile(plan)).fits:
            smaller = self.shrunk(plan)
            if smaller is None:
                return plan  # its rows will fail one by one, or find that memory is back
            plan = smaller
            builder = replace(builder, limits=replace(plan.limits, slots=plan.slots))
        if not meter.exact:
            return plan
        if step.excess > 0:
            roomier = replace(builder, device=replace(builder.device, slack=builder.device.slack + step.excess))
            smaller_steps = [s for s in sizes if s.max_num_batched_tokens < plan.step.max_num_batched_tokens]
            plan = roomier.plan(lengths, [plan.step, *smaller_steps])
        return replace(plan, profiled=step)

    def shrunk(self, plan: Plan) -> Plan | None:
        """A smaller plan, for when memory ran out under this one; None if this is the smallest."""
        release()
        return self._builder(plan.limits).shrunk(plan)

    def _builder(self, limits: Limits) -> PlanBuilder:
        """Makes plans within these limits."""
        backend, config = self.backend, self.config
        runtime = backend.runtime_bytes + self.formats_bytes
        return PlanBuilder(
            config=config,
            spec=self.spec,
            policy=self.policy,
            device=Device.of(backend.device_type, self.spec, runtime, config, backend.kernels),
            kernels=backend.kernels,
            limits=limits,
            rates=self._rates,
            probe_tokens=len(self.probe),
        )

    def _rates(self) -> Rates:
        """The machine's rates; typical ones where there is no memory to measure them."""
        try:
            described = self.backend.describe()
            return machine_rates(self.backend.device_type, described["dtype"], described["device"])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        release()
        return TYPICAL

    def _profile(self, plan: Plan) -> ProfiledStep:
        """Run the largest step of a plan beside the smallest pool that it can read."""
        last = len(plan.groups) - 1
        alone = plan.alone(SlotGroup(plan.groups[last].capacity, 1), plan.layouts[last])
        meter = self.backend.meter
        meter.reset(spares_files=plan.memory.file > 0)
        refused = None if self.config.enforce_eager else Stats().note_eager
        try:
            with device_errors(), self.backend.runner(alone, self.policy, probe=self.probe, refused=refused) as runner:
                runner.profile_step(plan.step, plan.slots)
                return ProfiledStep(predicted=plan.memory.step, measured=meter.peak - runner.kv_bytes)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        return ProfiledStep(predicted=plan.memory.step, measured=None)
