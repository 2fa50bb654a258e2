"""The states of mixers, which are layers that keep a tensor of fixed size for each sequence instead of KV pairs.

A short convolution keeps its last inputs, a recurrent layer its state. One piece of memory per tensor holds those of
all slots, and one more that belongs to no slot: idle rows of a captured graph may read and write it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bmx.kernels.transfer import upload
from bmx.kv.layout import StateLayout


class StatePool:
    """The states of all slots of a run.

    Args:
        layouts: what each sequence keeps, in the order in which a forward asks for it.
        slots: number of slots (S) over all groups.
        dtype: of the model: that of windows.
        device: where the tensors are.

    Attributes:
        tensors: by state, [S + 1, *shape]: zeros before a sequence's first token.
    """

    def __init__(self, layouts: Sequence[StateLayout], slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tensors = tuple(
            torch.zeros(slots + 1, *layout.shape, dtype=dtype_of(layout, dtype), device=device) for layout in layouts
        )

    def clear(self, slots: Sequence[int]) -> None:
        """Set the states of slots to what they are before a sequence's first token."""
        if self.tensors and slots:
            index = upload(slots, self.tensors[0].device)
            for tensor in self.tensors:
                tensor.index_fill_(0, index, 0)

    def copy(self, source: int, target: int) -> None:
        """Copy the states of one slot to another."""
        for tensor in self.tensors:
            tensor[target] = tensor[source]

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(tensor.nbytes for tensor in self.tensors)


def dtype_of(layout: StateLayout, dtype: torch.dtype) -> torch.dtype:
    """The type of a state: windows have the model's, recurrent states float32, or bfloat16 where the layout says so.

    Args:
        layout: of the state.
        dtype: of the model.
    """
    if not layout.recurrent:
        return dtype
    return torch.bfloat16 if layout.rounds else torch.float32
