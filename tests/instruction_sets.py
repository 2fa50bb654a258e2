"""The instruction sets of this machine, and tests that run on each of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from bmx.kernels import build
from bmx.kernels.instruction_sets import SETS

HERE = [name for name, one in SETS.items() if not one.lack()]  # the best first


def on_every_set(cases: Iterable[tuple[Any, ...]], few: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """A set's name and the values of a case: all cases on the best set here, few on the others, one where it is lacked.

    Args:
        cases: values of a test's parameters.
        few: those that slow tests take on the other sets: each kind of behaviour once.
    """
    all_cases, few_cases = list(cases), list(few)
    on = {name: few_cases if name in HERE else few_cases[:1] for name in SETS} | dict.fromkeys(HERE[:1], all_cases)
    return [(name, *case) for name, its in on.items() for case in its]


def required(name: str) -> str:
    """The name of kernels; skips the test where they are compiled for an instruction set that this machine lacks."""
    if name in SETS and isinstance(reason := build.library(name), str):
        pytest.skip(f"no kernels compiled for {name}: {reason}")
    return name
