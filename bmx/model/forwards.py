"""How a module gets a ``forward`` of its own for a while: only the instance changes, never its class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
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
