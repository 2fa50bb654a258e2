"""Finds a policy's scorer by name: one of bmx's own, or one that another package offers as an entry point."""

from __future__ import annotations

from bmx.compress.scorer_api import Needs, Scorer
from bmx.errors import UsageError
from bmx.policies import POLICIES, SCORER_GROUP, SCORERS, find_scorer

_ATTRIBUTES = ("needs", "every", "query_weights")


def scorer_named(name: str) -> Scorer | None:
    """The scorer of the policy ``name``; None for ``none``, which evicts nothing.

    Raises:
        UsageError: no package has such a policy, its scorer cannot be loaded, or what was loaded is not a scorer.
    """
    if name == "none":
        return None
    entry_point = find_scorer(name)
    if entry_point is None:
        hint = f"it takes {', '.join(POLICIES[:-1])} or none; packages add others as entry points in {SCORER_GROUP}"
        raise UsageError(f"kv_policy cannot be {name!r}", hint=hint)
    try:
        loaded = entry_point.load()
        scorer = loaded() if isinstance(loaded, type) else loaded
    except Exception as error:  # another package's code may raise anything
        raise UsageError(f"the policy {name!r} ({entry_point.value}) cannot be loaded: {error}") from error
    if not (callable(scorer) and all(hasattr(scorer, attribute) for attribute in _ATTRIBUTES)):
        raise UsageError(
            f"the policy {name!r} ({entry_point.value}) is not a scorer", hint="see bmx.compress.scorer_api.Scorer"
        )
    return scorer  # type: ignore[no-any-return]


def attention_policies() -> list[str]:
    """Names of bmx's own policies whose scorers look at attention."""
    scorers = {name: scorer_named(name) for name in SCORERS}
    return [name for name, scorer in scorers.items() if scorer and Needs.ATTENTION_MASS in scorer.needs]
