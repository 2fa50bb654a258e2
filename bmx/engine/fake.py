"""A stand-in model: the next token is a hash of the prompt and the position.

For trying files, flags and cron lines: the engine around it is the real one (slots, steps, plan), so that a job runs
as it would, in milliseconds and without torch. ``--model fake``.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from zlib import crc32

from bmx.engine.backend import Runner
from bmx.engine.memory_meter import MemoryMeter
from bmx.engine.scheduler import Step
from bmx.kernels import choose
from bmx.kv.layout import SlotIndex
from bmx.model.spec import Costs, LayerSpec, ModelSpec
from bmx.plan.memory import StepSize

END = 0  # the token that ends an answer
WORDS = 5000
PIECE = 1 << 20  # bytes of a text whose words are read one by one
ENDS = 8  # one token in eight ends the answer
MAX_LENGTH = 1 << 20
_WORD = re.compile(rb"\S+")
_IDS = (1, *range(1, WORDS))  # each id once in memory, however often it occurs
LAYER = LayerSpec(query_heads=1, kv_heads=1, key_dim=8, value_dim=8, window=None, owner=0)
COSTS = Costs(activation_bytes=1024, traffic_bytes=1024, flops=1024, operators=1)
SPEC = ModelSpec(
    name="FakeModel",
    layers=(LAYER,),
    costs=COSTS,
    vocab=WORDS,
    max_length=MAX_LENGTH,
    weight_bytes=0,
    head_bytes=0,
    itemsize=2,
)


class FakeTokenizer:
    """One token per word; answers are made of the words ``w1`` to ``w4999``."""

    chat_template = "{{ tools or '' }}{% for m in messages %}{{ m.content }}{{ m.tool_calls or '' }}\n{% endfor %}"

    def apply_chat_template(self, messages: list[dict[str, Any]], tools: Any = "", **_: Any) -> str:
        """The text of that template."""
        turns = (f"{message['content']}{message.get('tool_calls') or ''}\n" for message in messages)
        return f"{tools}{''.join(turns)}"

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        """Token ids of a text."""
        data = text.encode()
        words = data.split() if len(data) < PIECE else (found[0] for found in _WORD.finditer(data))
        return {"input_ids": [_IDS[number % WORDS] for number in map(crc32, words)]}

    def decode(self, ids: Iterable[int], **_: Any) -> str:
        """The text of token ids."""
        return " ".join(f"w{i}" for i in ids if i != END)


@dataclass(frozen=True, slots=True)
class FakeSampled:
    """Tokens that are known at once."""

    tokens: list[int | None]

    def read(self) -> list[int | None]:
        """All tokens."""
        return self.tokens


class FakeRunner(AbstractContextManager["FakeRunner"]):
    """Next tokens without a model."""

    kv_bytes = ahead = 0
    rounds = 1
    modules: Mapping[str, Any] = MappingProxyType({})

    def __exit__(self, *_: object) -> None:
        """Nothing is held."""

    def copy(self, source: SlotIndex, target: SlotIndex, tokens: int) -> None:
        """Nothing is held."""

    def profile_step(self, size: StepSize, sampled: int) -> None:
        """Nothing is held."""

    def run(self, step: Step) -> FakeSampled:
        """The next token of each sampling chunk."""
        sampling = [chunk.sequence for chunk in step.chunks if chunk.samples]
        return FakeSampled([next_token(sequence.prompt, len(sequence.answer)) for sequence in sampling])


def next_token(prompt: Sequence[int], place: int) -> int:
    """The token at a place of the answer to a prompt."""
    number = crc32(array("I", [*prompt[-8:], len(prompt), place]).tobytes())
    return END if number % ENDS == 0 else number % (WORDS - 1) + 1


class FakeBackend:
    """Stands in for a model: no weights, no device, an answer at once."""

    spec = SPEC
    end_token_ids = frozenset({END})
    device_type = "cpu"
    measurable = False
    shares_prefixes = True
    model = None

    def __init__(self) -> None:
        self.kernels = choose(self.device_type)
        self.meter = MemoryMeter(self.device_type, 0)

    @property
    def runtime_bytes(self) -> int:
        """All that this process holds."""
        return self.meter.now

    def try_kernels(self, *_: Any) -> None:
        """There are none."""

    def replace_kernels(self, _: Exception) -> bool:
        """There are none."""
        return False

    def runner(self, *_: Any, **__: Any) -> AbstractContextManager[Runner]:
        """Next tokens without slots."""
        return FakeRunner()

    def describe(self) -> dict[str, Any]:
        """What computes the answers, for the record."""
        return {"architecture": SPEC.name, "commit": None, "dtype": "none", "device": "none", "attention": "none"}
