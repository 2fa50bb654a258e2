"""Numbers to the device and back without waiting for it. Knows tensors and pinned memory; knows nothing of steps."""

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
    return on_host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else on_host


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
