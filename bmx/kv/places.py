"""Where keys and values are kept: on the device that computes, in the host's memory, or in a file.

Positions, statistics and exact copies stay on the device in any case: every token touches them, and they are small.
Loads torch only to make a tensor, so that a plan can look at a place.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import shutil
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Protocol

from bmx import hardware
from bmx.errors import OutputError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DEVICE, HOST = "device", "host"  # the places that are no folder
ALIGNMENT = 64  # bytes: of a tensor's begin in a file
IN_MEMORY = frozenset({"tmpfs", "ramfs"})  # file systems that keep their files in memory
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Place(Protocol):
    """Gives out memory for keys and values."""

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of zeros."""
        ...

    def is_on(self, device: torch.device) -> bool:
        """Whether a device computes with the tensors without a copy of them."""
        ...


class DeviceMemory:
    """The memory of a device.

    Args:
        device: which.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See ``Place``."""
        import torch

        return torch.zeros(shape, dtype=dtype, device=self._device)

    def is_on(self, device: torch.device) -> bool:
        """See ``Place``."""
        return device == self._device


class HostMemory:
    """The host's memory, beside a GPU: pinned, so that the GPU reads it without a copy on the way."""

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See ``Place``."""
        import torch

        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def is_on(self, device: torch.device) -> bool:
        """See ``Place``."""
        return device.type == "cpu"


class FileMemory:
    """A file without a name, which goes when its last tensor does; its pages are memory that the system can take back.

    Args:
        folder: where the file is.
        nbytes: of all tensors.
        tensors: how many they are at most; each begins at a multiple of ``ALIGNMENT``.

    Raises:
        OutputError: the disk has no room for it.
        UsageError: the folder cannot be used.
    """

    def __init__(self, folder: str, nbytes: int, tensors: int) -> None:
        check_folder(folder)
        self._used, size = 0, nbytes + tensors * ALIGNMENT
        try:
            with TemporaryFile(dir=folder) as file:
                os.posix_fallocate(file.fileno(), 0, size)
                self._map = mmap.mmap(file.fileno(), size)
        except OSError as error:
            if error.errno not in FULL:
                raise _unusable(folder, error) from error
            what = f"{folder} has no room for {size / 1e6:,.0f} MB of KV pairs: {error.strerror}"
            hint = "free some space, name another folder with --kv-archive-place, or lower --max-num-seqs"
            raise OutputError(what, hint=hint) from error

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See ``Place``."""
        import torch

        begin, count = self._used, math.prod(shape)
        self._used += -(-count * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=begin).view(shape)

    def is_on(self, device: torch.device) -> bool:
        """See ``Place``."""
        return device.type == "cpu"


def open_place(name: str, device: torch.device, nbytes: int, tensors: int) -> Place:
    """The place that a setting names.

    Args:
        name: ``device``, ``host`` or a folder.
        device: the device that computes.
        nbytes: of all tensors that will be there.
        tensors: how many they are at most.

    Raises:
        OutputError: the disk has no room.
        UsageError: there is no such place for this device.
    """
    check_place(name, device.type)
    if name == DEVICE:
        return DeviceMemory(device)
    return HostMemory() if name == HOST else FileMemory(name, nbytes, tensors)


def check_place(name: str, device_type: str) -> None:
    """Refuse a place that cannot be used, before anything is loaded.

    Args:
        name: ``device``, ``host`` or a folder.
        device_type: of the device that computes.

    Raises:
        UsageError: a CPU's host memory, or a folder that is missing, not writable, or kept in memory itself.
    """
    if name == HOST and device_type == "cpu":
        hint = "leave --kv-archive-place out; a folder takes the archive out of memory"
        raise UsageError("kv_archive_place host is for GPUs: the memory of a CPU is the host's", hint=hint)
    if name not in (DEVICE, HOST):
        check_folder(name)


def free_bytes(name: str) -> int | None:
    """Bytes that are free in a place beside the device's memory; None for the device, and where nobody can say."""
    if name == DEVICE:
        return None
    try:
        return hardware.free_host_memory().free if name == HOST else shutil.disk_usage(name).free
    except OSError:
        return None


def check_folder(folder: str) -> None:
    """Refuse a folder in which no file can be made, or whose files are kept in memory.

    Raises:
        UsageError: it is such a folder.
    """
    try:
        kind = _file_system(folder)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unusable(folder, error) from error
    if kind in IN_MEMORY:
        hint = "name a folder on a disk with --kv-archive-place, or leave it out"
        raise UsageError(
            f"{folder} is a {kind}, which keeps its files in memory: an archive there saves none", hint=hint
        )


def _unusable(folder: str, error: OSError) -> UsageError:
    hint = "--kv-archive-place takes device, host, or a folder that exists and can be written to"
    return UsageError(f"no file can be made in {folder!r}: {error.strerror}", hint=hint)


def _file_system(folder: str) -> str:
    """The type of the file system that a folder is on; empty where the system does not say."""
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, source = line.partition(" - ")
        if mount.split()[2] == number:
            return source.split()[0]
    return ""
