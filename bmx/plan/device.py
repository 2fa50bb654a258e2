"""The device of a run, as the memory formula sees it: from sizes alone, so that it may also be another machine's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from bmx import kernels
from bmx.compress.kernel_orders import answers_by_channel, left_to_kernels, ranking_bytes, rounds_left_to_kernels
from bmx.config import EngineConfig
from bmx.kernels.contract import Capabilities
from bmx.kernels.formats import MODEL
from bmx.kernels.profile import KernelProfile
from bmx.kernels.workspace import mixing
from bmx.kv.places import DEVICE
from bmx.kv_formats import formats_of
from bmx.model.spec import ModelSpec

# Bytes, and share of activations and logits, that allocators lose; measured by benchmarks/memory.py.
SLACK = {"cpu": (40 * 10**6, 0.5), "cuda": (64 * 10**6, 0.02)}
FLOAT32 = 4  # bytes
GRAPHS = 256 * 10**6  # bytes that the driver and cuBLAS keep for captured graphs
GRAPH_ROWS = 16  # the rows of a graph are a multiple of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What the memory formula must know of a device.

    Attributes:
        kind: ``cpu`` or ``cuda``.
        runtime: bytes that the process holds beside the model.
        workspace: bytes of one layer's attention, from a chunk's tokens, the keys that a query sees, and the slots.
        slack: bytes that allocators lose in any case.
        share: share of the bytes of activations and logits that they lose besides.
        ranking: bytes of ranking pairs beside a layer's attention, from the keys that a query sees, and the slots.
        captures: whether decoding is captured as CUDA graphs.
        mixes_in_place: whether mixers hold no copies of states.
        archive_place: where the keys and values of an archive are: ``device``, ``host`` or a folder.
        window: bytes of rows that are read ahead where prompts share text.
    """

    kind: str
    runtime: int
    workspace: Callable[[int, int, int], int]
    slack: int = 0
    share: float = 0.02
    ranking: Callable[[int, int], int] = lambda rows, slots: 0  # noqa: ARG005
    captures: bool = False
    mixes_in_place: bool = False
    archive_place: str = DEVICE
    window: int = 0

    @classmethod
    def of(
        cls,
        kind: str,
        spec: ModelSpec,
        runtime: int,
        config: EngineConfig | None = None,
        chosen: kernels.Kernels | None = None,
    ) -> Device:
        """A device of this kind.

        Args:
            kind: ``cpu`` or ``cuda``.
            spec: the model's sizes.
            runtime: bytes that the process holds beside the model.
            config: the settings.
            chosen: the kernels that run there; those that would be chosen if left out.
        """
        config = config or EngineConfig()
        capabilities = (chosen or kernels.choose(kind)).capabilities
        fused = left_to_kernels(config, capabilities)
        rounds = rounds_left_to_kernels(config, capabilities)
        bytes_of = capabilities.workspace_bytes(fused)
        heads = max(layer.query_heads for layer in spec.layers)
        head_dim = max(max(layer.key_dim, layer.value_dim) for layer in spec.layers)

        unpacked = _unpacked_slots(config, capabilities, capabilities.profile_for(spec.itemsize, fused))

        def workspace(chunk: int, rows: int, slots: int) -> int:
            sizes = {"heads": heads, "head_dim": head_dim, "itemsize": spec.itemsize}
            if rounds and capabilities.capturable:  # only chunks may be left to torch
                decoding = capabilities.workspace(chunk=1, rows=rows, slots=slots, **sizes)
                attending = max(decoding, bytes_of(chunk=chunk, rows=rows, slots=slots if fused else 1, **sizes))
            else:
                attending = bytes_of(chunk=chunk, rows=rows, slots=slots, **sizes)
            return attending + min(slots, unpacked) * rows * _unpacked_row(spec)

        slack, share = SLACK[kind]
        if kind == "cpu":
            slack += spec.merged_bytes  # the file's pages of merged weights stay mapped
        eager = config.enforce_eager or config.tensor_parallel_size > 1
        captures = kind == "cuda" and capabilities.capturable and rounds and not eager
        return cls(
            kind=kind,
            runtime=runtime,
            workspace=workspace,
            ranking=partial(ranking_bytes, config, capabilities, spec),
            slack=slack,
            share=share,
            captures=captures,
            mixes_in_place=capabilities.mixes_in_place,
            archive_place=config.kv_archive_place,
        )

    def mixing(self, spec: ModelSpec, tokens: int, slots: int) -> int:
        """Bytes that one mixer holds beside its inputs and states; 0 without mixers.

        Args:
            spec: the model's sizes.
            tokens: of a step.
            slots: sequences that decode.
        """
        return max(
            (mixing(s.shape, tokens=tokens, slots=slots, in_place=self.mixes_in_place) for s in spec.states), default=0
        )

    def captured(self, spec: ModelSpec, slots: int, rows: int) -> int:
        """Bytes that captured graphs of decoding hold: activations, and logits twice, since some rows may be sampled.

        Args:
            spec: the model's sizes.
            slots: sequences that decode.
            rows: keys that a query of the largest slot sees.
        """
        if not self.captures:
            return 0
        activations = (slots + GRAPH_ROWS) * (spec.costs.activation_bytes + 2 * spec.itemsize * spec.vocab)
        return GRAPHS + activations + max(self.workspace(1, rows, slots), self.mixing(spec, slots, slots))


def _unpacked_slots(config: EngineConfig, capabilities: Capabilities, profile: KernelProfile) -> int:
    """Most slots whose pairs a layer decodes at once: those that decode, or the one in which a chunk is read."""
    stored = config.kv_archive if config.archives else config.kv_format
    if stored == MODEL:
        return 0
    as_they_lie = profile.reads_by_channel and capabilities.decodes_by_channel(*formats_of(stored))
    if as_they_lie and answers_by_channel(config):
        return 1
    return sys.maxsize if profile.unpack_passes else 0


def _unpacked_row(spec: ModelSpec) -> int:
    """Bytes of decoding one row of a layer: keys, then values while they are computed in float32 from copied codes."""
    numbers = max(layer.kv_heads * max(layer.key_dim, layer.value_dim) for layer in spec.layers)
    keys, copied, computed = spec.itemsize, 1, FLOAT32
    rounded = spec.itemsize if spec.itemsize < FLOAT32 else 1  # where nothing is rounded, codes of 4 bits in 8
    return numbers * (keys + copied + computed + rounded)
