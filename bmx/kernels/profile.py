"""How a back end uses a machine's rates: numbers for the forecast. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelProfile:
    """How a back end uses a machine's rates, for the forecast.

    Attributes:
        score_passes: times that an attention score is read or written in memory, in the activations' type.
        thin_product: factor by which attention's products, as thin as a head, are slower than large ones.
        chunk_operators: operators started per layer and prompt chunk: attending, choosing and writing.
        decode_operators: operators started per layer and group of decoding slots.
        own_operators: share of the model's own operators that is left to torch, in their number and their traffic.
        all_slots: slots that do not decode are attended to as well, unless fewer than half of all decode.
        slot_bandwidth: bandwidth with which slots are read, relative to its products with few rows.
        ahead: operators are started while earlier ones run, and replayed where all slots decode.
        unpack_passes: times that pairs stored in fewer bits are read or written in memory, in the activations' type,
            before they are attended to; 0 where kernels read them as they lie.
        reads_by_channel: decoding tokens read keys that are scaled by channel, and their values, as they lie.
        int8_speed: speed of products of int8 weights, in times of those in the model's own type.
        fp8_speed: the same of float8 weights.
    """

    score_passes: int
    thin_product: float
    chunk_operators: int
    decode_operators: int
    own_operators: float = 1.0
    all_slots: bool = True
    slot_bandwidth: float = 2.5
    ahead: bool = False
    unpack_passes: int = 4
    reads_by_channel: bool = False
    int8_speed: float = 1.4
    fp8_speed: float = 1.6

    def product_speed(self, quantization: str) -> float:
        """Speed of the model's products, in times of those in its own type, by how its weights are held."""
        return {"int8": self.int8_speed, "fp8": self.fp8_speed}.get(quantization, 1.0)
