"""The contract of the kernels: what every back end computes, and how a back end is described without loading torch.

``KernelModule`` gives every function with its shapes, units and results. ``reference`` implements all of it in plain
torch and is the specification: the other modules compute the same faster, and their docstrings say only what they
decline. ``Capabilities`` says what a back end takes over; ``registry`` holds one description for each module.

Shapes: T tokens of a chunk or packed tokens of a step, B decoding tokens, S slots, H query heads, K kv heads,
G = H / K, C rows of a head in a slot, P rows of a slot in use, D key dim, E value dim, M sums of attention,
I and O input and output size of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from bmx.kernels.formats import MODEL
from bmx.kernels.mixer_contract import HybridNorms, MixerFunctions
from bmx.kernels.profile import KernelProfile

if TYPE_CHECKING:
    from torch import Tensor

    from bmx.kernels.linear import Linear
    from bmx.kernels.ranking import EvictionOrder
    from bmx.kernels.slot_views import ChannelRows, Chunks, Rows, SharedRows

HALF = 2  # bytes of a number in bfloat16 or float16


class KernelModule(MixerFunctions, HybridNorms, Protocol):
    """The functions of a back end; those for mixers are explained in ``mixer_contract``."""

    def attend_chunk(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        hidden: Tensor | None = None,
        query_weights: Tensor | None = None,
        squares: bool = False,
        past_places: Tensor | None = None,
        distance: int = 0,
        power: int = 1,
    ) -> tuple[Tensor, Tensor | None]:
        """A prompt chunk attends to its slot (all rows in use) and to itself (causally).

        Args:
            query: [T, H, D], the chunk's queries.
            key: [T, K, D], the chunk's own keys.
            value: [T, K, E], the chunk's own values.
            past_key: [K, P, D], keys of the slot's rows in use, in any order.
            past_value: [K, P, E], their values.
            scale: factor of the dot products.
            softcap: ``softcap * tanh(s / softcap)`` replaces each score s (Gemma 2); None for no cap.
            sinks: [H], extra logits that take part in the softmax and have no value (gpt-oss).
            hidden: [K, T, P + T] bool, True where a sliding window hides a key from a query.
            query_weights: [M, T] float32, the weight of each query's attention in each of M sums; None for no sums.
            squares: whether to add up the squared probabilities too, with the first of these weights.
            past_places: [K, P] int32, the places of the slot's tokens, counted from the chunk's first token: negative.
                Needed with a distance.
            distance: a query counts for a key if it lies at least that many tokens after it.
            power: of a probability, as it is summed: 1 or 2.

        Returns:
            output: [T, H, E].
            sums: [M, K, P + T] float32 ([M + 1, K, P + T] with squares), slot rows first: over queries that count,
                weighted, of the mean over a kv head's query heads of the attention probabilities to that power. None
                without query weights.
        """
        ...

    def attend_slots(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        slots: Tensor | None = None,
        *,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        hidden: Tensor | None = None,
        want_mass: bool = False,
        squares: bool = False,
        power: int = 1,
        shared: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One decoding token per slot attends to its slot, which holds the token's own pair already.

        Args:
            query: [B, H, D], one query per decoding token.
            keys: [S, K, C, D], keys of all slots.
            values: [S, K, C, E], their values.
            slots: [B], the slot of each token; None if they are the slots 0 .. B - 1 in order.
            scale: factor of the dot products.
            softcap: as in ``attend_chunk``.
            sinks: [H], as in ``attend_chunk``.
            hidden: bool, broadcastable to [B, K, C]; True for rows not in use or out of the window.
            want_mass: whether to return the attention that each key receives.
            squares: whether to return the squared probabilities too.
            power: of a probability, as it is returned: 1 or 2.
            shared: keys [K, P, D] and values [K, P, E] that all tokens read before those of their slots; without sums.

        Returns:
            output: [B, H, E].
            sums: [1, B, K, C] float32 ([2, B, K, C] with squares): means over a kv head's query heads of the attention
                probabilities to that power. None if they are not wanted.
        """
        ...

    def decode_step(
        self,
        output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rows: Rows,
        slots: Tensor,
        positions: Tensor,
        row_limits: Tensor,
        *,
        scale: float,
        order: EvictionOrder,
        decay: float,
        accumulate: bool,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        shared: SharedRows | None = None,
    ) -> bool:
        """The decoding tokens' whole part of a layer: append or evict, attend, accumulate.

        Pairs in fewer bits are decoded as they are read, and encoded when they are stored, before the token attends.
        A token takes row ``position`` of its slot while that is below its row limit; else, in each kv head, the row of
        the pair that the order evicts first (of equals, the lowest row). Then it attends to the rows in use, its own
        pair among them, and the mean of its query heads' probabilities, to the order's power, is added to the attention
        mass, whatever the order's distance: it is for prompts. The rank of a new pair is +inf.

        A token that reads rows of another slot first takes row ``position`` less their number. Its sequence evicts
        nothing, and none of its attention is added up.

        Args:
            output: [B, H, E], contiguous; written.
            query: [B, H, D], each vector contiguous.
            key: [B, K, D], the tokens' own keys, each vector contiguous.
            value: [B, K, E], their values.
            rows: the layer's slots; written.
            slots: [B] int64, no two equal; where it is -1 the output is zeros and nothing else happens.
            positions: [B] int64, each token's position in its sequence = tokens of it seen before.
            row_limits: [B] int64, rows of a head that each sequence may use, if its slot has as many.
            scale: factor of the dot products.
            order: which pair is evicted first.
            decay: factor on the earlier attention mass, before the tokens' attention is added.
            accumulate: whether to add this step's attention to the mass; the mass of a new pair starts at 0 anyway.
            softcap: as in ``attend_chunk``.
            sinks: [H], as in ``attend_chunk``.
            shared: rows of other slots that the tokens read before their own; None for none.

        Returns:
            Whether it was done. If not, nothing was changed: policy and pool do the step with ``attend_slots``.
        """
        ...

    def prefill_step(
        self,
        output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rows: Rows,
        chunks: Chunks,
        *,
        scale: float,
        order: EvictionOrder,
        ranking: Callable[[Tensor | None], Tensor] | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> bool:
        """The prompt chunks' whole part of a layer: attend, add up attention, evict.

        Each chunk attends to its slot and causally to itself, to its own pairs as they are given; pairs in fewer bits
        are decoded as they are read, and encoded when they are stored. The attention that keys receive, as the order
        counts it (distance and power), is added to the mass of rows in use, unless the sequence never evicts. Then as
        many pairs of slot and chunk are kept as the row limit says: those that the order evicts last (of equals, the
        first; rows before tokens). The chunk's survivors take, in order, the rows of evicted pairs, then empty rows.
        A chunk that reads rows of another slot first evicts nothing; its start less their number are in use.

        Args:
            output: [T, H, E], contiguous; the chunks' tokens are written, others left as they are.
            query: [T, H, D], of all packed tokens, each vector contiguous.
            key: [T, K, D], of all packed tokens, each vector contiguous.
            value: [T, K, E], of all packed tokens, each vector contiguous.
            rows: the layer's slots; written.
            chunks: the prompt chunks, no two of the same slot.
            scale: factor of the dot products.
            order: which pair is evicted first.
            ranking: where pairs are ranked, called before any is evicted with the attention [K, T] that the chunks' own
                keys received (None without mass), when the mass of rows in use is up to date. It writes the ranks of
                the rows of chunks that evict in this step, and returns those of the packed tokens [K, T] float32.
            softcap: as in ``attend_chunk``.
            sinks: [H], as in ``attend_chunk``.

        Returns:
            Whether it was done. If not, nothing was changed: policy and pool do it chunk by chunk with
            ``attend_chunk``.
        """
        ...

    def decode_by_channel(
        self,
        output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rows: ChannelRows,
        slots: Tensor,
        positions: Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> bool:
        """The decoding tokens' whole part of a layer whose keys are scaled by channel: store, then attend.

        A token's pair is stored at the row of its position, as ``kv.pool.LayerSlots.write`` stores it: the value's
        codes, the exact pair, and the codes of a group of keys when its last row arrives. Then the token attends to the
        rows 0 .. position: to the newest, as many as a group has, as they are exactly, to the others as decoded.

        Args:
            output: [B, H, E], contiguous; written.
            query: [B, H, D], each vector contiguous.
            key: [B, K, D], the tokens' own keys, each vector contiguous.
            value: [B, K, E], their values.
            rows: the layer's slots; written.
            slots: [B] int64, no two equal; where it is -1 the output is zeros and nothing else happens.
            positions: [B] int64, each token's position in its sequence, below the slots' capacity.
            scale: factor of the dot products.
            softcap: as in ``attend_chunk``.
            sinks: [H], as in ``attend_chunk``.

        Returns:
            Whether it was done. If not, nothing was changed: the pool does the step with ``attend_slots``.
        """
        ...

    def append_by_channel(self, key: Tensor, value: Tensor, rows: ChannelRows, slot: int, start: int) -> bool:
        """Store a prompt chunk in a slot whose keys are scaled by channel, as ``kv.pool.LayerSlots.append`` does.

        Args:
            key: [T, K, D], each vector contiguous.
            value: [T, K, E], each vector contiguous.
            rows: the layer's slots; written.
            slot: of them.
            start: position, and row, of the chunk's first token.

        Returns:
            Whether it was done. If not, nothing was changed: the pool does it.
        """
        ...

    def read_by_channel(self, rows: ChannelRows, slot: int, count: int) -> tuple[Tensor, Tensor] | None:
        """All rows in use of a slot whose keys are scaled by channel, as ``kv.pool.LayerSlots.read`` decodes them.

        Args:
            rows: the layer's slots.
            slot: of them.
            count: rows in use (P).

        Returns:
            Keys [K, P, D] and values [K, P, E]; None where the pool must read them.
        """
        ...

    def product(self, layers: tuple[Linear, ...], gated: bool = False) -> Callable[[Tensor], list[Tensor]]:
        """The function that computes linear layers of one input: x [..., I] -> [..., O] of each layer.

        Args:
            layers: weights, all of one type.
            gated: there are two layers, and the only output is SiLU(first) times second (SwiGLU, arXiv 2002.05202).
        """
        ...

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """SiLU(gate) times up, both [..., I]."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Each vector over the root of its mean square, computed in float32 and rounded, times the weight.

        Args:
            x: [..., I].
            weight: [I].
            epsilon: added to the mean square.
        """
        ...

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The rotary embedding (arXiv 2104.09864, section 3.4.2) of halves, not of neighbouring pairs.

        Args:
            x: [1, H, T, D].
            cos: [1, T, D].
            sin: [1, T, D].
        """
        ...

    def draw(self, logits: Tensor, rows: Tensor, sampling: Tensor) -> Tensor:
        """A token for each of some rows: the first, likeliest first, up to which tokens have more than a share of all.

        Of equal logits the first is the likelier one. Tokens are the likeliest ``top k``; of those, as few as hold
        ``top p`` of the probability; of those, the ones at least ``min p`` times as likely as the likeliest. The share
        is of what is left.

        Args:
            logits: [N, V].
            rows: [M] int64, numbers of rows of logits.
            sampling: [5, M] float64: temperature, top k (0 for all), top p, min p, and the share, in [0, 1).

        Returns:
            [M] int64 token ids; any where the temperature is 0, or a logit is no number.
        """
        ...


_PARTS = (KernelModule, MixerFunctions, HybridNorms)
FUNCTIONS = tuple(name for part in _PARTS for name in vars(part) if not name.startswith("_"))


class Workspace(Protocol):
    """Bytes that one layer's attention holds beside its inputs."""

    def __call__(self, *, heads: int, chunk: int, rows: int, slots: int, head_dim: int, itemsize: int) -> int:
        """Bytes, for a prompt chunk or for all decoding slots, whichever is more.

        Args:
            heads: query heads.
            chunk: tokens of a prompt chunk.
            rows: keys that a query sees, at most.
            slots: slots of all groups.
            head_dim: numbers of a key or value, whichever is longer.
            itemsize: bytes of a number of the model's type.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a back end takes over: read by the choice of kernels, by plans and by forecasts.

    Attributes:
        model_dtypes: torch's names of the types for which it replaces the model's linear layers, norms, gated MLPs
            and rotary embedding.
        orders: what an ``EvictionOrder`` may rank by for ``decode_step`` and ``prefill_step`` to run in place of policy
            and pool.
        row_formats: names of the formats, beside the model's dtype, in which fused steps read and store pairs.
        int8_multiples: numbers that outputs and inputs of a layer must be multiples of for its products of int8
            weights; None if it has none.
        joins_layers: layers of one input are one product, where their weights lie one after another.
        asynchronous: its steps are launched before earlier ones are done, on any device; torch's own are on a GPU.
        capturable: fused decode steps can be captured as CUDA graphs: nothing in them depends on the host.
        mixes_in_place: functions of mixers read and write states where they are, and hold no copies of them.
        skips_empty_rows: fused steps never read rows that hold no pair, so slots need not be emptied between sequences.
        reads_shared_rows: several slots can read rows of one other slot in place.
        workspace: bytes of a layer's attention.
        unfused_workspace: the same where policy and pool do the steps, if that differs.
        profile: how it uses a machine's rates.
        wide_profile: the same in models whose numbers take more than two bytes, if that differs.
    """

    model_dtypes: tuple[str, ...] = ()
    orders: tuple[str, ...] = ()
    row_formats: tuple[str, ...] = ()
    int8_multiples: tuple[int, int] | None = None
    joins_layers: bool = False
    asynchronous: bool = False
    capturable: bool = False
    mixes_in_place: bool = False
    skips_empty_rows: bool = False
    reads_shared_rows: bool = False
    workspace: Workspace
    unfused_workspace: Workspace | None = None
    profile: KernelProfile
    wide_profile: KernelProfile | None = None

    def fuses(self, order: str, *formats: str) -> bool:
        """Whether fused steps rank by this order, and read and store pairs in all of these formats."""
        return order in self.orders and {MODEL, *self.row_formats}.issuperset(formats)

    def decodes_by_channel(self, *formats: str) -> bool:
        """Whether decoding tokens read keys that are scaled by channel, and values, in these formats as they lie."""
        return self.profile.reads_by_channel and {MODEL, *self.row_formats}.issuperset(formats)

    def runs_ahead(self, device_type: str) -> bool:
        """Whether steps on this type of device return before they are computed."""
        return self.asynchronous or device_type == "cuda"

    def workspace_bytes(self, fused: bool) -> Workspace:
        """Bytes of a layer's attention, by whether its steps may be fused."""
        return self.workspace if fused or self.unfused_workspace is None else self.unfused_workspace

    def profile_for(self, itemsize: int, fused: bool) -> KernelProfile:
        """How it uses a machine's rates.

        Args:
            itemsize: bytes of the model's numbers.
            fused: whether steps may be fused; those of a type with a profile of its own are not.
        """
        if itemsize != HALF and self.wide_profile is not None:
            return self.wide_profile
        return replace(self.profile, unpack_passes=0) if fused else self.profile
