"""The names of the KV policies, and where the scorer of each one is: the one list that settings and scorers read.

To add a policy, write its scorer and add one line here. Scorers are loaded by name, so this file loads no torch.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

SCORER_GROUP = "bmx.scorers"  # the entry points by which other packages add policies
_ATTENTION, _KEYS = "bmx.compress.attention_scorers", "bmx.compress.key_scorers"
SCORERS = {
    "average-attention": f"{_ATTENTION}:AverageAttention",
    "far-attention": f"{_ATTENTION}:FarAttention",
    "h2o": f"{_ATTENTION}:AttentionMass",
    "decay": f"{_ATTENTION}:A2SF",
    "roco": f"{_ATTENTION}:RoCo",
    "window": f"{_ATTENTION}:Window",
    "rocketkv": f"{_ATTENTION}:ROCKETKV",
    "tova": f"{_ATTENTION}:TOVA",
    "r-kv": f"{_ATTENTION}:RKV",
    "keydiff": f"{_KEYS}:KeyDiff",
    "knorm": f"{_KEYS}:KeyNorm",
    "lagkv": f"{_KEYS}:LagKV",
    "expected-attention": f"{_KEYS}:ExpectedAttention",
    "streaming": f"{_ATTENTION}:Recency",
    "random": f"{_ATTENTION}:Random",
}
DEFAULT_POLICY = "average-attention"
POLICIES = (*SCORERS, "none")  # "none" evicts nothing: the full cache


def find_scorer(name: str) -> EntryPoint | None:
    """The entry point of a policy's scorer, bmx's own or another package's; None if no package has the policy."""
    if name in SCORERS:
        return EntryPoint(name, SCORERS[name], SCORER_GROUP)
    return next(iter(entry_points(group=SCORER_GROUP, name=name)), None)
