"""The capacities of slots: a few that suit many sequences. Knows numbers of rows alone."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

MAX_GROUPS = 16
ENOUGH = 0.08  # share of all rows that may stay unused; no further group is made to save less
ROW_ALIGNMENT = 16  # capacities are multiples of it
MAX_CANDIDATES = 128  # capacities that are compared


def capacities(rows_needed: Sequence[int]) -> list[int]:
    """The capacity of the group that each sequence belongs to, with as few groups as waste little; at most 16.

    For each number of groups, dynamic programming over at most 128 candidate capacities finds the cut of the sorted
    needs that leaves the fewest rows unused. The first number of groups that leaves 8 % or less unused is taken.

    Args:
        rows_needed: rows of the slot that each sequence needs.
    """
    largest = max(rows_needed)
    rounded = [min(-(-rows // ROW_ALIGNMENT) * ROW_ALIGNMENT, largest) for rows in rows_needed]
    distinct = sorted(set(rounded))
    step = -(-len(distinct) // MAX_CANDIDATES)
    candidates = sorted({*distinct[step - 1 :: step], largest})
    count = Counter(candidates[bisect_left(candidates, rows)] for rows in rounded)
    chosen = _least_waste(candidates, [count[c] for c in candidates], enough=sum(rows_needed) / (1 - ENOUGH))
    return [chosen[bisect_left(chosen, rows)] for rows in rounded]


def _least_waste(candidates: list[int], counts: list[int], enough: float) -> list[int]:
    """The fewest candidates, the last among them, that hold all sequences in ``enough`` rows; the 16 best otherwise.

    Args:
        candidates: capacities in ascending order.
        counts: sequences whose smallest candidate each is.
        enough: rows in all slots, if each sequence had its own, that are few enough.
    """
    infinite: tuple[int, list[int]] = (2**62, [])
    previous: list[tuple[int, list[int]]] = [(0, []), *[infinite] * len(candidates)]
    best = infinite
    for _ in range(min(MAX_GROUPS, len(candidates))):
        current = [infinite] * (len(candidates) + 1)  # of the first i candidates: rows in all, capacities chosen
        for stop, capacity in enumerate(candidates, 1):
            members = 0
            for start in range(stop - 1, -1, -1):
                members += counts[start]
                rows, chosen = previous[start]
                if rows + members * capacity < current[stop][0]:
                    current[stop] = (rows + members * capacity, [*chosen, capacity])
        best = min(best, current[-1], key=lambda cut: cut[0])
        if best[0] <= enough:
            break
        previous = current
    return best[1]
