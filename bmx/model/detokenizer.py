"""Token ids of answers to text: whole ones, and growing ones piece by piece. Knows a tokenizer alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """The text of a growing answer, which never ends inside a character.

    The newest tokens are decoded together with a few before them, since the text of a token may depend on them.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0  # place of the first token that is decoded for context
        self._done = 0  # number of tokens whose text is in ``text``
        self.text = ""

    def add(self, token_id: int) -> str:
        """Take the next token; returns the text that it completes: no, one or several characters."""
        self._ids.append(token_id)
        before = self._decode(self._ids[self._context : self._done])
        after = self._decode(self._ids[self._context :])
        if after.endswith(REPLACEMENT) or len(after) <= len(before):
            return ""
        self._context, self._done = self._done, len(self._ids)
        self.text += after[len(before) :]
        return after[len(before) :]

    def spelling(self, token_id: int) -> str:
        """The spelling of a special token, which a text leaves out; nothing for other tokens."""
        if self._decode([token_id]):
            return ""
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def decode(tokenizer: Any, ids: Sequence[int], *, spelled: bool = False) -> str:
    """The text of a whole answer, without an incomplete character at its end.

    Args:
        tokenizer: a transformers tokenizer.
        ids: token ids of the answer.
        spelled: whether special tokens are spelled out; otherwise they are left out.
    """
    text: str = tokenizer.decode(ids, skip_special_tokens=not spelled, clean_up_tokenization_spaces=False)
    return text.rstrip(REPLACEMENT)
