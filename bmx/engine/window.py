"""A window of waiting items that gives those with the same beginning out together. Pure Python; fuzzed without torch.

Knows items by the keys of their beginnings; does not know what an item is.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

ROWS = 2048  # most rows in the window of a run
TOKENS = 8 << 20  # most tokens of their prompts

Item = TypeVar("Item")


def chained_keys(text: str | bytes, ends: Iterable[int]) -> tuple[int, ...]:
    """The keys of a text's beginnings: equal keys at the same place mean equal beginnings, but for rare collisions.

    Keys of one process mean nothing to another.

    Args:
        text: characters or bytes.
        ends: where the beginnings end, in ascending order, none of them beyond the text.
    """
    keys, key, start = [], 0, 0
    for end in ends:
        key, start = hash((key, end, text[start:end])), end
        keys.append(key)
    return tuple(keys)


@dataclass(slots=True, eq=False)
class _Waiting(Generic[Item]):
    """An item that waits."""

    item: Item
    keys: tuple[int, ...]
    weight: int


@dataclass(slots=True, eq=False)
class _Group(Generic[Item]):
    """Waiting items whose first ``depth`` keys are the same, by their next key, in the order in which they came.

    No two items of different members have the next key in common. An item without a next key is a member of its own.
    """

    keys: tuple[int, ...]
    depth: int
    members: OrderedDict[object, _Group[Item] | _Waiting[Item]] = field(default_factory=OrderedDict)

    def next_key(self, keys: tuple[int, ...]) -> object:
        """The name of the member that an item with these keys belongs to."""
        return keys[self.depth] if len(keys) > self.depth else object()

    def add(self, new: _Waiting[Item]) -> None:
        """Add an item to the member with which it shares the most; two that share more become a group of their own."""
        group = self
        while True:
            name = group.next_key(new.keys)
            member = group.members.get(name)
            if member is None:
                group.members[name] = new
                return
            depth = _shared_keys(member.keys, new.keys)
            if isinstance(member, _Waiting) or depth < member.depth:
                between: _Group[Item] = _Group(member.keys[:depth], depth)
                between.members[between.next_key(member.keys)] = member
                group.members[name] = member = between
            group = member

    @property
    def first(self) -> _Waiting[Item]:
        """The first item of the first member."""
        member: _Group[Item] | _Waiting[Item] = self
        while isinstance(member, _Group):
            member = next(iter(member.members.values()))
        return member

    def remove_first(self) -> None:
        """Remove that item, and the groups that it leaves empty."""
        path = [self]
        while isinstance(member := next(iter(path[-1].members.values())), _Group):
            path.append(member)
        for group in reversed(path):
            group.members.popitem(last=False)
            if group.members:
                return


class Window(Generic[Item]):
    """Waiting items, given out depth-first: those whose beginnings are the same come one after the other.

    While items wait that share a beginning with the one given out last, those that share the most with it are next.
    Else the item is next that has waited longest, and then those that share with it. Items that share nothing keep
    their order.

    Items that are added later may be given out earlier, but only so many that every item is given out before twice
    ``size`` others are: the rest of them wait until all that came before are given out.

    Args:
        size: most items.
        weight: most weight of all items together; one item may weigh more.
    """

    def __init__(self, size: int, weight: int) -> None:
        self._size, self._most_weight = size, weight
        self._count = self._weight = 0
        self._joined = 0  # items that were added to those now given out, after the first of these was
        self._now: _Group[Item] = _Group((), 0)
        self._later: _Group[Item] = _Group((), 0)
        self._given = False  # whether the first item of ``_now`` is given out; it stays so that others can join it

    def __len__(self) -> int:
        return self._count

    @property
    def full(self) -> bool:
        """Whether no item should be added until one is given out."""
        return self._count >= self._size or self._weight >= self._most_weight

    def add(self, item: Item, keys: Sequence[int], weight: int) -> None:
        """Let an item wait.

        Args:
            item: the item.
            keys: of its beginnings, from the shortest to the longest, each of them implying those before it.
            weight: what it counts for.
        """
        new = _Waiting(item, tuple(keys), weight)
        self._count, self._weight = self._count + 1, self._weight + weight
        related = bool(new.keys) and new.keys[0] in self._now.members
        if self._given and not (related and self._joined < self._size // 4):
            self._later.add(new)
        else:
            self._now.add(new)
            self._joined += self._given

    def pop(self) -> Item:
        """Give out the next item.

        Raises:
            IndexError: none waits.
        """
        if not self._count:
            raise IndexError("the window is empty")
        if self._given:
            self._now.remove_first()
        if not self._now.members:
            self._now, self._later, self._joined = self._later, _Group((), 0), 0
        first, self._given = self._now.first, True
        self._count, self._weight = self._count - 1, self._weight - first.weight
        return first.item


def _shared_keys(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """The number of leading keys that are the same; since each implies those before it, bisection finds it."""
    return bisect_left(range(min(len(first), len(second))), True, key=lambda i: first[i] != second[i])
