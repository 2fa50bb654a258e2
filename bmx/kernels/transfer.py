"""Numbers to the device and back without waiting for it. Knows tensors and pinned memory; knows nothing of steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def upload(numbers: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """Numbers on a device. To a GPU they go through pinned memory, so that nobody waits for what runs there."""
    here = torch.tensor(numbers, dtype=dtype)
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here


class Download:
    """A tensor's numbers on their way to the host; from a GPU, the copy begins when what was launched before is done.

    Args:
        tensor: any; what is written to it later is not seen.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._ready: torch.cuda.Event | None = None
        if tensor.device.type != "cuda":
            self._here = tensor.clone()
            return
        self._here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._here.copy_(tensor, non_blocking=True)
        self._ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._ready.record()

    def read(self) -> Any:
        """The numbers as (nested) lists, once they are there."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._here.tolist()
