"""Which models run: every type of transformers as a tiny random model, opened as a user would, against ``generate``.

    python benchmarks/models.py                         # all that the results lack; stopped, it continues
    python benchmarks/models.py qwen3_next granite      # these anew
    python benchmarks/models.py --minutes 4             # as many as end in this time
    python benchmarks/models_page.py                    # writes docs/models.md from the results

The families of the tests have their configurations in ``tests/families.py``; all other types that transformers reads
as a language model, or as one of images and text, are built by ``tiny_configs.py``. Each is saved and opened from its
folder in a process of its own, with a tokenizer of words in the place of the one that transformers would choose by the
type. It answers five prompts of unequal lengths in chunks of 7 tokens, in three slots, with the full cache; then again
with a small budget, in which no row may fail. The reference is the model that transformers loads from the same folder:
one prompt at a time, greedy, float32, eager attention. Prints a line a model; the results are ``models.jsonl``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
import transformers
from families import FAMILIES, random_model, tiny_model, word_tokenizer, words
from models_page import RESULTS, Outcome, read_results, write_results
from tiny_configs import tiny_config
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from bmx import Engine, EngineConfig, Request, SamplingParams
from bmx.errors import BmxError
from bmx.model.loader import silence_transformers

LENGTHS, NEW_TOKENS, ORDINARY = (5, 60, 17, 33, 9), 7, 110  # tokens above stand for images and the like
CROWDED = {"max_num_seqs": 3, "max_num_batched_tokens": 20, "kv_format": "model", "dtype": "float32", "device": "cpu"}
LARGEST = 20_000_000  # parameters; a type that is still larger has sizes that nobody made small
Answers = list[tuple[int, ...]]


class UnbuiltError(Exception):
    """There is no tiny model of this kind, or transformers itself does not answer with it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="families of the tests, or model types")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--limit", type=float, default=60, help="seconds for one model")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no model after this time")
    args = parser.parse_args()
    results = read_results(args.results)
    silence_transformers()
    warnings.simplefilter("ignore")
    attempt("llama")  # imports what every process needs
    known, ends = families(), time.monotonic() + 60 * args.minutes
    for name in args.names or [name for name in known if name not in results]:
        if time.monotonic() > ends:
            break
        results[name] = in_a_process(name, args.limit)
        write_results(args.results, {name: results[name] for name in known if name in results})
        print(f"{name}: {results[name].state}  {results[name].why}", flush=True)
    left = sum(name not in results for name in known)
    print(f"{len(results)} models are in {args.results}, {left} are left")


def families() -> list[str]:
    """The families of the tests, then every other type of the two tables."""
    others = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    return [*FAMILIES, *sorted(others - {type_of(name) for name in FAMILIES})]


def type_of(name: str) -> str:
    return str(FAMILIES[name]().model_type) if name in FAMILIES else name


def build(name: str) -> Any:
    """The tiny model of a family or type.

    Raises:
        UnbuiltError: its sizes did not become small.
    """
    if name in FAMILIES:
        return tiny_model(name)
    config, auto = tiny_config(name), auto_class(name)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in auto.from_config(config).parameters())
    if parameters > LARGEST:
        raise UnbuiltError(f"its smallest configuration has {parameters:,} parameters")
    return random_model(auto, config)


def auto_class(model_type: str) -> Any:
    images = model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return AutoModelForImageTextToText if images else AutoModelForCausalLM


def attempt(name: str) -> Outcome:
    """What becomes of a model, from its weights to its answers."""
    model_type = type_of(name)
    found: dict[str, Any] = {
        "type": model_type,
        "text_only": auto_class(model_type) is AutoModelForImageTextToText,
        "transformers": transformers.__version__,
    }
    with TemporaryDirectory() as folder:
        try:
            build(name).save_pretrained(folder)
        except Exception as error:
            return Outcome(**found, state="unbuilt", why=first_line(error))
        try:
            with (
                patch("bmx.engine.open.load_tokenizer", lambda *_: word_tokenizer()),
                Engine.open(settings(folder, chunk_size=7, kv_policy="none")) as engine,
            ):
                found["keeps_states"] = bool(getattr(engine.spec, "states", ()))
                return Outcome(**found, **judged(engine, reference(model_type, folder)))
        except UnbuiltError as error:
            return Outcome(**found, state="unbuilt", why=f"generate: {error}")
        except BmxError as error:
            return Outcome(**found, state="refused", why=error.message.partition(": ")[2] or error.message)
        except Exception as error:
            return Outcome(**found, state="failed", why=first_line(error))


def settings(folder: str, **more: Any) -> EngineConfig:
    return EngineConfig(model=folder, **CROWDED, **more)


def first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line[:120]}"


def prompts() -> Answers:
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randint(3, ORDINARY, (n,), generator=generator).tolist()) for n in LENGTHS]


def reference(model_type: str, folder: str) -> Answers:
    """What transformers answers.

    Raises:
        UnbuiltError: it does not.
    """
    answers = []
    try:
        model = auto_class(model_type).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        model.generation_config.eos_token_id = None
        for prompt in prompts():
            ids = torch.tensor([prompt])
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS, use_cache=True
            )
            answers.append(tuple(output[0, len(prompt) :].tolist()))
    except Exception as error:
        raise UnbuiltError(first_line(error)) from error
    return answers


def judged(engine: Engine, expected: Answers) -> dict[str, Any]:
    """How the engine's answers compare."""
    distinct = len({token for answer in expected for token in answer})
    answers, errors = answered(engine)
    wrong = [i for i, answer in enumerate(answers) if answer != expected[i]]
    if errors or wrong:
        state = "failed" if errors else "wrong"
        return {"state": state, "why": errors[0] if errors else f"rows {wrong} differ", "distinct": distinct}
    budget = settings(engine.config.model, chunk_size=10, kv_budget=24, kv_recent=6)
    _, errors = answered(engine.with_config(budget))
    if errors:
        return {"state": "failed", "why": f"with a budget: {errors[0]}", "distinct": distinct}
    return {"state": "exact", "distinct": distinct}


def answered(engine: Engine) -> tuple[Answers, list[str]]:
    """Token ids of each prompt, and the errors of those that failed."""
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    requests = [Request(id=i, prompt=words(prompt), params=params) for i, prompt in enumerate(prompts())]
    results = sorted(engine.stream(requests), key=lambda result: result.id)
    return [tuple(result.token_ids or ()) for result in results], [str(r.error) for r in results if r.error]


def in_a_process(name: str, limit: float) -> Outcome:
    """What ``attempt`` finds in a process of its own, which is ended after ``limit`` seconds."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_report, args=(name, theirs))
    process.start()
    theirs.close()
    try:
        if ours.poll(limit):
            return Outcome(**ours.recv())
        why = f"it took longer than {limit:.0f} seconds"
    except EOFError:
        why = "its process ended"
    finally:
        process.kill()
        process.join()
    return Outcome(type=type_of(name), state="failed", why=why, transformers=transformers.__version__)


def _report(name: str, to: Connection) -> None:
    to.send(vars(attempt(name)))


if __name__ == "__main__":
    main()
