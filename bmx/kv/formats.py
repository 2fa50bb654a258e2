"""How vectors are stored: as they are, or in fewer bits with scales of their own. Each knows its bytes.

Knows numbers; knows nothing of positions, scores or what a vector is for. Vectors of a slot stay independent of each
other, so that one can be overwritten alone; only ``ByChannel`` ties groups of rows together.

Shapes: S slots, K kv heads, C rows, D dim, V vectors addressed by an index (any shape [...]).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bmx.kv.layout import BITS, KEY_GROUP, FormatName

FP8 = torch.float8_e4m3fn
LARGEST = {"fp8": 448.0, "int8": 127.0, "int4": 15.0}
HALF = 65504.0  # the largest float16
TINY = 1e-7  # the least scale: smaller ones would be lost in float16


class Store(Protocol):
    """Rows of vectors [S, K, C, D]."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        ...

    def read(self, index: Any) -> Tensor:
        """The vectors at an index of [S, K, C], in the model's type; they may be the store's own."""
        ...

    def write(self, index: Any, vectors: Tensor) -> None:
        """Put vectors [..., D] at an index of [S, K, C]."""
        ...

    def replace(self, slot: int, going: Tensor, chosen: Tensor, vectors: Tensor) -> None:
        """Put other vectors in the place of some of a slot's first rows, without asking which on the host.

        Args:
            going: [K, R] bool, rows that are replaced.
            chosen: [K, R], by which of the vectors [T, K, D].
        """
        ...

    def clear(self, slot: int) -> None:
        """Make all vectors of a slot zero."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Plain:
    """Vectors as they are."""

    vectors: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.vectors.nbytes

    def read(self, index: Any) -> Tensor:
        """The vectors themselves."""
        return self.vectors[index]

    def write(self, index: Any, vectors: Tensor) -> None:
        """As they are."""
        self.vectors[index] = vectors

    def replace(self, slot: int, going: Tensor, chosen: Tensor, vectors: Tensor) -> None:
        """As they are."""
        _replace(self.vectors[slot], going, chosen, vectors)

    def clear(self, slot: int) -> None:
        """Zeros."""
        self.vectors[slot] = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class PerVector:
    """Codes with a scale for each vector, and an offset too where codes are few (KIVI's values, arXiv 2402.02750, 3.2).

    Attributes:
        codes: [S, K, C, D] uint8 (two to a byte in four bits: [S, K, C, D / 2]).
        scale: [S, K, C, 1 or 2] float16: scale, and offset.
        dim: D.
    """

    format: FormatName
    codes: Tensor
    scale: Tensor
    dtype: torch.dtype
    dim: int

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.codes.nbytes + self.scale.nbytes

    def read(self, index: Any) -> Tensor:
        """The vectors as their codes say."""
        return decode(self.format, self.codes[index], self.scale[index], self.dtype)[..., : self.dim]

    def write(self, index: Any, vectors: Tensor) -> None:
        """Their codes."""
        self.codes[index], self.scale[index] = encode(self.format, vectors)

    def replace(self, slot: int, going: Tensor, chosen: Tensor, vectors: Tensor) -> None:
        """By their codes."""
        for mine, new in zip((self.codes, self.scale), encode(self.format, vectors), strict=True):
            _replace(mine[slot], going, chosen, new)

    def clear(self, slot: int) -> None:
        """Without scale there is nothing."""
        self.codes[slot], self.scale[slot] = 0, 0.0


@dataclass(frozen=True, slots=True, eq=False)
class ByChannel:
    """Codes with a scale and an offset for each channel of ``KEY_GROUP`` rows (KIVI's keys, arXiv 2402.02750, 3.2).

    A group is written whole.

    Attributes:
        codes: [S, K, C / G, G, D] uint8 (or D / 2); scale [S, K, C / G, D, 2] float16.
        rows: C, which the last group may exceed.
    """

    format: FormatName
    codes: Tensor
    scale: Tensor
    dtype: torch.dtype
    rows: int

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.codes.nbytes + self.scale.nbytes

    def read(self, index: Any) -> Tensor:
        """The vectors of whole heads, [..., K, C, D]; ``index`` picks slots."""
        codes, scale = self.codes[index], self.scale[index].to(self.dtype)
        numbers = _unpacked(codes, self.format)[..., : scale.shape[-2]].to(self.dtype)
        vectors = numbers * scale[..., 0].unsqueeze(-2) + scale[..., 1].unsqueeze(-2)
        return vectors.flatten(-3, -2)[..., : self.rows, :]

    def write(self, index: Any, vectors: Tensor) -> None:
        """Groups of rows [..., G, D] at an index of [S, K, C / G]."""
        numbers, scale, low = _levels(vectors.float(), -2, 2 ** BITS[self.format] - 1)
        self.codes[index] = _packed(numbers, self.format)
        self.scale[index] = torch.stack([scale, low], dim=-1).squeeze(-3)

    def write_some(self, index: Any, vectors: Tensor, wanted: Tensor) -> None:
        """The same, of the groups that are wanted [B] among those at an index of B slots."""
        codes, scale, some = self.codes[index], self.scale[index], wanted.view(-1, 1, 1, 1)
        self.write(index, vectors)
        self.codes[index] = torch.where(some, self.codes[index], codes)
        self.scale[index] = torch.where(some, self.scale[index], scale)

    def replace(self, slot: int, going: Tensor, chosen: Tensor, vectors: Tensor) -> None:  # noqa: ARG002
        """Never asked for: what is stored by channel is not evicted."""
        raise RuntimeError("groups of rows cannot be replaced row by row")

    def clear(self, slot: int) -> None:
        """Without scale there is nothing."""
        self.codes[slot], self.scale[slot] = 0, 0.0


def _replace(there: Tensor, going: Tensor, chosen: Tensor, new: Tensor) -> None:
    """Rows of there [K, C, D] that are going [K, R] become those of new [T, K, D] that are chosen [K, R]."""
    heads = torch.arange(len(going), device=going.device).unsqueeze(1)
    mine = there[:, : going.shape[1]]
    mine.copy_(torch.where(going.unsqueeze(-1), new[chosen, heads], mine))


def allocate(
    name: FormatName, shape: tuple[int, int, int], dim: int, dtype: torch.dtype, device: torch.device, by_channel: bool
) -> Store:
    """An empty store for vectors of ``dim`` numbers.

    Args:
        shape: slots, kv heads, rows.
        by_channel: one whose rows share scales by channel; it can only be appended to.
    """
    if name == "auto":
        return Plain(torch.zeros(*shape, dim, dtype=dtype, device=device))
    width = -(-dim * BITS[name] // 8)
    if by_channel:
        groups = (*shape[:2], -(-shape[2] // KEY_GROUP))
        codes = torch.zeros(*groups, KEY_GROUP, width, dtype=torch.uint8, device=device)
        return ByChannel(name, codes, torch.zeros(*groups, dim, 2, dtype=torch.float16, device=device), dtype, shape[2])
    codes = torch.zeros(*shape, width, dtype=torch.uint8, device=device)
    scales = 1 if BITS[name] == 8 else 2
    return PerVector(name, codes, torch.zeros(*shape, scales, dtype=torch.float16, device=device), dtype, dim)


def encode(name: FormatName, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [..., D] (or D / 2) uint8 and scales [..., 1 or 2] float16 of vectors [..., D]."""
    vectors = vectors.float()
    if name == "int4":
        numbers, scale, low = _levels(vectors, -1, LARGEST[name])
        return _packed(numbers, name), torch.cat([scale, low], dim=-1)
    scale = (vectors.abs().amax(-1, keepdim=True) / LARGEST[name]).clamp(TINY, HALF).half()
    numbers = (vectors / scale.float()).clamp(-LARGEST[name], LARGEST[name])
    return (numbers.to(FP8) if name == "fp8" else numbers.round().to(torch.int8)).view(torch.uint8), scale


def decode(name: FormatName, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Vectors [..., D] of ``dtype`` from what ``encode`` gave."""
    scale = scale.to(dtype)
    if name == "int4":
        return _unpacked(codes, name).to(dtype).mul_(scale[..., :1]).add_(scale[..., 1:])
    return codes.view(FP8 if name == "fp8" else torch.int8).to(dtype).mul_(scale)


def _levels(vectors: Tensor, dim: int, most: float) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 .. most (uint8) of numbers between the least and the greatest along ``dim``, their scale and offset."""
    low, high = vectors.aminmax(dim=dim, keepdim=True)
    scale = ((high - low) / most).clamp(TINY, HALF).half()
    low = low.clamp(-HALF, HALF).half()
    numbers = (vectors - low.float()) / scale.float()
    return numbers.round().clamp(0, most).to(torch.uint8), scale, low


def _packed(numbers: Tensor, name: FormatName) -> Tensor:
    """Two of four bits to a byte: the first half of the channels in the low bits, the second in the high ones."""
    if name != "int4":
        return numbers
    half = -(-numbers.shape[-1] // 2)
    high = torch.nn.functional.pad(numbers[..., half:], (0, 2 * half - numbers.shape[-1]))
    return numbers[..., :half] | (high << 4)


def _unpacked(codes: Tensor, name: FormatName) -> Tensor:
    return torch.cat([codes & 15, codes >> 4], dim=-1) if name == "int4" else codes
