"""The memory that a run really holds, and the errors that mean that memory ran out. Knows the device; plans nothing.

Loads torch only to ask about a GPU.
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
KEPT_KERNELS = "64"  # shapes whose compiled products are kept; torch's 1,024 grow to 300 MB, and are no faster
TRIM_AT = 0.92  # of the planned bytes: from there on the heap is trimmed
TRIM_STEP = 16 * 10**6  # bytes that must have been added since it was trimmed last
NO_GPU = ("cuda error", "cuda driver error", "error [cuda]")
NO_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "failed to allocate",
    "bad_alloc",
    "status_alloc_failed",  # cuBLAS, cuDNN, cuSOLVER
    "cublas_status_not_initialized",  # raised where a handle finds no memory
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
        context_bytes: bytes of the GPU's context, beside torch's own allocations; ignored on the CPU.

    Attributes:
        exact: whether the last reset worked; otherwise the peak is that of the process since its start.
    """

    def __init__(self, device: str, context_bytes: int) -> None:
        self._cuda = device == "cuda"
        self._context = context_bytes if self._cuda else 0
        self.exact = False
        self._trimmed_to = self._peak = 0
        self._files: int | None = None  # pages of files in memory at the reset, where later ones do not count

    def reset(self, spares_files: bool = False) -> None:
        """Count from now.

        Args:
            spares_files: do not count pages of files that come into memory from now on: those of an archive, which the
                system writes back and takes when it needs memory.
        """
        self._trimmed_to = self._peak = 0
        self._files = hardware.file_bytes() if spares_files and not self._cuda else None
        if self._cuda:
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.exact = self._cuda or hardware.reset_peak()

    @property
    def peak(self) -> int:
        """The most bytes held since the reset: of the GPU, or of the host by this process.

        The system's own peak counts pages of files. Where those are spared, what came in since the reset is taken off,
        and the system counts again from here, so that it is off by no more than what came and went between two calls.
        """
        if not self._cuda and self._files is None:
            return hardware.peak_resident_bytes()
        if not self._cuda:
            self._peak = max(self._peak, hardware.peak_resident_bytes() - self._spared)
            hardware.reset_peak()
            return self._peak
        import torch

        return torch.cuda.max_memory_reserved() + self._context

    def keep_to(self, planned: int) -> None:
        """On the CPU, give free pages of the heap back when a run holds nearly the planned bytes, and after growth."""
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
        """Bytes held now."""
        if not self._cuda:
            return hardware.resident_bytes() - self._spared
        import torch

        return torch.cuda.memory_reserved() + self._context

    @property
    def _spared(self) -> int:
        """Bytes of pages of files that do not count."""
        return 0 if self._files is None else max(0, hardware.file_bytes() - self._files)

    @property
    def held(self) -> int:
        """Bytes held now that are missing in the free memory: of the host, without pages of files."""
        return self.now if self._cuda else hardware.held_bytes()


class FullCacheSize:
    """What full caches would hold of sequences, for comparison with what is held.

    Args:
        spec: the model's sizes.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._state_bytes = spec.state_bytes
        self._pair_bytes: Counter[int | None] = Counter()  # bytes of a token's KV pairs, by the window of their layers
        for index, layer in enumerate(spec.layers):
            if layer.owner == index:
                self._pair_bytes[layer.window] += layer.kv_heads * (layer.key_dim + layer.value_dim) * spec.itemsize

    def nbytes(self, tokens: Seq[int]) -> int:
        """Bytes of full caches with these numbers of tokens; layers with a window hold no more than that.

        States of layers without attention are included.
        """
        return self._state_bytes * len(tokens) + sum(
            size * sum(min(count, window) for count in tokens) if window else size * sum(tokens)
            for window, size in self._pair_bytes.items()
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, by its type or by its text."""
    torch: Any = sys.modules.get("torch")  # if it is not loaded, it raised nothing
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in NO_MEMORY)


def release() -> None:
    """Free the memory that a failed attempt left behind."""
    gc.collect()
    hardware.trim_heap()
    torch: Any = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def device_errors() -> Iterator[None]:
    """Turn an error after which CUDA refuses every call into a DeviceError.

    Raises:
        DeviceError: an assertion on the device, an illegal access, a GPU that is gone.
    """
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error) or not any(text in str(error).lower() for text in NO_GPU):
            raise
        cause = str(error).strip().splitlines()[0]
        hint = "Finished answers are saved. Run the same command again; if it happens again, see the system's log"
        raise DeviceError(f"the GPU stopped: {cause}", hint=hint) from error
