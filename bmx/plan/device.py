"""The place a run happens in, as the memory formula sees it: from sizes alone, whether it is here or elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bmx import kernels
from bmx.compress.policy import left_to_kernels
from bmx.config import EngineConfig
from bmx.model.spec import ModelSpec

SLACK = {"cpu": (40 * 10**6, 0.5), "cuda": (64 * 10**6, 0.02)}  # bytes, and share of activations: see benchmarks
GRAPHS = 256 * 10**6  # bytes that the driver and cuBLAS keep for captured work
GRAPH_ROWS = 16  # to which the rows of a graph are rounded up


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What the closed form must know of the place a run happens in.

    Attributes:
        kind: ``cpu`` or ``cuda``.
        runtime: bytes that the process holds beside the model.
        workspace: bytes of one layer's attention, from a chunk's tokens, the keys a query sees, and the slots.
        slack: bytes lost in any case; ``share``: of activations and logits, lost besides.
        captures: whether decoding is captured as CUDA graphs.
    """

    kind: str
    runtime: int
    workspace: Callable[[int, int, int], int]
    slack: int = 0
    share: float = 0.02
    captures: bool = False

    @classmethod
    def of(cls, kind: str, spec: ModelSpec, runtime: int, config: EngineConfig | None = None) -> Device:
        """A device of this kind with the kernels that would be chosen there."""
        config = config or EngineConfig()
        capabilities, fused = kernels.choose(kind).capabilities, left_to_kernels(config)
        bytes_of = capabilities.workspace_bytes(fused)
        heads = max(layer.query_heads for layer in spec.layers)
        head_dim = max(max(layer.key_dim, layer.value_dim) for layer in spec.layers)

        kv_heads = max(layer.kv_heads for layer in spec.layers)
        unpacked = (
            0 if config.kv_format == "auto" else 2 * kv_heads * head_dim * (spec.itemsize + 1)
        )  # of a row, as it is read

        def workspace(chunk: int, rows: int, slots: int) -> int:
            sizes = {"heads": heads, "head_dim": head_dim, "itemsize": spec.itemsize}
            return bytes_of(chunk=chunk, rows=rows, slots=slots, **sizes) + slots * rows * unpacked

        slack, share = SLACK[kind]
        if kind == "cpu":
            slack += spec.merged_bytes  # the pages of the file that they were copied from stay mapped
        captures = kind == "cuda" and capabilities.capturable and fused and not config.enforce_eager
        return cls(kind=kind, runtime=runtime, workspace=workspace, slack=slack, share=share, captures=captures)

    def captured(self, spec: ModelSpec, slots: int, rows: int) -> int:
        """Bytes of the pool in which graphs of decoding work: activations, and logits twice, since some rows may draw.

        Args:
            rows: of the largest slot.
        """
        if not self.captures:
            return 0
        activations = (slots + GRAPH_ROWS) * (spec.costs.activation_bytes + 2 * spec.itemsize * spec.vocab)
        return GRAPHS + activations + self.workspace(1, rows, slots)
