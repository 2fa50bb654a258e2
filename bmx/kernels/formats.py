"""The formats in which KV pairs can be stored in fewer bits: how a vector is encoded, and in how many bytes.

A format is one class here, with its name among the ``KV_FORMATS`` of the settings. This file knows numbers, and nothing
of slots, positions or scores. It loads torch only while it encodes or decodes, since plans need bytes alone.

Shapes: D numbers of a vector, G rows of a group (``KEY_GROUP``), for any leading shape [...].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Zeros = Callable[[tuple[int, ...], torch.dtype], Tensor]  # makes a tensor of zeros

SCALE_BYTES = 2  # of a float16 scale or offset
KEY_GROUP = 32  # tokens whose keys share one scale per channel, where nothing is evicted
VALUE_GROUP = 32  # channels of a vector that share one scale in int2
LARGEST_HALF = 65504.0  # the largest float16
SMALLEST_SCALE = 1e-7  # smaller scales would become 0 in float16


class Format:
    """Codes of ``bits`` bits for each number, with float16 scales for each vector.

    Attributes:
        bits: of a number's code.
        by_channel: whether codes are levels between a minimum and a maximum, so that keys can also be scaled by channel
            over groups of rows (KIVI, arXiv 2402.02750, section 3.2).
    """

    bits: ClassVar[int] = 8
    by_channel: ClassVar[bool] = False

    def scales(self, dim: int) -> int:  # noqa: ARG002
        """Float16 numbers of a vector of ``dim`` numbers: its scale, and its offset in formats that need one."""
        return 1

    def code_bytes(self, dim: int) -> int:
        """Bytes of the codes of a vector of ``dim`` numbers."""
        return -(-dim * self.bits // 8)

    def vector_bytes(self, dim: int) -> int:
        """Bytes of a vector of ``dim`` numbers with a scale of its own."""
        return self.code_bytes(dim) + SCALE_BYTES * self.scales(dim)

    def group_bytes(self, dim: int) -> int:
        """Bytes of a group of ``KEY_GROUP`` vectors that are scaled by channel."""
        return KEY_GROUP * self.code_bytes(dim) + 2 * SCALE_BYTES * dim

    def encode(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [..., D] uint8 (or fewer bytes) and scales [..., ``scales(D)``] float16 of vectors [..., D]."""
        raise NotImplementedError

    def decode(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Vectors [..., D] from codes and scales, computed in float32 and rounded to ``dtype``.

        Args:
            codes: as ``encode`` returns them.
            scales: as ``encode`` returns them.
            dtype: of the vectors.
        """
        raise NotImplementedError

    def encode_groups(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [..., G, D] uint8 (or fewer bytes) and scales and offsets [..., D, 2] float16 of groups [..., G, D]."""
        import torch

        levels, scale, offset = _levels(vectors.float(), -2, 2**self.bits - 1)
        return self.pack(levels), torch.stack([scale, offset], dim=-1).squeeze(-3)

    def decode_groups(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Vectors [..., G, D] of ``dtype`` from the codes and scales of groups.

        Args:
            codes: as ``encode_groups`` returns them.
            scales: as ``encode_groups`` returns them.
            dtype: of the vectors.
        """
        levels = self.unpack(codes)[..., : scales.shape[-2]].float()
        return levels.mul_(scales[..., 0].unsqueeze(-2)).add_(scales[..., 1].unsqueeze(-2)).to(dtype)

    def pack(self, levels: Tensor) -> Tensor:
        """Levels [..., D] uint8 in as few bytes as ``code_bytes`` says."""
        return levels

    def unpack(self, codes: Tensor) -> Tensor:
        """Levels [..., D] from their bytes; where D does not fill them, some levels more."""
        return codes


class FP8(Format):
    """Numbers in float8 (e4m3fn) after division by the scale."""

    largest: ClassVar[float] = 448.0

    def encode(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Format``."""
        import torch

        scaled, scale = _scaled(vectors, self.largest)
        return scaled.to(torch.float8_e4m3fn).view(torch.uint8), scale

    def decode(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """See ``Format``."""
        import torch

        return codes.view(torch.float8_e4m3fn).float().mul_(scales).to(dtype)


class Int8(Format):
    """Whole numbers from -127 to 127; by channel, 256 levels between minimum and maximum."""

    by_channel: ClassVar[bool] = True
    largest: ClassVar[float] = 127.0

    def encode(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Format``."""
        import torch

        scaled, scale = _scaled(vectors, self.largest)
        return scaled.round().to(torch.int8).view(torch.uint8), scale

    def decode(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """See ``Format``."""
        import torch

        return codes.view(torch.int8).float().mul_(scales).to(dtype)


class Int4(Format):
    """Sixteen levels between minimum and maximum (KIVI's values, arXiv 2402.02750, section 3.2), two in a byte.

    The first half of the numbers is in the low bits, the second half in the high bits.
    """

    bits: ClassVar[int] = 4
    by_channel: ClassVar[bool] = True

    def scales(self, dim: int) -> int:  # noqa: ARG002
        """See ``Format``."""
        return 2

    def encode(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Format``."""
        import torch

        levels, scale, offset = _levels(vectors.float(), -1, 2**self.bits - 1)
        return self.pack(levels), torch.cat([scale, offset], dim=-1)

    def decode(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """See ``Format``."""
        return self.unpack(codes).float().mul_(scales[..., :1]).add_(scales[..., 1:]).to(dtype)

    def pack(self, levels: Tensor) -> Tensor:
        """See ``Format``."""
        from torch.nn.functional import pad

        half = -(-levels.shape[-1] // 2)
        high = pad(levels[..., half:], (0, 2 * half - levels.shape[-1]))
        return levels[..., :half] | (high << 4)

    def unpack(self, codes: Tensor) -> Tensor:
        """See ``Format``."""
        import torch

        return torch.cat([codes & 15, codes >> 4], dim=-1)


class Int2(Format):
    """Four levels between minimum and maximum, four in a byte (KIVI in 2 bits, arXiv 2402.02750, section 3.2).

    A vector has a scale and an offset for each ``VALUE_GROUP`` channels. Keys are scaled by channel alone: four levels
    are too few for a key as a whole. The first quarter of the numbers is in the lowest bits.
    """

    bits: ClassVar[int] = 2
    by_channel: ClassVar[bool] = True

    def scales(self, dim: int) -> int:
        """See ``Format``."""
        return 2 * -(-dim // VALUE_GROUP)

    def encode(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Format``."""
        import torch

        dim, groups = vectors.shape[-1], self.scales(vectors.shape[-1]) // 2
        lacking = groups * VALUE_GROUP - dim
        if lacking:  # the last group repeats its last number
            vectors = torch.cat([vectors, vectors[..., -1:].expand(*vectors.shape[:-1], lacking)], dim=-1)
        grouped = vectors.float().reshape(*vectors.shape[:-1], groups, VALUE_GROUP)
        levels, scale, offset = _levels(grouped, -1, 2**self.bits - 1)
        return self.pack(levels.flatten(-2)[..., :dim]), torch.cat([scale, offset], dim=-1).flatten(-2)

    def decode(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """See ``Format``."""
        from torch.nn.functional import pad

        levels, groups = self.unpack(codes).float(), scales.shape[-1] // 2
        dim = levels.shape[-1]
        lacking = groups * VALUE_GROUP - dim
        grouped = (pad(levels, (0, lacking)) if lacking else levels).view(*levels.shape[:-1], groups, VALUE_GROUP)
        steps = scales.view(*scales.shape[:-1], groups, 2)
        return grouped.mul_(steps[..., :1]).add_(steps[..., 1:]).to(dtype).flatten(-2)[..., :dim]

    def pack(self, levels: Tensor) -> Tensor:
        """See ``Format``."""
        from torch.nn.functional import pad

        size = self.code_bytes(levels.shape[-1])
        quarters = pad(levels, (0, 4 * size - levels.shape[-1])).view(*levels.shape[:-1], 4, size)
        return quarters[..., 0, :] | quarters[..., 1, :] << 2 | quarters[..., 2, :] << 4 | quarters[..., 3, :] << 6

    def unpack(self, codes: Tensor) -> Tensor:
        """See ``Format``."""
        import torch

        return torch.cat([(codes >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1)


MODEL = "model"  # the name of the model's own dtype, in which nothing is encoded
FORMATS: Mapping[str, Format] = {"fp8": FP8(), "int8": Int8(), "int4": Int4(), "int2": Int2()}


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """Vectors [..., D] as they lie in memory.

    Attributes:
        numbers: [..., D] in the model's dtype, or codes [..., bytes] uint8.
        scales: [..., ``Format.scales(D)``] float16; None in the model's dtype.
        format: ``model`` or a name in ``FORMATS``.
    """

    numbers: Tensor
    scales: Tensor | None
    format: str

    @classmethod
    def zeros(
        cls,
        name: str,
        shape: tuple[int, ...],
        dim: int,
        dtype: torch.dtype,
        device: torch.device,
        zeros: Zeros | None = None,
    ) -> Stored:
        """Memory for vectors; all are zero.

        Args:
            name: of the format.
            shape: the leading shape.
            dim: D.
            dtype: the model's.
            device: where the memory is.
            zeros: makes the tensors, wherever they then are; on the device if left out.
        """
        import torch

        make = zeros or (lambda size, kind: torch.zeros(size, dtype=kind, device=device))
        if name == MODEL:
            return cls(make((*shape, dim), dtype), None, name)
        codes = make((*shape, FORMATS[name].code_bytes(dim)), torch.uint8)
        return cls(codes, make((*shape, FORMATS[name].scales(dim)), torch.float16), name)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """All tensors that hold the vectors."""
        return (self.numbers,) if self.scales is None else (self.numbers, self.scales)

    def rows(self, begin: int, shape: tuple[int, ...]) -> Stored:
        """The rows [R, D] from ``begin`` on, seen in another leading shape."""
        stop = begin + math.prod(shape)
        numbers, *scales = (part[begin:stop].view(*shape, part.shape[-1]) for part in self.parts)
        return Stored(numbers, scales[0] if scales else None, self.format)

    def encode(self, vectors: Tensor) -> tuple[Tensor, ...]:
        """What is written into each of the parts for vectors [..., D]."""
        return (vectors,) if self.scales is None else FORMATS[self.format].encode(vectors)

    def write(self, index: Any, vectors: Tensor) -> None:
        """Store vectors [..., D] at an index of the leading shape."""
        for part, encoded in zip(self.parts, self.encode(vectors), strict=True):
            part[index] = encoded

    def read(self, index: Any, dim: int, dtype: torch.dtype) -> Tensor:
        """Vectors [..., D] at an index of the leading shape; in the model's dtype a view, if the index allows it.

        Args:
            index: of the leading shape.
            dim: D.
            dtype: of decoded vectors.
        """
        if self.scales is None:
            return self.numbers[index]
        return FORMATS[self.format].decode(self.numbers[index], self.scales[index], dtype)[..., :dim]


def hadamard(dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An orthonormal matrix [D, D] that spreads each number of a vector over many, so that none stands out.

    Blocks on the diagonal are Hadamard matrices (QuaRot, arXiv 2404.00456, section 3), as large as the largest power of
    two that divides D. The matrix is symmetric: it is its own inverse.

    Args:
        dim: D.
        dtype: of the matrix.
        device: where it is.
    """
    import torch

    size = dim & -dim
    doubled, block = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.ones(1, 1)
    while len(block) < size:
        block = torch.kron(doubled, block)
    return torch.kron(torch.eye(dim // size), block / math.sqrt(size)).to(device, dtype)


def _scaled(vectors: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Vectors [..., D] divided by a scale [..., 1] float16, so that their largest magnitude is ``largest``."""
    vectors = vectors.float()
    scale = (vectors.abs().amax(-1, keepdim=True) / largest).clamp(SMALLEST_SCALE, LARGEST_HALF).half()
    return (vectors / scale.float()).clamp(-largest, largest), scale


def _levels(vectors: Tensor, dim: int, highest: float) -> tuple[Tensor, Tensor, Tensor]:
    """Levels 0 .. ``highest`` (uint8) between the minimum and the maximum along ``dim``, their scale and offset."""
    import torch

    low, high = vectors.aminmax(dim=dim, keepdim=True)
    scale = ((high - low) / highest).clamp(SMALLEST_SCALE, LARGEST_HALF).half()
    low = low.clamp(-LARGEST_HALF, LARGEST_HALF).half()
    levels = (vectors - low.float()) / scale.float()
    return levels.round().clamp(0, highest).to(torch.uint8), scale, low
