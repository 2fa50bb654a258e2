"""Logits of the tokens that are asked for alone, of models that would compute them for every token."""

from __future__ import annotations

import inspect
from typing import Any


def compute_asked_logits(model: Any) -> None:
    """Let a model's forward heed ``logits_to_keep`` if its class does not know it: its head gets those tokens alone.

    Args:
        model: a transformers model.
    """
    forward, head = model.forward, model.get_output_embeddings()
    if head is None or "logits_to_keep" in inspect.signature(forward).parameters:
        return

    def with_asked_logits(*args: Any, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep  # 0 for all
        asked = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, kept], *inputs[1:]))
        try:
            return forward(*args, **kwargs)
        finally:
            asked.remove()

    model.forward = with_asked_logits
