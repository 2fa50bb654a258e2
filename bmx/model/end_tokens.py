"""The tokens that end an answer: what a model's files say, and what its chat template writes after an answer."""

from __future__ import annotations

import logging
import os
from typing import Any

from bmx.config import EngineConfig
from bmx.errors import ModelError
from bmx.model.chat_template import render_chat
from bmx.model.source_files import read_object
from bmx.render_limits import TemplateLimitError

ANSWER = "bmx7e1f"  # an answer that no template would print of its own accord
FILE = "generation_config.json"
NO_TEMPLATE = "take the template out of the model's tokenizer_config.json or chat_template.jinja"

logger = logging.getLogger(__name__)


def end_tokens(source: str, config: EngineConfig, model_config: Any, tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that end an answer.

    They are those that generation_config.json names, else those of config.json, else the tokenizer's own. The token
    that the chat template writes after an answer is always one of them: many files name only the end of a text.

    Args:
        source: folder or hub id.
        config: names the model and its revision.
        model_config: the model's config.
        tokenizer: the model's tokenizer.

    Raises:
        ModelError: a file says what cannot be token ids, or the chat template computes without end.
    """
    text = model_config.get_text_config(decoder=True)
    written = read_object(source, FILE, config, "config.json names the end tokens")
    file, stated = FILE, written.get("eos_token_id")
    if stated is None:
        file, stated = "config.json", getattr(text, "eos_token_id", None)
    if stated is None:
        file, stated = "the tokenizer", getattr(tokenizer, "eos_token_id", None)
    vocab = getattr(text, "vocab_size", None) or 2**31
    ids = _checked(stated, f"{file} of model {config.model}", vocab)
    turn = _end_of_turn(tokenizer, config.model)
    return ids if turn is None or turn >= vocab else ids | {turn}


def _checked(stated: Any, where: str, vocab: int) -> frozenset[int]:
    """Token ids, one or several; those outside of the vocabulary are left out with a warning.

    Raises:
        ModelError: they are no whole numbers.
    """
    ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if not all(type(token) is int for token in ids):
        raise ModelError(
            f"{where} says eos_token_id = {stated!r:.80}, which is not the id of a token, nor a list of ids",
            hint="correct it: a whole number, a list of them, or null",
        )
    outside = sorted(token for token in ids if not 0 <= token < vocab)
    if outside:
        words = ", ".join(map(str, outside[:5]))
        logger.warning("%s names end tokens that the model does not have (%s): ids end at %d", where, words, vocab - 1)
    return frozenset(ids) - set(outside)


def _end_of_turn(tokenizer: Any, name: str) -> int | None:
    """Id of the control token that the chat template writes directly after an answer; None if it writes none.

    Where the model itself has to write special tokens before its answer (channels, as in gpt-oss), a token after a
    text may end only a part of its turn: None.

    Raises:
        ModelError: the template computes without end.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    for content in (ANSWER, [{"type": "text", "text": ANSWER}]):  # some templates take texts, some take lists of parts
        question = {"role": "user", "content": content}
        try:
            prompt = render_chat(tokenizer, [question], add_generation_prompt=True)
            answer = {"role": "assistant", "content": content}
            text = render_chat(tokenizer, [question, answer], add_generation_prompt=False)
        except TemplateLimitError as error:
            raise ModelError(f"the chat template of model {name} cannot be used: {error}", hint=NO_TEMPLATE) from None
        except Exception:  # noqa: S112  # a template that refuses this conversation may take those of the rows
            continue
        turn, answered, rest = text[len(os.path.commonprefix([prompt, text])) :].rpartition(ANSWER)  # noqa: RUF071  # of texts
        tokens = _control_tokens(tokenizer)
        found = [token for token in tokens if rest.lstrip().startswith(token.strip())]
        if answered and found and not any(special and token in turn for token, (_, special) in tokens.items()):
            return tokens[max(found, key=len)][0]
    return None


def _control_tokens(tokenizer: Any) -> dict[str, tuple[int, bool]]:
    """Special tokens, and added tokens that the template writes and that are no words: ids, and which are special."""
    template = str(tokenizer.chat_template)
    return {
        token.content: (int(i), token.special)
        for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items()
        if token.content.strip()
        and (token.special or (token.content in template and not token.content.strip()[0].isalnum()))
    }
