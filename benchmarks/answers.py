"""How close compressed caches come to the full cache, for the bytes that they take: policies, formats, archives.

python benchmarks/answers.py --data DATA --out cells.jsonl

DATA is a folder with multi_news/multi_news.jsonl (LongBench's) and books/*.md; without it, only the sets that lie in
this repository are measured. ``--rows FILE`` measures on lines of your own, as ``bmx run`` reads them. A cell is the
settings of a cache, such as ``kv_policy=window;kv_budget=25%bytes``; ``default_cells`` lists those that are measured
where no ``--cell`` is given. The bytes of a cell are those of the slot on which an answer is written: every sequence
has one. With an archive, prompts are read in slots of their own: those are few and shared, and have their own column.

The full cache answers each prompt greedily, long answers are sampled. Each cell then reads that answer token by token
(how many of its likeliest tokens are the same, and the KL divergence), and writes an answer of its own (ROUGE-L, or
whether it is right). Long answers are only read, and compared by quarters. A line per set and cell goes to the output;
what is there already is not measured again. At the end, or at once with ``--tables``, the output is printed as tables.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from answer_sets import LONG, RIGHT_OR_WRONG, SETS, AnswerSet, answer_sets, own_set
from torch import Tensor

from bmx import Engine, EngineConfig, PromptConfig
from bmx.errors import BmxError
from bmx.measure.full_cache_answers import FullCacheAnswers
from bmx.measure.metrics import rouge_l
from bmx.request import Request, Result
from bmx.run_config import setting_named
from bmx.shutdown import Stop

FULL = EngineConfig(kv_policy="none", kv_format="model")
NEW, OLD, OTHERS = "far-attention", "average-attention", ("streaming", "h2o", "window")
MIXTURES = ("int8", "int8/int4", "int4")
ALL = "32768"  # pairs: more than any prompt here has, so that nothing is evicted
ARCHIVES = ("model", "int8", "int4", "int2")
QUARTERS = 4  # of a long answer
ByName = dict[str, Any]  # a row that was measured, as it is written


@dataclass(slots=True)
class Measured:
    """One row under one cell.

    Attributes:
        text: the text that it is about.
        tokens: forced next tokens.
        same: how many of them are the full cache's.
        divergence: sum of their KL divergences, in nats.
        quarters: the three for each quarter of a long answer.
        rouge_full: ROUGE-L of the free answer with the full cache's.
        rouge: the same with the best reference; None without references.
        full_rouge: the same for the full cache's answer.
        found: whether a reference occurs in the free answer.
        full_found: the same for the full cache's answer.
    """

    text: str
    tokens: int = 0
    same: int = 0
    divergence: float = 0.0
    quarters: list[tuple[int, int, float]] = field(default_factory=list)
    rouge_full: float = 0.0
    rouge: float | None = None
    full_rouge: float | None = None
    found: bool = False
    full_found: bool = False


def default_cells(name: str) -> list[str]:
    """The cells of a set: on news all policies and budgets, on the others a selection."""

    def cells(policies: Sequence[str], budgets: Sequence[str], formats: Sequence[str], more: str = "") -> list[str]:
        chosen = [(p, b, f) for p in policies for b in budgets for f in formats]
        return [f"kv_policy={p};kv_budget={b};kv_format={f}{more}" for p, b, f in chosen]

    half, quarter, eighth, least = (f"{share}%bytes" for share in ("50", "25", "12.5", "7"))
    archives = [f"kv_policy={p};kv_budget={quarter};kv_archive={a}" for p in (NEW, OLD) for a in ARCHIVES]
    if name == LONG:
        return [*archives, *cells([NEW, OLD], [quarter], ["model", "int8/int4"]), "kv_policy=none;kv_format=int4"]
    listed = archives + cells([NEW], [quarter], ["model", *MIXTURES[1:]]) + cells([OLD, *OTHERS], [quarter], ["model"])
    if name == "news":
        listed += cells([NEW], [eighth], ["model", *MIXTURES[1:]]) + cells([OLD, *OTHERS], [eighth], ["model"])
        listed += cells([NEW], [ALL], MIXTURES) + cells([NEW], [least], MIXTURES[1:]) + cells([NEW], [half], ["model"])
        listed += cells([OLD], [half, least], ["model"]) + cells(OTHERS, [half], ["model"])
        return listed + cells([NEW], [half, quarter], ["int8"]) + cells([OLD], [quarter], ["int4"])
    if name in RIGHT_OR_WRONG:
        for more in ("kv_probe", "kv_protect"):
            listed += cells([NEW], [quarter], ["model", "int8/int4"], f";{more}=instructions")
    return listed + cells([NEW], [eighth], MIXTURES[1:]) + cells([NEW], [ALL], MIXTURES[1:])


def settings_of(cell: str) -> dict[str, Any]:
    """``kv_policy=window;kv_budget=512`` as settings."""
    parts = (part.partition("=") for part in cell.split(";") if part)
    return {name: setting_named(name).coerce({"true": True}.get(value, value)) for name, _, value in parts}


def full_cache_answers(engine: Engine, chosen: AnswerSet, out: Path) -> tuple[FullCacheAnswers, str]:
    """The full cache's answers to a set, kept beside the output, and a hash of what they were made from."""
    requests = [row.request for row in chosen.rows]
    prompts = json.dumps([[r.prompt, r.messages, asdict(r.params)] for r in requests])
    made_by = {"model": engine.config.model, "prompts": hashlib.sha256(prompts.encode()).hexdigest()[:16]}
    path = out.with_suffix(f".{chosen.name}.safetensors")
    answers = FullCacheAnswers.load(path, requests, made_by, engine.spec.vocab)
    if answers is None:
        answers = FullCacheAnswers.generate(engine, requests, Stop())
        answers.save(path, made_by)
    for place, reason in answers.failed.items():
        print(f"{chosen.name}: row {requests[place].id} is left out: {reason}", file=sys.stderr)
    return answers, "/".join(made_by.values())


def measure(engine: Engine, full: FullCacheAnswers, chosen: AnswerSet) -> list[Measured]:
    """Let a cache read the full cache's answers token by token, and answer freely."""
    requests, forced, compared = [], {}, {}
    measured = {place: Measured(text=chosen.rows[place].text) for place in full.answers}
    for place, answer in full.answers.items():
        length = len(answer.result.token_ids)
        params = replace(answer.request.params, max_tokens=length, ignore_eos=True, stop=(), stop_token_ids=())
        requests.append(replace(answer.request, id=-1 - place, params=params))
        requests += [] if chosen.name == LONG else [replace(answer.request, id=place)]
        forced[-1 - place] = answer.result.token_ids

    def compare(request: Request, at: int, logits: Tensor) -> None:
        place = -1 - int(request.id)
        if place in full.answers and at < len(full.answers[place].ids):
            compared.setdefault(place, {})[at] = full.answers[place].compare_token(at, logits)

    for result in engine.run(requests, engine.plan(engine.measure(requests)), watch=compare, forced=forced):
        if result.error:
            raise result.error
        if result.id in full.answers:
            judge(measured[result.id], result, full.answers[result.id].result, chosen.rows[result.id].references)
    for place, tokens in compared.items():
        row, in_order = measured[place], [tokens[at] for at in sorted(tokens)]
        row.tokens, row.same, row.divergence = counted(in_order)
        if chosen.name == LONG:
            ends = [len(in_order) * i // QUARTERS for i in range(QUARTERS + 1)]
            row.quarters = [counted(in_order[start:stop]) for start, stop in itertools.pairwise(ends)]
    return list(measured.values())


def counted(compared: Sequence[tuple[bool, float]]) -> tuple[int, int, float]:
    """Tokens that were compared, how many of them are the same, and the sum of their divergences."""
    return len(compared), sum(same for same, _ in compared), sum(divergence for _, divergence in compared)


def judge(row: Measured, answer: Result, full: Result, references: Sequence[str]) -> None:
    """Compare a free answer with the full cache's, and both with the references."""
    row.rouge_full = rouge_l(answer.text, full.text)
    if references:
        row.rouge, row.full_rouge = (max(rouge_l(a.text, r) for r in references) for a in (answer, full))
        row.found, row.full_found = (any(occurs(r, a.text) for r in references) for a in (answer, full))


def occurs(words: str, text: str) -> bool:
    """Whether a text has these words; case and punctuation between them do not count."""
    pattern = r"\W+".join(map(re.escape, re.findall(r"\w+", words.lower())))
    return re.search(rf"\b{pattern}\b", text.lower()) is not None


def shares(engine: Engine, full: Engine, requests: Sequence[Request]) -> dict[str, float]:
    """Bytes of the slots, positions and scores included, and pairs in them: shares of the full cache's.

    Where prompts are read in slots of their own, also the bytes of the one that is largest, as a share of a mean full
    cache.
    """
    whole, part = full.measure(requests), engine.measure(requests)
    layouts = [engine.policy.answering.layout(engine.spec, length.rows_needed) for length in part]
    full_layouts = [full.policy.layout(full.spec, length.rows_needed) for length in whole]
    pairs, full_pairs = (sum(layer.capacity for slot in of for layer in slot.layers) for of in (layouts, full_layouts))
    full_bytes = sum(layout.kv_bytes for layout in full_layouts)
    reading = engine.policy.layout(engine.spec, max(length.reading_rows for length in part))
    return {
        "bytes": sum(layout.nbytes for layout in layouts) / full_bytes,
        "pairs": pairs / full_pairs,
        "reading_slot": reading.nbytes * len(requests) / full_bytes if engine.policy.archive else 0.0,
    }


def columns(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The columns of a cell's line in a table."""
    rows = record["by_row"]
    settings = dict(part.split("=", 1) for part in record["cell"].split(";"))
    policy = settings.pop("kv_policy", EngineConfig().kv_policy)
    archive = settings.pop("kv_archive", "none")
    archived = archive != "none"
    yield "cache", "full" if policy == "none" else f"archive, read by {policy}" if archived else policy
    yield "stored as", archive if archived else settings.pop("kv_format", EngineConfig().kv_format)
    yield "budget", "" if policy == "none" else settings.pop("kv_budget", str(EngineConfig().kv_budget))
    yield "and", ", ".join(f"{name.removeprefix('kv_')} {value}" for name, value in settings.items())
    yield "bytes", f"{record['bytes']:.1%}"
    yield "reading slot", f"{record['reading_slot']:.1%}" if record.get("reading_slot") else ""
    yield "pairs", f"{record['pairs']:.1%}"
    yield "top-1", in_percent(rows, lambda r: r["same"], lambda r: r["tokens"])
    divergence, error = ratio(rows, lambda r: r["divergence"], lambda r: r["tokens"])
    yield "KL", f"{divergence:.3f} ± {error:.3f}"
    if record["set"] == LONG:
        by_quarter = zip(*(row["quarters"] for row in rows), strict=True)
        sums = [[sum(numbers) for numbers in zip(*quarter, strict=True)] for quarter in by_quarter]
        yield "top-1 by quarter", ", ".join(f"{same / tokens:.1%}" for tokens, same, _ in sums)
        yield "KL by quarter", ", ".join(f"{divergence / tokens:.3f}" for tokens, _, divergence in sums)
        yield "seconds", f"{record['seconds']:.0f}"
        return
    if record["set"] in RIGHT_OR_WRONG:
        known = [r for r in rows if r["full_found"]]
        yield "right, of all", f"{sum(r['found'] for r in rows)} of {len(rows)}"
        yield "of the full cache's", f"{sum(r['found'] for r in known)} of {len(known)}"
    elif all(r["rouge"] is not None for r in rows):
        yield "ROUGE-L, references", in_percent(rows, lambda r: r["rouge"], lambda r: r["full_rouge"])
    yield "ROUGE-L, full cache", in_percent(rows, lambda r: r["rouge_full"], lambda _: 1)
    yield "seconds", f"{record['seconds']:.0f}"


def in_percent(rows: Sequence[ByName], top: Callable[[ByName], float], bottom: Callable[[ByName], float]) -> str:
    """A ratio with its standard error, in percent."""
    value, error = ratio(rows, top, bottom)
    return f"{value:.1%} ± {100 * error:.1f}"


def ratio(
    rows: Sequence[ByName], top: Callable[[ByName], float], bottom: Callable[[ByName], float]
) -> tuple[float, float]:
    """A ratio of sums and its standard error (linearised), where rows about the same text are not independent."""
    whole = sum(map(bottom, rows))
    if not whole:
        return 0.0, 0.0
    value = sum(map(top, rows)) / whole
    residuals: dict[str, float] = {}
    for row in rows:
        residuals[row["text"]] = residuals.get(row["text"], 0.0) + top(row) - value * bottom(row)
    texts = len(residuals)
    return value, (texts / max(1, texts - 1) * sum(r * r for r in residuals.values())) ** 0.5 / whole


def print_tables(out: Path) -> None:
    """All measured cells, a table for each set, in the order in which they were measured."""
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    for name in dict.fromkeys(record["set"] for record in records):
        of_set = [record for record in records if record["set"] == name]
        rows, (least, most) = of_set[0]["by_row"], of_set[0]["lengths"]
        print(
            f"\n{name}: {len(rows)} prompts of {least} to {most} tokens about {len({r['text'] for r in rows})} texts, "
        )
        print(f"{sum(r['tokens'] for r in rows)} forced tokens a cell, {sum(r['seconds'] for r in of_set):.0f} seconds")
        lines = [dict(columns(record)) for record in of_set]
        used = [column for column in lines[0] if any(line[column] for line in lines)]
        print(f"\n| {' | '.join(used)} |\n|{'---|' * len(used)}")
        for line in lines:
            print(f"| {' | '.join(line[column] for column in used)} |")


def measure_set(engine: Engine, chosen: AnswerSet, cells: Sequence[str], out: Path) -> None:
    """Measure the cells of a set that the output does not have yet."""
    full = Engine(engine.config, PromptConfig(prompt_template=chosen.template), engine.tokenizer, engine.backend)
    answers, made_by = full_cache_answers(full, chosen, out)
    done = set()
    if out.exists():
        lines = map(json.loads, out.read_text(encoding="utf-8").splitlines())
        done = {record["cell"] for record in lines if (record["set"], record["made_by"]) == (chosen.name, made_by)}
    requests = [answer.request for answer in answers.answers.values()]
    lengths = [length.prompt_tokens for length in full.measure(requests)]
    for cell in (cell for cell in cells if cell not in done):
        began = time.monotonic()
        try:
            other = full.with_config(replace(EngineConfig(model=full.config.model), **settings_of(cell)))
            rows = measure(other, answers, chosen)
        except BmxError as error:
            print(f"{chosen.name}: {cell} cannot be measured: {error}", file=sys.stderr, flush=True)
            continue
        seconds = time.monotonic() - began
        record = {"set": chosen.name, "cell": cell, "made_by": made_by, "lengths": [min(lengths), max(lengths)]}
        record |= shares(other, full, requests) | {"seconds": seconds}
        record |= {"by_row": [asdict(row) for row in rows]}
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{chosen.name}: {', '.join(map(': '.join, columns(record)))}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with multi_news and books")
    parser.add_argument("--out", type=Path, required=True, help="a line per set and cell")
    parser.add_argument("--set", action="append", choices=SETS, help="measure these sets alone")
    parser.add_argument("--rows", type=Path, help="a set of your own: lines as `bmx run` reads them")
    parser.add_argument("--prompt-template", help="makes the prompts of --rows")
    parser.add_argument("--max-tokens", type=int, default=96, help="longest answer to --rows")
    parser.add_argument("--limit", type=int, help="most rows of a set")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--cell", action="append", help="measure these settings instead of the list")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if not args.tables:
        with Engine.open(replace(FULL, model=args.model)) as engine:
            names = args.set or (() if args.rows else SETS if args.data else ("documents", "questions"))
            chosen = list(answer_sets(engine, args.data, names))
            if args.rows:
                chosen.append(own_set(args.rows, args.prompt_template, args.max_tokens))
            for each in chosen:
                part = replace(each, rows=each.rows[: args.limit])
                measure_set(engine, part, args.cell or default_cells(part.name), args.out)
    print_tables(args.out)


if __name__ == "__main__":
    main()
