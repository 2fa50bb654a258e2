"""What a module's ``forward`` reads, and how a module gets another one for a while: its class never changes."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from itertools import pairwise
from types import FunctionType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def set_forward(module: nn.Module, forward: Callable[..., Any], undo: ExitStack) -> None:
    """Give one module a ``forward`` of its own, unless it has one already, until ``undo`` is closed."""
    if "forward" not in vars(module):
        module.forward = forward
        undo.callback(delattr, module, "forward")


def with_functions(code: Any, functions: Mapping[str, Callable[..., Any]]) -> FunctionType:
    """A copy of a function that calls other functions.

    Args:
        code: the function.
        functions: by the names under which its own file has others.
    """
    copy = FunctionType(
        code.__code__, {**code.__globals__, **functions}, code.__name__, code.__defaults__, code.__closure__
    )
    copy.__kwdefaults__ = code.__kwdefaults__
    return copy


def linear_layers(model: Any) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """The linear layers that other modules may take the place of, each with the module that it is part of and its name.

    Neither the output head, nor a layer whose weight the ``forward`` of its module reads instead of calling it.
    """
    from torch import nn

    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        read = _weights_read(type(parent).forward)
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not head and name not in read:
                yield parent, name, child


def _weights_read(forward: Any) -> set[str]:
    """Names of parts whose weight a ``forward`` reads."""
    read = [step.argval for step in dis.get_instructions(inspect.unwrap(forward)) if step.opname == "LOAD_ATTR"]
    return {part for part, attribute in pairwise(read) if attribute == "weight"}
