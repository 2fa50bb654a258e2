"""What a calibration file may hold. Anybody may have written it: no other setting is taken, and no value is believed.

Knows the fields of the file; reads no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bmx.errors import UsageError
from bmx.run_config import all_settings, setting_named

CALIBRATED = frozenset(setting.name for setting in all_settings() if setting.calibrated)  # in which candidates differ
LATER_SETTINGS = (  # not in the oldest files
    "kv_archive",
    "kv_recall",
    "kv_recall_pairs",
    "kv_recall_every",
    "state_format",
)
LARGEST_NUMBER = 1e18

NUMBER, COUNT = "a number", "a whole number"
OBJECT, TEXT, LIST = "an object", "text", "a list"
KINDS: Mapping[str, type] = {OBJECT: dict, TEXT: str, LIST: list}
SIZES = {"kv_bytes_per_sequence": COUNT, "slots": COUNT}
CANDIDATE = SIZES | {
    "settings": OBJECT,
    "top1_agreement": NUMBER,
    "top1_standard_error": NUMBER,
    "kl_divergence": NUMBER,
    "exact_match": NUMBER,
    "rouge_l_full_cache": NUMBER,
    "length_ratio": NUMBER,
    "failed_rows": COUNT,
}
REFERENCES = {"rouge_l_reference": NUMBER, "rouge_l_reference_of_full_cache": NUMBER}
RECORD = {"model": TEXT, "fingerprint": OBJECT, "candidates": LIST}
NUMBERS = {"min_agreement", "full_cache_seconds"}
MEASURED_ONCE: Mapping[str, Mapping[str, str]] = {  # objects that are there once they are measured
    "full_cache": SIZES | {"rows": COUNT},
    "layer_factors": {"share": NUMBER, "factors": OBJECT},
    "shared_layers": {"asked": COUNT, "pairs": TEXT},
}


def problem_of(record: Mapping[str, Any]) -> str:
    """What is wrong with the contents of a calibration file; empty if nothing is."""
    return next(_problems(record), "")


def _problems(record: Mapping[str, Any]) -> Iterator[str]:
    yield from _misfits(record, RECORD)
    for name in NUMBERS & record.keys():
        yield from _misfits(record, {name: NUMBER})
    for name, form in MEASURED_ONCE.items():
        if name in record:
            yield from _misfits(record, {name: OBJECT})
            yield from _misfits(record[name], form)
            yield from _wrong_speed(record[name])
    for candidate in record["candidates"]:
        yield from _wrong_candidate(candidate)
    for factors in record.get("layer_factors", {}).get("factors", {}).values():
        if not isinstance(factors, str):
            yield "'factors' must be text"
        else:
            yield from _wrong_settings({"kv_layer_budgets": factors})
    pairs = record.get("shared_layers", {}).get("pairs")
    yield from _wrong_settings({"kv_share_layers": pairs} if pairs else {})
    recommended = record.get("recommended", "")
    if recommended is not None:
        yield from _misfits({"recommended": recommended}, {"recommended": OBJECT})
        yield from _wrong_settings(recommended)
        if "kv_budget" not in recommended:
            yield "it recommends no kv_budget"


def _wrong_candidate(candidate: Any) -> Iterator[str]:
    if not isinstance(candidate, dict):
        yield "a candidate must be an object"
        return
    yield from _misfits(candidate, CANDIDATE | (REFERENCES if REFERENCES.keys() & candidate.keys() else {}))
    yield from _wrong_speed(candidate)
    yield from _wrong_settings(candidate["settings"])
    for name in sorted(CALIBRATED - candidate["settings"].keys() - {*LATER_SETTINGS}):
        yield f"a candidate has no {name}"


def _wrong_speed(measured: Mapping[str, Any]) -> Iterator[str]:
    speed = measured.get("predicted_tokens_per_second")
    if speed is not None and not _is_number(speed):
        yield "'predicted_tokens_per_second' must be a number or null"


def _wrong_settings(settings: Mapping[str, Any]) -> Iterator[str]:
    """Settings that a calibration cannot set, or to no such value."""
    for name, value in settings.items():
        if name not in CALIBRATED:
            yield f"{name[:80]!r} is not a setting that a calibration can choose"
        elif isinstance(value, dict | list) or (name == "kv_budget" and value == "auto"):
            yield f"{name} cannot be {value!r:.80}"
        else:
            try:
                setting_named(name).coerce(value)
            except UsageError as error:
                yield error.message


def _misfits(values: Mapping[str, Any], form: Mapping[str, str]) -> Iterator[str]:
    """Values that are missing or of another kind.

    Args:
        values: by name.
        form: the kind of each value, by name.
    """
    for name, kind in form.items():
        value = values.get(name)
        if kind in KINDS:
            fits = isinstance(value, KINDS[kind])
        else:
            fits = _is_number(value) and (kind == NUMBER or isinstance(value, int))
        if not fits:
            yield f"{name!r} must be {kind}"


def _is_number(value: Any) -> bool:
    """Whether a value is a number that can be computed with: finite, and no whole number of a thousand digits."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST_NUMBER
