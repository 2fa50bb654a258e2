"""The part of an answer in which a model reasons, told from the answer proper by the marks of its chat template.

Knows a tokenizer; knows nothing of requests or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bmx.model.detokenizer import decode

PAIRS = (  # the mark that begins reasoning, and those that end it, of which the first that is found counts
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>", "<|end|>"),  # gpt-oss
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("[THINK]", "[/THINK]"),  # Magistral
    ("◁think▷", "◁/think▷"),  # Kimi
    ("<think>", "</think>"),  # Qwen, DeepSeek, SmolLM and many others
    ("<thinking>", "</thinking>"),
)
EDGE = 8  # tokens at the beginning of an answer, or at the end of a prompt, among which a mark begins reasoning


@dataclass(frozen=True, slots=True)
class ReasoningMarks:
    """The marks around the reasoning in the answer to one prompt.

    Attributes:
        tokenizer: a transformers tokenizer.
        begin: the mark that begins reasoning.
        ends: the marks that end it.
        begin_ids, end_ids: token ids of these marks.
        open: whether the prompt left the reasoning open, so that the answer begins inside.
    """

    tokenizer: Any
    begin: str
    ends: tuple[str, ...]
    begin_ids: tuple[int, ...]
    end_ids: tuple[tuple[int, ...], ...]
    open: bool = False

    @classmethod
    def of(cls, tokenizer: Any) -> ReasoningMarks | None:
        """The marks that the tokenizer's chat template knows; None if it knows none."""
        template = str(getattr(tokenizer, "chat_template", None) or "")
        for begin, *ends in PAIRS:
            if all(end in template for end in ends):
                ids = [_ids(tokenizer, mark) for mark in (begin, *ends)]
                return cls(tokenizer, begin, tuple(ends), ids[0], tuple(ids[1:]))
        return None

    def after(self, prompt: Sequence[int], continued: str) -> ReasoningMarks:
        """The same marks for the answer to a prompt, which may have left the reasoning open.

        Args:
            prompt: token ids of the prompt.
            continued: the text of the message that the answer continues; empty if it continues none.
        """
        written = decode(self.tokenizer, prompt[-EDGE - len(self.begin_ids) :], spelled=True)
        begun = continued.rfind(self.begin) > max(map(continued.rfind, self.ends))
        return replace(self, open=begun or written.rstrip().endswith(self.begin))

    def split(self, ids: Sequence[int], *, spelled: bool) -> tuple[str | None, str]:
        """The reasoning of an answer, None if it has none, and its text. Without an end, all of it is reasoning.

        Args:
            ids: token ids of the answer.
            spelled: whether special tokens in its text are spelled out; otherwise they are left out.
        """
        start = self._start(ids)
        for mark in self.end_ids if start is not None else ():
            at = _find(ids, mark, start or 0)
            if at >= 0:
                thought = self.tidied(decode(self.tokenizer, ids[start:at], spelled=len(self.ends) > 1))
                return thought or None, decode(self.tokenizer, ids[at + len(mark) :], spelled=spelled).lstrip()
        text = decode(self.tokenizer, ids[start or 0 :], spelled=spelled)
        inside, said = (self if start is None else replace(self, open=True)).borders(text)
        return (None, text) if inside is None else (self.tidied(text[inside]) or None, text[said].lstrip())

    def borders(self, text: str) -> tuple[slice | None, slice]:
        """Where the reasoning is in the text of an answer, marks included as they are spelled, and where the rest is.

        Args:
            text: of the answer.
        """
        begins = text.lstrip().startswith(self.begin)
        if not (self.open or begins or text.startswith(self.ends[0])):
            return None, slice(0, len(text))
        start = text.index(self.begin) + len(self.begin) if begins else 0
        for end in self.ends:
            at = text.find(end, start)
            if at >= 0:
                return slice(start, at), slice(at + len(end), len(text))
        return slice(start, len(text)), slice(0, 0)

    def tidied(self, thought: str) -> str:
        """Reasoning without blanks around it, and without what stands between several parts of it."""
        if len(self.ends) == 1:
            return thought.strip()
        return "\n".join(part.partition(self.ends[-1])[0].strip() for part in thought.split(self.begin)).strip()

    def _start(self, ids: Sequence[int]) -> int | None:
        """How many tokens of an answer come before its reasoning; None where it does not begin with any."""
        at = _find(ids[: EDGE + len(self.begin_ids)], self.begin_ids)
        if at >= 0 and not decode(self.tokenizer, ids[:at]).strip():
            return at + len(self.begin_ids)
        return 0 if self.open or _find(ids[: len(self.end_ids[0])], self.end_ids[0]) == 0 else None


def _ids(tokenizer: Any, mark: str) -> tuple[int, ...]:
    """Token ids of a mark; none if the tokenizer cannot spell it."""
    ids = tokenizer(mark, add_special_tokens=False)["input_ids"]
    return tuple(ids) if decode(tokenizer, ids, spelled=True).strip() == mark else ()


def _find(ids: Sequence[int], wanted: Sequence[int], start: int = 0) -> int:
    """Where some token ids stand among others, from ``start`` on; -1 if they do not, or are none."""
    wanted = list(wanted)
    if not wanted:
        return -1
    places = (at for at in range(start, len(ids) - len(wanted) + 1) if ids[at] == wanted[0])
    return next((at for at in places if list(ids[at : at + len(wanted)]) == wanted), -1)
