"""How many kernels a layer launches on a GPU: steps of small models last as long as the host takes to launch them.

Counted on a stand-in for a GPU, which runs none of bmx's kernels: a model of two layers against one of one layer,
operators of torch that compute and kernels of bmx alike.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from conftest import tiny_engine
from families import FAMILIES, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from triton.runtime.interpreter import GridExecutor

from bmx.compress.scorer_api import RANK_EVERY
from bmx.engine.scheduler import Scheduler
from bmx.kernels.registry import CAPABILITIES
from bmx.measure.decode_bound import decode_step, sequence_of
from bmx.plan.planner import Length

LAUNCH_NOTHING = {
    *(
        "view",
        "_unsafe_view",
        "reshape",
        "transpose",
        "t",
        "numpy_T",
        "permute",
        "alias",
        "detach",
        "expand",
        "as_strided",
    ),
    *("slice", "select", "split", "split_with_sizes", "chunk", "unbind", "unsqueeze", "squeeze"),
    *("empty", "new_empty", "empty_like", "empty_strided"),
}
PROMPT, CHUNK, ANSWER = 48, 16, 3
READING, DECODING = 14, 11  # launches of a layer


class Operators(TorchDispatchMode):
    """Counts the operators of torch that compute something."""

    def __init__(self, counted):
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.__name__.partition(".")[0]
        self.counted[name] += name not in LAUNCH_NOTHING
        return operator(*args, **kwargs or {})


@pytest.fixture
def launched(cpu_kernels, monkeypatch):
    """Counts what a call launches, by name; none of bmx's own kernels is run."""
    cpu_kernels("triton")
    monkeypatch.setitem(CAPABILITIES, "triton", replace(CAPABILITIES["triton"], model_dtypes=("float32",)))

    def count(work):
        counted = Counter()
        with pytest.MonkeyPatch.context() as patch, Operators(counted):
            patch.setattr(GridExecutor, "__call__", lambda kernel, *_, **__: counted.update([kernel.fn.__name__]))
            work()
        return counted

    return count


def llama(layers):
    """A model of so many layers."""
    config = FAMILIES["llama"]()
    config.num_hidden_layers = layers
    return config


def steps_of(config, launched, prompt=PROMPT, **settings):
    """What a model launches to read the last chunks of prompts, which evict, and to decode a token of each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "counted", lambda: config)
        told = {"kv_budget": 20, "kv_sink": 2, "kv_recent": 5, "chunk_size": CHUNK, "max_num_seqs": 2}
        engine = tiny_engine(tiny_model("counted"), **told, **settings)
    lengths, plans, counts = [Length.of(engine.policy, prompt, ANSWER)] * 2, [], []
    launched(lambda: plans.append(engine.plan(lengths)))
    [plan] = plans
    scheduler = Scheduler(plan.groups, plan.step)
    for number in range(2):
        scheduler.admit(sequence_of(engine, number, prompt, ANSWER, rows=plan.groups[-1].capacity))
    with engine.backend.runner(plan, engine.policy, refused=pytest.fail) as runner:
        while not all(sequence.decoding for sequence in scheduler.in_slots):
            step = scheduler.schedule()
            counts.append(launched(lambda: runner.run(step)))  # noqa: B023 - called at once
            scheduler.launched(step)
        return counts[-1], launched(lambda: runner.run(decode_step(scheduler, 1)))


@pytest.mark.parametrize(("policy", "ranking"), [("window", (22, 4)), ("r-kv", (54, 6)), ("keydiff", (32, 5))])
def test_ranking_many_slots_of_a_layer_launches_no_more_than_this(policy, ranking, launched):
    """To read chunks that evict, and to decode a token before which all slots are due; beside what a layer launches."""
    told = {"kv_policy": policy, "kv_format": "int8/int4", "prompt": 20 + 2 * RANK_EVERY}
    two, three = (steps_of(llama(layers), launched, **told) for layers in (2, 3))  # several are put together
    reading, decoding = (more - less for more, less in zip(three, two, strict=True))
    assert reading.total() <= READING + ranking[0], reading
    assert decoding.total() <= DECODING + ranking[1], decoding


@pytest.mark.parametrize("kv_format", ["model", "int8/int4"])
def test_a_layer_launches_no_more_than_this(launched, kv_format):
    one, two = (steps_of(llama(layers), launched, kv_format=kv_format) for layers in (1, 2))
    reading, decoding = (more - less for more, less in zip(two, one, strict=True))
    assert reading.total() <= READING, reading
    assert decoding.total() <= DECODING, decoding


# Kind of layer, launches to read and to decode. Of qwen3_5_text's, torch launches 7 products, 5 conversions (none where
# numbers have the type already), 3 additions, and 5 for the decay and beta: exp, negation, softplus, product, sigmoid.
HYBRIDS = {"qwen3_5_text": ("linear_attention", 27, 26), "lfm2": ("conv", 16, 16)}


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_mixer_launches_no_more_than_this(launched, family):
    """The layer's MLP counts too. Prompts of a step are one launch of each function, or two, however many there are."""
    kind, most_reading, most_decoding = HYBRIDS[family]

    def layers(count):
        config = FAMILIES[family]()
        attention = next(one for one in config.layer_types if one != kind)
        config.layer_types, config.num_hidden_layers = [attention, *[kind] * count], 1 + count
        return config

    one, two = (steps_of(layers(count), launched) for count in (1, 2))
    reading, decoding = (more - less for more, less in zip(two, one, strict=True))
    assert reading.total() <= most_reading, reading
    assert decoding.total() <= most_decoding, decoding
