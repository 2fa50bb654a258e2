"""The host's time for a layer of a step: what models wait for whose kernels are done sooner than they are launched.

python benchmarks/host.py [--layers 16]

On a CPU. Three ways to compute the layers of a tiny Llama over 256 tokens: as transformers does, each layer compiled by
``torch.compile``, and as bmx does on a GPU. Attention computes nothing in the first two; in the third, it is launched
as in a step of 16 prompt chunks, and none of bmx's kernels computes anything. Products are computed by the CPU in all
three; how long they take alone is printed too. The quarter of the steps that is fastest counts.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig
from triton.runtime.interpreter import GridExecutor

from bmx import Engine, EngineConfig, PromptConfig
from bmx.engine.backend import ModelBackend
from bmx.engine.scheduler import Scheduler
from bmx.kernels import Kernels
from bmx.kernels.registry import CAPABILITIES
from bmx.measure.decode_bound import sequence_of
from bmx.model.loader import prepare
from bmx.model.random_models import IdTokenizer
from bmx.plan.planner import Length

TOKENS, CHUNKS, REPEATS = 256, 16, 60
CHUNK = TOKENS // CHUNKS
HIDDEN, INNER = 32, 64


def model_of(layers: int) -> torch.nn.Module:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "vocab_size": 128, "num_hidden_layers": layers}
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def quarter(work: Callable[[], float]) -> float:
    """Microseconds that the fastest quarter of the repetitions stays below."""
    return 1e6 * sorted(work() for _ in range(REPEATS))[REPEATS // 4]


@torch._dynamo.disable
def nothing(query: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, None]:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1]), None


@torch.inference_mode()
def forward(model: torch.nn.Module) -> float:
    """Seconds of the model alone."""
    ids, positions = torch.zeros(1, TOKENS, dtype=torch.long), torch.arange(TOKENS).unsqueeze(0)
    started = time.perf_counter()
    model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1)
    return time.perf_counter() - started


def of_bmx(model: torch.nn.Module) -> Callable[[], float]:
    """Seconds of a step in which 16 chunks of full slots are read; its kernels compute nothing."""
    capabilities = replace(CAPABILITIES["triton"], model_dtypes=("bfloat16",))
    CAPABILITIES["triton"] = capabilities  # type: ignore[index]
    told = {"kv_budget": CHUNK + 4, "kv_sink": 2, "kv_recent": 4, "chunk_size": CHUNK, "max_num_batched_tokens": TOKENS}
    config = EngineConfig(model="tiny", device="cpu", prefix_reuse=False, max_num_seqs=CHUNKS, **told)
    backend = ModelBackend(prepare(model), Kernels("triton", "to be timed"))
    engine = Engine(config, PromptConfig(), IdTokenizer(), backend)
    length = Length.of(engine.policy, 10 * CHUNK, 2)
    plan = engine.plan([length] * CHUNKS)
    runner = engine.backend.runner(plan, engine.policy)
    runner.__enter__()  # with real kernels, which are held against the model's own parts
    GridExecutor.__call__ = lambda *_, **__: None  # type: ignore[method-assign]
    scheduler = Scheduler(plan.groups, plan.step)

    def step() -> float:
        if not any(sequence.computed < 9 * CHUNK for sequence in scheduler.in_slots):
            scheduler.drop(list(scheduler.in_slots))
            for number in range(CHUNKS):
                scheduler.admit(sequence_of(engine, number, 10 * CHUNK, 2, rows=length.rows_needed))
        scheduled = scheduler.schedule()
        started = time.perf_counter()
        runner.run(scheduled)
        taken = time.perf_counter() - started
        scheduler.launched(scheduled)
        return taken

    return step


@torch.inference_mode()
def products() -> float:
    """Seconds of a layer's seven products alone."""
    sizes = ((HIDDEN, 32), (HIDDEN, 16), (HIDDEN, 16), (32, HIDDEN), (HIDDEN, INNER), (HIDDEN, INNER), (INNER, HIDDEN))
    pairs = [(torch.randn(TOKENS, i).bfloat16(), torch.randn(o, i).bfloat16()) for i, o in sizes]
    started = time.perf_counter()
    for x, weight in pairs:
        torch.nn.functional.linear(x, weight)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    layers = parser.parse_args().layers
    torch.set_num_threads(1)
    AttentionInterface.register("nothing", lambda *given, **_: nothing(given[1], given[3]))
    model = model_of(layers)
    model.config._attn_implementation = "nothing"
    print(f"seven products of a layer alone: {quarter(products):.0f} us")
    print(f"transformers, without attention: {quarter(lambda: forward(model)) / layers:.0f} us a layer")
    for layer in model.model.layers:
        layer.compile(dynamic=True)
    print(f"torch.compile, without attention: {quarter(lambda: forward(model)) / layers:.0f} us a layer")
    print(f"bmx, with attention: {quarter(of_bmx(model_of(layers))) / layers:.0f} us a layer")


if __name__ == "__main__":
    main()
