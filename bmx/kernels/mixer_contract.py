"""The part of the kernels' contract that is for mixers, layers that keep a state for each sequence, and norms beside.

States lie in slots, those of all groups together. The last state is spare: it is for rows of a step that belong to no
sequence. A call computes packed tokens of any number of sequences; ``Segments`` says which tokens belong to which
sequence. A sequence begins a call with the state in its slot, zeros before its first token, and leaves its new state
there.

Shapes: T packed tokens of a step, S slots, C channels of a convolution, W taps, H heads, K key heads, D key dim,
E value dim, P channels of a head, G groups of heads, N numbers of a state for each channel, I size of a vector.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from bmx.kernels.segments import Segments


class MixerFunctions(Protocol):
    """The functions of a back end that mixers call."""

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, windows: Tensor, segments: Segments, *, silu: bool
    ) -> Tensor:
        """The causal convolution of each channel by itself, computed in float32 and rounded once.

        Args:
            x: [T, C].
            weight: [C, W], the last tap for the token itself.
            bias: [C], or None.
            windows: [S + 1, W - 1, C] of x's type, the last inputs of each slot's sequence, oldest first; written.
            segments: whose tokens they are.
            silu: whether the SiLU of the sum is the output.

        Returns:
            [T, C] of x's type.
        """
        ...

    def delta_rule(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        decay: Tensor,
        beta: Tensor,
        states: Tensor,
        segments: Segments,
        *,
        normalise: bool,
    ) -> Tensor:
        """The gated delta rule (arXiv 2412.06464); that of Kimi decays channel by channel (arXiv 2510.26692).

        For each token: s = exp(decay) s; s = s + key (beta (value - s^T key))^T; output = s^T query / sqrt(D).

        Args:
            query: [T, K, D].
            key: [T, K, D].
            value: [T, H, E]; H is a multiple of K, and head h has query and key h // (H / K).
            decay: [T, H] or [T, H, D] float32, logarithms, at most 0.
            beta: [T, H].
            states: [S + 1, H, D, E] float32 or bfloat16; computed in float32; written, rounded once.
            segments: whose tokens they are.
            normalise: whether queries and keys are first divided by sqrt(their sum of squares + 1e-6).

        Returns:
            [T, H, E] of value's type.
        """
        ...

    def state_space(
        self,
        x: Tensor,
        step: Tensor,
        rate: Tensor,
        inputs: Tensor,
        outputs: Tensor,
        skip: Tensor | None,
        states: Tensor,
        segments: Segments,
    ) -> Tensor:
        """The state spaces of Mamba-2 (arXiv 2405.21060) and Mamba (arXiv 2312.00752: H channels, P is 1).

        For each token: s = exp(step rate) s + step x inputs^T; output = s outputs + skip x.

        Args:
            x: [T, H, P].
            step: [T, H] float32, at least 0.
            rate: [H] or [H, N], negative.
            inputs: [T, G, N] (B in the papers); head h uses group h // (H / G).
            outputs: [T, G, N] (C in the papers).
            skip: [H] (D in the papers), or None.
            states: [S + 1, H, P, N] float32 or bfloat16; computed in float32; written, rounded once.
            segments: whose tokens they are.

        Returns:
            [T, H, P] float32.
        """
        ...


class HybridNorms(Protocol):
    """The functions of a back end for norms in models that have mixers."""

    def gated_norm(self, x: Tensor, gate: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """As ``rms_norm``, times SiLU(gate), which is computed in float32 and rounded with the product.

        Args:
            x: [..., I].
            gate: [..., I].
            weight: [I].
            epsilon: added to the mean square.
        """
        ...

    def norm_of_gated(self, x: Tensor, gate: Tensor, weight: Tensor, epsilon: float, group: int) -> Tensor:
        """x times SiLU(gate), over the root of the mean square of each group, in float32, rounded, times the weight.

        Args:
            x: [..., I]; its type is that of the rounded numbers.
            gate: [..., I].
            weight: [I].
            epsilon: added to the mean square.
            group: numbers that are normed together, of which I is a multiple.
        """
        ...

    def offset_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Each vector over the root of its mean square, times 1 + weight, in float32 and rounded once.

        Args:
            x: [..., I].
            weight: [I].
            epsilon: added to the mean square.
        """
        ...
