"""A way to rank pairs that finds no memory once, in the second of the processes that share a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import distributed

from bmx.compress.scorer_api import Needs, ScorerDefaults


@dataclass(frozen=True)
class NoRoomOnce(ScorerDefaults):
    """The longest keys stay; ``mark`` is the path of a file that says that memory ran out already."""

    needs: ClassVar[Needs] = Needs.KEYS
    mark: str = ""

    def __call__(self, seen: Any) -> Any:
        mark = Path(self.mark)
        if distributed.is_initialized() and distributed.get_rank() == 1 and not mark.exists():
            mark.touch()
            raise MemoryError("no room for scores")
        return seen.keys.norm(dim=-1)
