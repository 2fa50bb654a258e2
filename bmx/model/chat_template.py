"""Renders chat templates, which are programs of a model's author, within limits.

Knows tokenizers; knows nothing of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bmx.render_limits import limited


def render_chat(tokenizer: Any, messages: Sequence[dict[str, Any]], **options: Any) -> str:
    """The text that the tokenizer's chat template makes of a conversation.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        messages: the conversation.
        options: for transformers' ``apply_chat_template``, or for the template itself.

    Raises:
        TemplateLimitError: the template takes too much time or memory, or prints too much.
        Exception: whatever else the template raises.
    """
    characters = sum(len(str(message)) for message in messages)
    return limited(lambda: str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options)), characters)
