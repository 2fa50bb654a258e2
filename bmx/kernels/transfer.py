"""Numbers to the device and back. Knows tensors and pinned memory; knows nothing of steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def upload(numbers: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """A tensor of these numbers on a device; to a GPU through pinned memory, so that the host does not wait.

    Args:
        numbers: (nested) lists of numbers.
        device: where the tensor goes.
        dtype: its type.
    """
    on_host = torch.tensor(numbers, dtype=dtype)
    return on_host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else on_host.to(device)


class Download:
    """A tensor on its way to the host; from a GPU, the copy begins when the work launched before it is done.

    Args:
        tensor: any; what is written to it later is not seen.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._ready: torch.cuda.Event | None = None
        if tensor.device.type != "cuda":
            self._on_host = tensor.clone()
            return
        self._on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._on_host.copy_(tensor, non_blocking=True)
        self._ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._ready.record()

    def read(self) -> Any:
        """The numbers as (nested) lists; waits until they have arrived."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._on_host.tolist()


def fetch(part: Tensor, index: Any, device: torch.device) -> Tensor:
    """What a tensor holds at an index, on the device that computes.

    Args:
        part: wherever it is.
        index: of it; its tensors are on the device.
        device: the one that computes.
    """
    if part.device.type == device.type:
        return part[index]
    return part[_moved(index, part.device)].to(device)


def fetch_rows(part: Tensor, index: Sequence[Tensor], device: torch.device) -> Tensor:
    """What a contiguous tensor holds at entries of its first dimensions, on the device that computes.

    It is ``part[index]``, in a way that copies whole vectors.

    Args:
        part: wherever it is.
        index: whole numbers for each of the first dimensions, which are broadcast; on the device.
        device: the one that computes.
    """
    entry = index[0]
    for size, numbers in zip(part.shape[1:], index[1:], strict=False):
        entry = entry * size + numbers
    vectors = part.flatten(0, len(index) - 1).index_select(0, entry.flatten().to(part.device))
    return vectors.to(device).view(*entry.shape, *part.shape[len(index) :])


def put(part: Tensor, index: Any, values: Tensor) -> None:
    """Write values of the device that computes into a tensor.

    Args:
        part: wherever it is; written.
        index: of it; its tensors are on the device.
        values: on the device.
    """
    if part.device.type == values.device.type:
        part[index] = values
    else:
        part[_moved(index, part.device)] = values.to(part.device)


def _moved(index: Any, device: torch.device) -> Any:
    """An index whose tensors are on another device."""
    if isinstance(index, tuple):
        return tuple(_moved(one, device) for one in index)
    return index.to(device) if isinstance(index, Tensor) else index
