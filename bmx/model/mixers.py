"""Mixers: layers that keep a state for each sequence, such as short convolutions, gated delta nets and Mamba.

transformers' mixers mix tokens in a few functions of their own files. Here each mixer gets a ``forward`` that is its
own code with other functions under those names: projections, gates and norms see all packed tokens at once, and only
these functions know which tokens follow each other in a sequence, and where its state is. Knows transformers' names
and arguments; knows nothing of how a state is computed, or of which sequence has which slot.

Shapes: T packed tokens, S slots, C channels, W tokens of a convolution's window, H heads, K key heads, D key dim,
E value dim, P channels of a head, G groups, N numbers of a channel's state.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus
from torch.utils._pytree import tree_map

from bmx.errors import ModelError
from bmx.kernels.mixer_contract import MixerFunctions
from bmx.kernels.segments import Segments
from bmx.kv.layout import StateLayout
from bmx.model.forwards import set_forward, with_functions

CLOSE = 2**-5  # of the norm of a mixer's output, in bfloat16; float32 is far closer
CLOSE_FLOAT32 = 2**-12
# Methods of transformers' caches that a layer with a state calls
KEEPS = {"update_conv_state", "update_recurrent_state", "get_linear_cache", "set_linear_cache"}
SILU = ("silu", "swish")
NO_LIMIT = (0.0, float("inf"))  # of a step, which softplus leaves at least 0
Calls = dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]


class Mixers:
    """The mixers of one model.

    Args:
        model: a transformers model.
        kernels: compute the functions.

    Attributes:
        layouts: of the states, in the order in which a forward asks for them, once they are found.

    Raises:
        ModelError: a layer keeps a state in a way that bmx does not know.
    """

    def __init__(self, model: nn.Module, kernels: MixerFunctions) -> None:
        self._kernels = kernels
        self.layouts: tuple[StateLayout, ...] = ()
        self._forwards: dict[nn.Module, Any] = {}
        self._segments: Segments | None = None
        self._states: _Given | _Found = _Given(())
        functions: Mapping[str, Callable[..., Any]] = {
            "causal_conv1d_fn": self._convolve,
            "torch_chunk_gated_delta_rule": self._delta_rule,
            "chunk_kimi_delta_attention": self._delta_rule,
            "mamba2_chunk_scan": self._state_space,
            "mamba_selective_scan": self._selective_scan,
        }
        copies: dict[Any, Any] = {}
        for module in model.modules():
            code = inspect.unwrap(type(module).forward)
            names = set(getattr(getattr(code, "__code__", None), "co_names", ()))
            if not names & KEEPS:
                continue
            if not names & functions.keys():
                raise ModelError(f"{type(module).__name__} keeps a state in a way of its own")
            if code not in copies:
                copies[code] = with_functions(code, {name: functions[name] for name in functions.keys() & names})
            self._forwards[module] = MethodType(copies[code], module)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Let the mixers run packed tokens while the body runs."""
        with ExitStack() as undo:
            for module, forward in self._forwards.items():
                set_forward(module, forward, undo)
            yield

    def step(self, segments: Segments, states: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Let the model be called once over packed tokens.

        Args:
            segments: the tokens by sequence.
            states: of all slots, in the order in which the mixers ask for them; written.
        """
        return self._called(segments, _Given(states))

    @contextmanager
    def finding(self, tokens: int, device: torch.device) -> Iterator[None]:
        """Let the model be called once over packed tokens that are sequences of their own, to find ``layouts``.

        Args:
            tokens: how many.
            device: where they are.
        """
        found = _Found(tokens)
        with self._called(Segments.of(None, [(i, 1, i, True) for i in range(tokens)], device), found):
            yield
        self.layouts = tuple(found.layouts)

    @contextmanager
    def _called(self, segments: Segments, states: _Given | _Found) -> Iterator[None]:
        self._segments, self._states = segments, states
        try:
            yield
        finally:
            self._segments, self._states = None, _Given(())

    @contextmanager
    def watched(self) -> Iterator[Calls]:
        """Record the last call of a mixer of each class while the body runs."""
        calls: Calls = {}
        first = {type(module): module for module in reversed(self._forwards)}
        with ExitStack() as undo:
            for module in first.values():
                hook = module.register_forward_pre_hook(
                    lambda module, args, kwargs: calls.update({module: (args, kwargs)}), with_kwargs=True
                )
                undo.callback(hook.remove)
            yield calls

    @torch.inference_mode()
    def check(self, calls: Calls) -> None:
        """Refuse mixers that compute something else than their own code does.

        Args:
            calls: with the arguments that a mixer was called with; its tokens are taken for one sequence.

        Raises:
            ModelError: a mixer gives other numbers, for all tokens at once or for the last one after the others.
        """
        for module, (args, kwargs) in calls.items():
            expected = type(module).forward(module, *args, **kwargs)
            tokens = expected.shape[1]
            for parts in ((tokens,), (tokens - 1, 1)):
                output = self._in_parts(module, args, kwargs, parts)
                allowed = CLOSE_FLOAT32 if output.dtype == torch.float32 else CLOSE
                if not (output - expected).float().norm() <= allowed * expected.float().norm() + 1e-6:
                    raise ModelError(f"{type(module).__name__} computes its state in a way of its own")

    def _in_parts(self, module: nn.Module, args: Any, kwargs: Any, parts: tuple[int, ...]) -> Tensor:
        """The output of a mixer [1, T, ...] whose tokens, of one sequence, come in several steps."""
        outputs, begin, found = list[Tensor](), 0, _Found(1)
        device = next(module.parameters()).device
        for length in parts:
            own, named = tree_map(partial(_tokens, begin, begin + length), (args, kwargs))
            found.rewind()
            with self._called(Segments.of(None, [(0, length, 0, True)], device), found):
                outputs.append(self._forwards[module](*own, **named))
            begin += length
        return torch.cat(outputs, dim=1)

    def _state(self, shape: tuple[int, ...], like: Tensor, recurrent: bool) -> tuple[Tensor, Segments]:
        """The next state of all slots [S + 1, *shape], and the segments of this step.

        Raises:
            RuntimeError: the model was called outside a step.
        """
        if self._segments is None:
            raise RuntimeError("a mixer was called outside a step")
        return self._states.take(shape, like, recurrent), self._segments

    def _convolve(
        self,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **_: Any,
    ) -> Tensor:
        """``causal_conv1d_fn``: [1, C, T] -> [1, C, T]; weight [C, W]."""
        x = hidden_states[0].T.to(weight.dtype)
        windows, segments = self._state((weight.shape[1] - 1, weight.shape[0]), x, recurrent=False)
        y = self._kernels.convolve(x, weight, bias, windows, segments, silu=activation in SILU)
        if activation is not None and activation not in SILU:
            from transformers.activations import ACT2FN

            y = ACT2FN[activation](y)
        return y.T.unsqueeze(0).to(hidden_states.dtype)

    def _delta_rule(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        use_qk_l2norm_in_kernel: bool = False,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """``torch_chunk_gated_delta_rule`` and ``chunk_kimi_delta_attention``.

        Args:
            query: [1, T, K or H, D].
            key: [1, T, K or H, D].
            value: [1, T, H, E].
            g: [1, T, H] or [1, T, H, D] logarithms of the decay.
            beta: [1, T, H].
            use_qk_l2norm_in_kernel: whether queries and keys are normalised.
        """
        shape = (value.shape[2], key.shape[3], value.shape[3])
        states, segments = self._state(shape, value, recurrent=True)
        vectors = (query[0], key[0], value[0], g[0].float(), beta[0])
        y = self._kernels.delta_rule(*vectors, states, segments, normalise=use_qk_l2norm_in_kernel)
        return y.unsqueeze(0), None

    def _state_space(
        self,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,  # noqa: N803 - transformers' names
        B: Tensor,  # noqa: N803
        C: Tensor,  # noqa: N803
        chunk_size: int | None = None,  # noqa: ARG002 - the kernels have their own
        D: Tensor | None = None,  # noqa: N803
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = NO_LIMIT,
        return_final_states: bool = False,
        **_: Any,
    ) -> Any:
        """``mamba2_chunk_scan``.

        Args:
            hidden_states: [1, T, H, P].
            dt: [1, T, H].
            A: [H].
            B: [1, T, G, N].
            C: [1, T, G, N].
            chunk_size: of the model's own code.
            D: [H] or None.
            dt_bias: [H] or None.
            dt_softplus: whether softplus follows the bias.
            dt_limit: least and largest step of a prompt's tokens; decoding, transformers limits none.
            return_final_states: whether a state is returned too; here it never leaves its slot.
        """
        step = _steps(dt[0], dt_bias, dt_softplus)
        states, segments = self._state((*hidden_states.shape[2:], B.shape[3]), hidden_states, recurrent=True)
        if dt_limit != NO_LIMIT:
            decoding = 0 if segments.decode_slots is None else len(segments.decode_slots)
            step = torch.cat([step[:decoding], step[decoding:].clamp(*dt_limit)])
        y = self._kernels.state_space(hidden_states[0], step.float(), A, B[0], C[0], D, states, segments).unsqueeze(0)
        return (y, None) if return_final_states else y

    def _selective_scan(
        self,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,  # noqa: N803 - transformers' names
        B: Tensor,  # noqa: N803
        C: Tensor,  # noqa: N803
        D: Tensor | None = None,  # noqa: N803
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **_: Any,
    ) -> Any:
        """``mamba_selective_scan``, which begins from zeros in transformers; here from the state of the slot.

        Args:
            hidden_states: [1, C, T].
            dt: [1, C, T].
            A: [C, N].
            B: [1, N, T].
            C: [1, N, T].
            D: [C] or None.
            z: [1, C, T] gate, or None.
            delta_bias: [C] or None.
            delta_softplus: whether softplus follows the bias.
            return_last_state: whether a state is returned too; here it never leaves its slot.
        """
        x = hidden_states[0].T.unsqueeze(2)  # [T, C, 1]
        step = _steps(dt[0].T, delta_bias, delta_softplus)
        states, segments = self._state((len(A), 1, A.shape[1]), hidden_states, recurrent=True)
        inputs, outputs = (t[0].T.unsqueeze(1) for t in (B, C))  # [T, 1, N]
        y = self._kernels.state_space(x, step.float(), A, inputs, outputs, D, states, segments)
        output = y[..., 0].T.unsqueeze(0)
        output = output if z is None else output * silu(z)
        return (output, None) if return_last_state else output


def _steps(step: Tensor, bias: Tensor | None, soft: bool) -> Tensor:
    """Steps of a state space [T, H], after bias and softplus."""
    step = step if bias is None else step + bias.to(step.dtype)
    return softplus(step) if soft else step


def _tokens(begin: int, stop: int, x: Any) -> Any:
    """Some tokens of hidden states [1, T, ...]; anything else as it is."""
    return x[:, begin:stop] if isinstance(x, Tensor) and x.ndim == 3 else x


class _Given:
    """States that exist, given out in their order."""

    def __init__(self, states: Sequence[Tensor]) -> None:
        self._states = iter(states)

    def take(self, *_: Any) -> Tensor:
        """The next state [S + 1, *shape]."""
        return next(self._states)


class _Found:
    """States that are allocated as they are asked for.

    Args:
        slots: S.

    Attributes:
        layouts: of the states, in the order in which they were asked for.
    """

    def __init__(self, slots: int) -> None:
        self.layouts: list[StateLayout] = []
        self._slots, self._tensors, self._next = slots, list[Tensor](), 0

    def rewind(self) -> None:
        """Give out the same states again, from the first one on."""
        self._next = 0

    def take(self, shape: tuple[int, ...], like: Tensor, recurrent: bool) -> Tensor:
        """The next state [S + 1, *shape]: windows in the type of ``like``, recurrent states in float32."""
        self._next += 1
        if self._next > len(self._tensors):
            dtype = torch.float32 if recurrent else like.dtype
            self.layouts.append(StateLayout(shape=shape, itemsize=dtype.itemsize, recurrent=recurrent))
            self._tensors.append(like.new_zeros(self._slots + 1, *shape, dtype=dtype))
        return self._tensors[self._next - 1]
