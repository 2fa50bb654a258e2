"""A model split over several devices by transformers' tensor-parallel plan: each holds a part of its heads and weights.

transformers loads the parts, each process its own. Here they become plain tensors, so that kernels take them as those
of any layer, and what the processes must exchange is done by modules of their own: sums of layers that read a part of
their input, the whole output of layers that compute a part of it, and the embeddings of a part of the vocabulary.
Sequences' heads are never exchanged: attention and eviction go on within a process.

Knows torch's modules and its process group; knows nothing of steps, caches or who started the processes.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from bmx.errors import ModelError, UsageError
from bmx.model.spec import ModelSpec

OUTPUTS = {"colwise"}  # styles of transformers' plans: a part of the outputs, which only its own device reads
WHOLE_OUTPUTS = {"colwise_gather_output", "colwise_rep"}  # a part of the outputs, and all devices read all of them
INPUTS = {"rowwise", "rowwise_rep"}  # a part of the inputs, which the device has computed
SLICED_INPUTS = {"rowwise_split_input"}  # a part of the inputs, of which every device has all
VOCABULARY = {"embedding_rowwise"}  # a part of the vocabulary
EXPERTS = {"moe_tp_experts"}  # a part of each expert, whose outputs are parts of a sum
TWO_OUTPUTS = {"packed_colwise"}  # a part of the outputs of two products, one behind the other in one tensor
TWO_INPUTS = {"packed_rowwise"}
UNSPLIT = {"replicated_with_grad_allreduce", "replicate", "local_params", "mla_kv_a_proj"}
STYLES = OUTPUTS | WHOLE_OUTPUTS | INPUTS | SLICED_INPUTS | VOCABULARY | EXPERTS | TWO_OUTPUTS | TWO_INPUTS | UNSPLIT
ONE_DEVICE = "leave out --tensor-parallel-size"
_LAYER = re.compile(r"\.\d+(?=\.|$)")  # the number of a layer in the name of a module


class Summed(nn.Module):
    """A linear layer of which each device holds the weights of a part of its inputs [out, in / devices].

    Args:
        inner: the layer with these weights; it computes a part of the sum.
        part: inputs that are read, of an input that has all of them; None if it has no others.
    """

    def __init__(self, inner: nn.Linear, part: slice | None) -> None:
        super().__init__()
        self.inner, self.bias, self._part = inner, inner.bias, part
        inner.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """The whole output [..., out]."""
        output = _sum_of_all(self.inner(x if self._part is None else x[..., self._part].contiguous()))
        return output if self.bias is None else output + self.bias


class Gathered(nn.Module):
    """A linear layer of which each device holds the weights of a part of its outputs [out / devices, in].

    Args:
        inner: the layer with these weights.
        devices: how many there are.

    Attributes:
        out_features: outputs of all devices.
    """

    def __init__(self, inner: nn.Linear, devices: int) -> None:
        super().__init__()
        self.inner, self.out_features, self._devices = inner, inner.out_features, devices

    @property
    def weight(self) -> Tensor:
        """The part that this device holds."""
        return self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        """The whole output [..., out]."""
        output: Tensor = self.inner(x)
        if output.is_meta:
            return output.new_empty(*output.shape[:-1], self.out_features)
        missing = -(-self.out_features // self._devices) - output.shape[-1]  # the last device may hold fewer
        own = nn.functional.pad(output, (0, missing)).contiguous()
        parts = [torch.empty_like(own) for _ in range(self._devices)]
        distributed.all_gather(parts, own)
        return torch.cat(parts, dim=-1)[..., : self.out_features]


def _embedded(module: nn.Embedding, first: int, ids: Tensor) -> Tensor:
    """Embeddings [..., D] of token ids [...] by a module that holds those of tokens ``first``, ``first`` + 1, ..."""
    own = ids - first
    held = (own >= 0) & (own < len(module.weight))
    return _sum_of_all(type(module).forward(module, own.where(held, 0)) * held.unsqueeze(-1))


def _summed(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """The output of a module of which each device computes a part of the sum."""
    return _sum_of_all(type(module).forward(module, *args, **kwargs))


def _sum_of_all(part: Tensor) -> Tensor:
    """The sum of what all devices have; without contents, a part of it."""
    if part.is_meta:
        return part
    output = part.contiguous()
    distributed.all_reduce(output)
    return output


def split(model: Any, devices: int, rank: int = 0) -> Any:
    """Make a model one device's part of itself, whose outputs are those of the whole; returns the model.

    Args:
        model: as transformers has loaded it under its plan, or a whole one on the meta device.
        devices: how many share it.
        rank: which of them this is.

    Raises:
        ModelError: transformers has no plan for it, or one with parts of a kind that bmx does not know.
    """
    plan, known = _plan(model), dict[int, tuple[Any, nn.Parameter]]()
    for name, module in list(model.named_modules()):
        place = _LAYER.sub(".*", name)
        style = plan.get(place, "")
        for key, parameter in module.named_parameters(recurse=False):
            if how := plan.get(f"{place}.{key}", style):
                own = known.get(id(parameter)) or (parameter, _own_part(model, parameter, how, devices))
                known[id(parameter)] = own  # with the whole one, whose id nothing else gets while it is held
                module._parameters[key] = own[1]
        if style:
            vars(module).pop("forward", None)  # transformers' own, which exchanges its own kind of tensors
        _exchange(model, name, module, style, devices, rank)
    if left := [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]:
        raise _refusal(model, f"{left[0]} is in parts of a kind that bmx does not know")
    model.split_over = devices
    return model


def devices_of(model: Any) -> int:
    """How many devices share a model."""
    return int(vars(model).get("split_over", 1))


def _plan(model: Any) -> dict[str, str]:
    """transformers' plan for a model: the style of each module, by its name with `*` for numbers of layers.

    Raises:
        ModelError: there is none, or one that bmx does not know.
    """
    names = {_LAYER.sub(".*", name) for name, _ in (*model.named_modules(), *model.named_parameters())}
    plan = {name: style for name, style in (getattr(model, "tp_plan", None) or {}).items() if name in names}
    if not plan:
        raise _refusal(model, "transformers has no plan for that")
    if unknown := sorted(set(plan.values()) - STYLES):
        raise _refusal(model, f"transformers' plan has parts of a kind that bmx does not know ({', '.join(unknown)})")
    return plan


def _refusal(model: Any, reason: str) -> ModelError:
    return ModelError(f"{type(model).__name__} cannot be split over devices: {reason}", hint=ONE_DEVICE)


def _own_part(model: Any, parameter: Any, style: str, devices: int) -> nn.Parameter:
    """One device's part of a parameter: what transformers has loaded; of one without contents, the first part.

    Raises:
        ModelError: two products in one tensor cannot be divided.
    """
    part, last = parameter, parameter.dim() - 1
    dim: int | None = max(0, last - 1)  # of outputs; experts come before it
    if style in INPUTS | SLICED_INPUTS | TWO_INPUTS:
        dim = last or None  # a bias is added to the sum
    elif style in EXPERTS | UNSPLIT:
        dim = None
    if dim is not None and style in TWO_OUTPUTS | TWO_INPUTS and parameter.shape[dim] % (2 * devices):
        raise _refusal(model, f"its experts are {parameter.shape[dim] // 2} wide")
    if isinstance(parameter, DTensor):
        part = parameter.to_local()
    elif parameter.is_meta and dim is not None:
        part = parameter.narrow(dim, 0, -(-parameter.shape[dim] // devices))
    return nn.Parameter(part.detach(), requires_grad=False)


def _exchange(model: Any, name: str, module: Any, style: str, devices: int, rank: int) -> None:
    """Let a module's output be that of all devices."""
    parent, _, own = name.rpartition(".")
    if style in VOCABULARY:
        module.padding_idx = None  # which matters to gradients alone, and may be of another device
        module.forward = partial(_embedded, module, rank * -(-module.num_embeddings // devices))
    elif style in EXPERTS:
        module.forward = partial(_summed, module)
    elif style in WHOLE_OUTPUTS:
        setattr(model.get_submodule(parent), own, Gathered(module, devices))
    elif style in INPUTS | SLICED_INPUTS:
        size = -(-module.in_features // devices)
        part = slice(rank * size, (rank + 1) * size) if style in SLICED_INPUTS else None
        setattr(model.get_submodule(parent), own, Summed(module, part))


def check_parts(whole: ModelSpec, part: ModelSpec | None, devices: int) -> None:
    """Refuse what cannot be split evenly.

    Args:
        whole: sizes of the model on one device.
        part: sizes of one device's part; None if that does not run.
        devices: how many there are.

    Raises:
        ModelError: it has layers that keep a state.
        UsageError: the heads cannot be divided.
    """
    if whole.states:
        raise ModelError(f"{whole.name} cannot be split over devices: it has layers that keep a state", hint=ONE_DEVICE)
    heads = [(layer.query_heads, layer.kv_heads) for layer in whole.layers]
    divisible = not any(kv % devices or query % devices for query, kv in heads)
    parts = heads if part is None else [(layer.query_heads, layer.kv_heads) for layer in part.layers]
    if (parts != heads or part is None) and not divisible:
        kv_heads = sorted({kv for _, kv in heads})
        counts = ", ".join(map(str, kv_heads))
        fitting = [n for n in range(1, min(kv_heads) + 1) if not any(kv % n or q % n for q, kv in heads)]
        raise UsageError(
            f"--tensor-parallel-size {devices} does not divide the heads of {whole.name}: its layers have {counts} of "
            "keys and values",
            hint=f"possible here: {', '.join(map(str, fitting))}",
        )
