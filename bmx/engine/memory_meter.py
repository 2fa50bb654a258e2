"""What memory a run really holds, and what it means when there is none left. Knows the device; plans nothing.

Loads torch only where that is what it asks.
"""

from __future__ import annotations

import gc
import os
import sys
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from typing import Any

from bmx import hardware
from bmx.errors import DeviceError
from bmx.hardware import FreeMemory
from bmx.model.spec import ModelSpec

KERNEL_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
KEPT_KERNELS = "64"  # compiled products for as many shapes; torch's own 1,024 grow to 300 MB, and are no faster
TRIM_AT = 0.92  # of what was planned
TRIM_STEP = 16 * 10**6  # bytes that must have come on top since the last time
NO_GPU = ("cuda error", "cuda driver error", "error [cuda]")
NO_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "failed to allocate",
    "bad_alloc",
    "status_alloc_failed",  # cuBLAS, cuDNN, cuSOLVER
    "cublas_status_not_initialized",  # a handle that finds no memory says so
    "cudnn_status_not_initialized",
    "could not create a memory",
)


def bound_kernel_caches() -> None:
    """Keep torch's caches of compiled CPU kernels small, unless the environment says how large they may be."""
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, KEPT_KERNELS)


class MemoryMeter:
    """The most memory held since the meter was reset.

    Args:
        device: ``cpu`` or ``cuda``.
        context_bytes: what the GPU's context holds beside torch's own allocations; of no use on the CPU.

    Attributes:
        exact: whether the last reset worked; otherwise the peak is that of the whole process.
    """

    def __init__(self, device: str, context_bytes: int) -> None:
        self._cuda = device == "cuda"
        self._context = context_bytes if self._cuda else 0
        self.exact = False
        self._trimmed_to = 0

    def reset(self) -> None:
        """Count from now."""
        self._trimmed_to = 0
        if self._cuda:
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.exact = self._cuda or hardware.reset_peak()

    @property
    def peak(self) -> int:
        """The most bytes held: of the GPU, or of the host by this process."""
        if not self._cuda:
            return hardware.peak_resident_bytes()
        import torch

        return torch.cuda.max_memory_reserved() + self._context

    def keep_to(self, planned: int) -> None:
        """On the CPU, let go of what lies free in the heap when a run holds nearly what was planned, and more again."""
        if not self._cuda and self.now > max(TRIM_AT * planned, self._trimmed_to + TRIM_STEP):
            hardware.trim_heap()
            self._trimmed_to = self.now

    def free_memory(self) -> FreeMemory:
        """Memory that could be taken on the device now; what an earlier run left behind is given back first."""
        if self._cuda:
            import torch

            torch.cuda.empty_cache()
            return hardware.free_gpu_memory()
        return hardware.free_host_memory()

    @property
    def now(self) -> int:
        """Bytes held."""
        if not self._cuda:
            return hardware.resident_bytes()
        import torch

        return torch.cuda.memory_reserved() + self._context


class FullCacheSize:
    """What full caches would hold of sequences, for comparison with what is held.

    Args:
        spec: the model's sizes.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._pair_bytes: Counter[int | None] = Counter()  # bytes of a token's KV pairs, by the window of their layers
        for index, layer in enumerate(spec.layers):
            if layer.owner == index:
                self._pair_bytes[layer.window] += layer.kv_heads * (layer.key_dim + layer.value_dim) * spec.itemsize

    def nbytes(self, tokens: Seq[int]) -> int:
        """Bytes of full caches with these numbers of tokens; layers with a window hold no more than that."""
        return sum(
            size * sum(min(count, window) for count in tokens) if window else size * sum(tokens)
            for window, size in self._pair_bytes.items()
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, typed or not."""
    torch: Any = sys.modules.get("torch")  # what is not loaded raised nothing
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in NO_MEMORY)


def release() -> None:
    """Give back what an attempt that ran out of memory left behind."""
    gc.collect()
    hardware.trim_heap()
    torch: Any = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def device_errors() -> Iterator[None]:
    """Turn an error after which CUDA answers nothing any more into a DeviceError.

    Raises:
        DeviceError: an assertion on the device, an illegal access, a GPU that is gone.
    """
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error) or not any(text in str(error).lower() for text in NO_GPU):
            raise
        cause = str(error).strip().splitlines()[0]
        hint = "answers that were finished are kept; run again, and see the system's log if it comes back"
        raise DeviceError(f"the GPU stopped: {cause}", hint=hint) from error
