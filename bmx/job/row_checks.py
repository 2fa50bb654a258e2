"""Sampling fields of a row: what they may be, what asks for nothing, and what bmx does not know.

Knows names and values; knows nothing of how a row is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from functools import cache, lru_cache
from typing import Any

from bmx.errors import RowError, UsageError
from bmx.job.answer_formats import FORMAT_FIELDS, own_format
from bmx.job.left_out import FLAG, LeftOut, squeezed
from bmx.job.messages import SEEN_OR_HEARD, invalid
from bmx.model.chat_renderer import ASSISTANTS
from bmx.request import SamplingParams
from bmx.run_config import setting_named

SAMPLING = "sampling"  # the object of a plain row that holds what it asks beside its prompt
SAMPLING_FIELDS = tuple(field.name for field in fields(SamplingParams))
IF_DATA = "if it is data, rename it, or use --prompt-template, which takes all fields as data"
BOOKKEEPING = frozenset((  # fields of requests that no answer depends on
    *("cache_control", "cache_salt", "labels", "metadata", "model", "parallel_tool_calls", "priority"),
    *("prompt_cache_key", "prompt_cache_retention", "request_id", "safety_identifier", "service_tier"),
    *("spaces_between_special_tokens", "user"),
))  # fmt: skip
NEVER: tuple[Any, ...] = ()
NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {  # fields of other programs, and those values that ask for nothing
    **dict.fromkeys((
        *("add_special_tokens", "adapter_id", "beam_width", "cache_implementation", "chat_template"),
        *("do_sample", "dola_layers", "dry_base", "dynatemp_exponent", "eos_token_id"),
        *("exponential_decay_length_penalty", "extra_args", "force_words_ids", "forced_bos_token_id"),
        *("forced_eos_token_id", "guided_decoding_backend", "guided_grammar"),
        *("guided_whitespace_pattern", "kv_transfer_params", "logits_processor"),
        *("max_completion_tokens", "max_length", "max_new_tokens", "max_output_tokens", "max_time"),
        *("max_tokens_to_sample", "mirostat_eta", "mirostat_tau", "mm_processor_kwargs", "n_predict", "num_predict"),
        *("prompt_embeds", "prompt_lookup_num_tokens", "random_seed"),
        *("repeat_last_n", "repeat_penalty", "sequence_bias", "stop_regex", "system"),
        *("system_prompt", "thinking_token_budget", "top_n_sigma", "truncate_prompt_tokens"),
        *("vllm_xargs", "watermarking_config", "web_search_options", "xtc_threshold"),
    ), NEVER),
    **dict.fromkeys((
        *("decoder_input_details", "early_stopping", "echo", "flat_logprobs", "guided_json_object"),
        *("include_stop_str_in_output", "no_stop_trim", "output_attentions", "output_hidden_states"),
        *("output_logits", "output_scores", "renormalize_logits", "return_full_text", "return_logprob"),
        *("return_token_ids", "return_tokens_as_token_ids", "safe_prompt", "stream", "token_healing"),
        *("use_beam_search",),
    ), (False,)),
    **dict.fromkeys((
        *("diversity_penalty", "dry_multiplier", "dynatemp_range", "encoder_no_repeat_ngram_size"),
        *("epsilon_cutoff", "eta_cutoff", "frequency_penalty", "min_length", "min_new_tokens", "min_tokens"),
        *("mirostat", "n_probs", "no_repeat_ngram_size", "penalty_alpha", "presence_penalty", "top_a"),
        *("top_logprobs", "top_n_tokens", "xtc_probability"),
    ), (0,)),
    **dict.fromkeys((
        *("best_of", "encoder_repetition_penalty", "guidance_scale", "length_penalty", "n", "num_beam_groups"),
        *("num_beams", "num_return_sequences", "tfs_z", "typical_p"),
    ), (1,)),
    **dict.fromkeys((
        *("allowed_token_ids", "bad_words", "bad_words_ids", "begin_suppress_tokens", *SEEN_OR_HEARD),
        *("logits_processors", "stop_sequences", "stop_strings", "suppress_tokens"),
    ), ([],)),
    **dict.fromkeys(("detokenize", "include_reasoning", "skip_special_tokens", "use_cache"), (True,)),
    **dict.fromkeys(("extra_body", "extra_headers", "extra_query", "logit_bias"), ({},)),
    **dict.fromkeys(("function_call", "tool_choice"), ("none", "auto", {"type": "auto"}, {"type": "none"})),
    **dict.fromkeys(("logprobs", "prompt_logprobs"), (False, 0)),
    "modalities": (["text"], ["TEXT"]),
    "stream_options": ({}, {"include_usage": True}, {"include_usage": False}),
}  # fmt: skip
_ASKS_FOR_NOTHING = NOT_SUPPORTED | {  # with names that are likelier data where a row has no envelope
    "functions": ([],),
    "store": (False,),
    "suffix": ("",),
    "thinking": ({"type": "disabled"},),
}
INSTEAD = {  # what to write in place of a field that is not supported
    **dict.fromkeys((
        *("max_completion_tokens", "max_length", "max_new_tokens", "max_output_tokens", "max_tokens_to_sample"),
        *("n_predict", "num_predict"),
    ), "'max_tokens'"),
    **dict.fromkeys(("stop_sequences", "stop_strings"), "'stop'"),
    **dict.fromkeys(("system", "system_prompt"), "a message of role 'system', or --system-prompt"),
    "do_sample": "'temperature'",
    "eos_token_id": "'stop_token_ids'",
    "random_seed": "'seed'",
    "repeat_penalty": "'repetition_penalty'",
}  # fmt: skip
OF_TEMPLATES = frozenset(("reasoning_effort", "tools"))  # what some chat templates take, and others do not
LONGEST_NAME = 40  # letters of a misspelt field, and more than any field has
LONGEST_KEPT = 10_000  # letters of a value, such as a schema, that is remembered
LONG_NAME = 8  # letters from which one wrong letter is a typo and no other word


def asks_for_nothing(name: str, value: Any) -> bool:
    """Whether a field that is not supported has the value that it has when it is left out."""
    if value is None:
        return True
    plain_values = _ASKS_FOR_NOTHING.get(name, NEVER)
    return any(value == plain and isinstance(value, bool) is isinstance(plain, bool) for plain in plain_values)


def refuse_unsupported(values: Mapping[str, Any], left_out: LeftOut) -> None:
    """Refuse fields of other programs that would have no effect, and misspelt ones, in a row whose others are data.

    Args:
        values: fields of the row.
        left_out: what may be left out.

    Raises:
        RowError: names them.
    """
    unsupported, misspelt = [], []
    for name, value in values.items():
        if name in _KNOWN_IN_PLAIN_ROWS:
            continue
        if name in NOT_SUPPORTED:
            if not asks_for_nothing(name, value) and not left_out.takes(name):
                unsupported.append(name)
        elif len(name) < LONGEST_NAME and (meant := _meant(name)) and _is_good(meant, value):
            if left_out.takes(name):
                continue
            misspelt.append(f"unknown field {name!r}: did you mean {meant!r}?")
    if unsupported:
        raise invalid(f"unsupported: {_named(unsupported)} ({IF_DATA}; {FLAG} leaves it out)")
    if misspelt:
        raise invalid(f"{min(misspelt)} ({IF_DATA})")


def refuse_unknown(values: Mapping[str, Any], where: str, known: frozenset[str], left_out: LeftOut) -> None:
    """Refuse every field that bmx does not know, unless it asks for nothing.

    Args:
        values: fields of a request.
        where: what they are fields of, for the message.
        known: names that are read elsewhere.
        left_out: what may be left out.

    Raises:
        RowError: names them.
    """
    unknown = [
        name
        for name in sorted(values.keys() - _KNOWN - BOOKKEEPING - known)
        if not asks_for_nothing(name, values[name]) and not left_out.takes(name)
    ]
    if unknown:
        meant = next((f"; did you mean {field!r}?" for name in unknown if (field := _meant(name))), "")
        raise invalid(f"unsupported in {where}: {_named(unknown)}{meant} ({FLAG} leaves it out)")


def own_sampling(values: Mapping[str, Any], left_out: LeftOut) -> dict[str, Any]:
    """What a plain row asks in its object ``sampling``; empty where it has none, or other data of that name.

    Raises:
        RowError: fields that bmx does not know.
    """
    own = values.get(SAMPLING)
    if not isinstance(own, dict):
        return {}
    refuse_unknown(own, "'sampling'", frozenset(), left_out)
    return {name: value for name, value in own.items() if value is not None}


def names_to_leave_out(names: Iterable[str]) -> frozenset[str]:
    """The squeezed names of what may be left out of rows.

    Raises:
        UsageError: bmx reads one of them.
    """
    read = sorted(set(names) & (_KNOWN_IN_PLAIN_ROWS - OF_TEMPLATES | {"text"}))
    if read:
        raise UsageError(f"ignore_unsupported names {read[0]!r}, which bmx reads", hint="take it out of the rows")
    return frozenset(map(squeezed, names))


def _named(names: Iterable[str]) -> str:
    words = (f"{name} (use {INSTEAD[name]})" if name in INSTEAD else name for name in sorted(names))
    return ", ".join(words)[:500]


def refuse_continuation(values: Mapping[str, Any], last_role: str | None) -> None:
    """Refuse what other programs call to continue the last message, where bmx does the opposite.

    bmx continues a last message of the assistant, and opens an answer after any other.

    Args:
        values: fields of a row.
        last_role: the role of its last message; None for a prompt.

    Raises:
        RowError: names the field.
    """
    if not values.keys() & {"continue_final_message", "add_generation_prompt"}:
        return
    continued = last_role in ASSISTANTS
    for name, done in (("continue_final_message", continued), ("add_generation_prompt", not continued)):
        value = values.get(name)
        if value is not None and value is not done:
            what = "continues a last message of the assistant and opens an answer after any other"
            raise invalid(f"unsupported: {name} {str(value).lower()[:20]} (bmx {what})")


def own_params(asked: Mapping[str, Any], *, may_be_data: bool) -> dict[str, Any]:
    """The sampling parameters that a row gives, with what its answer must fit; not yet checked.

    Args:
        asked: fields of the row.
        may_be_data: whether they may be data of the same names, for the message.

    Raises:
        RowError: a format that bmx does not know.
    """
    own = {name: value for name in SAMPLING_FIELDS if (value := asked.get(name)) is not None}
    try:
        return own | own_format(asked)
    except RowError as error:
        raise invalid(f"{error.message} ({IF_DATA})") if may_be_data else error from None


def sampling_params(defaults: SamplingParams, own: Mapping[str, Any], *, may_be_data: bool) -> SamplingParams:
    """The row's values over the defaults.

    Args:
        defaults: of the job.
        own: sampling fields of the row that are not null.
        may_be_data: whether the row's fields may be data of the same names, for the message.

    Raises:
        RowError: a wrong type, or out of range.
    """
    typed = tuple((key, type(value), value) for key, value in own.items())
    try:
        if any(isinstance(value, list | dict) or _is_long(value) for value in own.values()):
            return _replaced.__wrapped__(defaults, typed)
        return _replaced(defaults, typed)
    except UsageError as error:
        hint = f": {error.hint}" if error.hint else ""
        data = f" (a sampling field; {IF_DATA})" if may_be_data else ""
        raise invalid(f"{error.message}{hint}{data}") from None


@lru_cache(maxsize=1024)
def _replaced(defaults: SamplingParams, own: tuple[tuple[str, type, Any], ...]) -> SamplingParams:
    """The defaults with some values replaced; cached, since few rows differ. Types keep 1, 1.0 and True apart."""
    return replace(defaults, **{key: setting_named(key).coerce(value) for key, _, value in own})


def _is_long(value: Any) -> bool:
    """Whether a value, such as a schema, takes too much memory to be remembered."""
    return isinstance(value, str) and len(value) > LONGEST_KEPT


def _is_good(name: str, value: Any) -> bool:
    """Whether a sampling field can have this value; text is no number here."""
    if value is None or (isinstance(value, str) and name != "stop"):
        return False
    try:
        sampling_params(SamplingParams(), {name: value}, may_be_data=False)
    except RowError:
        return False
    return True


@lru_cache(maxsize=1024)
def _meant(name: str) -> str | None:
    """The sampling field that a name spells otherwise, or with one typo if it is long."""
    written = squeezed(name)
    for field, letters in _squeezed_fields():
        if written == letters or (len(letters) >= LONG_NAME and _one_typo(written, letters)):
            return field
    return None


@cache
def _squeezed_fields() -> tuple[tuple[str, str], ...]:
    return tuple((name, squeezed(name)) for name in SAMPLING_FIELDS)


def _one_typo(written: str, meant: str) -> bool:
    """Whether one letter is missing, added or wrong, or two neighbours have changed places."""
    start = 0
    while start < min(len(written), len(meant)) and written[start] == meant[start]:
        start += 1
    wrong, right = written[start:], meant[start:]
    swapped = wrong[:2] == right[:2][::-1] and wrong[2:] == right[2:]
    return swapped or wrong[1:] == right[1:] or wrong[1:] == right or wrong == right[1:]


_KNOWN = frozenset(
    (
        *(*SAMPLING_FIELDS, *FORMAT_FIELDS, *OF_TEMPLATES),
        *("add_generation_prompt", "chat_template_kwargs", "continue_final_message"),
    )
)
_KNOWN_IN_PLAIN_ROWS = _KNOWN | {"id", "messages", "prompt"}
