"""How many slots each group gets: in proportion to its load, and as many in all as fit. Knows numbers alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bmx.plan.memory import SlotGroup


@dataclass(frozen=True, slots=True)
class Demand:
    """The load on one group of slots: the number of sequences, and the slot-steps that they will occupy."""

    sequences: int
    steps: int

    def __add__(self, other: Demand) -> Demand:
        return Demand(self.sequences + other.sequences, self.steps + other.steps)


def largest_fitting(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of these sizes that fits; None if not even the smallest does.

    Args:
        sizes: in ascending order.
        fits: whether a size fits; if one does, all smaller ones do.
    """
    largest, low, high = None, 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        if fits(sizes[middle]):
            largest, low = sizes[middle], middle + 1
        else:
            high = middle
    return largest


def most_slots(
    demand: dict[int, Demand],
    most: int,
    fits: Callable[[tuple[SlotGroup, ...]], bool],
) -> tuple[SlotGroup, ...]:
    """As many slots as fit, shared out in proportion to the groups' slot-steps; with fewer groups if need be.

    One slot of the largest capacity must fit.

    Args:
        demand: the load by capacity.
        most: most slots in all.
        fits: whether slots fit the limits.
    """
    capacities = sorted(demand)

    def split(slots: int) -> tuple[SlotGroup, ...]:
        return split_slots(demand, capacities, slots)

    while True:
        wanted = min(most, sum(demand[capacity].sequences for capacity in capacities))
        slots = largest_fitting(range(1, wanted + 1), lambda slots: fits(split(slots))) or 0
        if slots >= len(capacities):
            return split(slots)
        smallest, second = capacities[:2]
        demand = demand | {second: demand[smallest] + demand[second]}
        capacities = capacities[1:]


def split_slots(demand: dict[int, Demand], capacities: Sequence[int], slots: int) -> tuple[SlotGroup, ...]:
    """Share out slots over the groups in proportion to their slot-steps, at least one each while there are enough.

    Args:
        demand: the load by capacity.
        capacities: of the groups.
        slots: how many in all.
    """
    counts = {capacity: min(1, max(0, slots - i)) for i, capacity in enumerate(sorted(capacities, reverse=True))}
    for _ in range(slots - sum(counts.values())):
        open_groups = [capacity for capacity in capacities if counts[capacity] < demand[capacity].sequences]
        if not open_groups:
            break
        counts[max(open_groups, key=lambda capacity: demand[capacity].steps / counts[capacity])] += 1
    return tuple(SlotGroup(capacity, counts[capacity]) for capacity in sorted(counts) if counts[capacity])
