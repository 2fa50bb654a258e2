"""How close compressed caches come to the full cache on real text: scorers, budgets, chunks, probes, formats, layers.

python benchmarks/quality.py --data DATA --out cells.jsonl --set news --cell kv_policy=window,kv_budget=512 ...

DATA is a folder with multi_news/multi_news.jsonl and books/*.md. Each cell is measured against the full cache on the
same prompts: the full cache's own greedy answer is forced, token by token, through the compressed one (share of equal
top-1 tokens, KL divergence), and with --freely the compressed one also writes its own (ROUGE-L). A line per cell.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

from bmx import Engine, EngineConfig, Request, SamplingParams
from bmx.measure.full_cache_answers import FullCacheAnswers
from bmx.run_config import setting_named
from bmx.shutdown import Stop

NEWS = (
    "Read the following news passages, then write a short summary of them.\n\n{text}\n\n"
    "Now write a short summary of all the passages."
)
BOOK = "Read this part of a book.\n\n{text}\n\nSummarize what happens in it in a few sentences."
FACT = (
    "Read the following text.\n\n{text}\n\n"
    "Answer in one short sentence: what is the secret code of the {place} archive?"
)
PLACES = ("Lisbon", "Oslo", "Vienna", "Cairo", "Lima", "Hanoi", "Riga", "Quito", "Tunis", "Perth", "Kyoto", "Delhi")


Row = tuple[Request, tuple[str, ...]]  # with its reference answers


def news(engine: Engine, data: Path, rows: int, least: int, most: int) -> list[Row]:
    """Articles whose prompts have ``least`` to ``most`` tokens."""
    sample = []
    for line in (data / "multi_news/multi_news.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        text = NEWS.format(text=row["context"].replace("NEWLINE_CHAR ", "\n").strip())
        request = Request(id=str(len(sample)), prompt=text)
        if least <= len(engine.encode(request)) <= most:
            sample.append((request, tuple(row["answers"])))
        if len(sample) == rows:
            break
    return sample


def windows(data: Path, characters: int, rows: int) -> list[str]:
    """Parts of the books, evenly spread, that begin and end with paragraphs."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((data / "books").glob("*.md"))]
    parts = []
    for text in texts:
        starts = range(len(text) // 20, len(text) - characters, characters)
        parts += [text[at : at + characters].partition(". ")[2].rpartition(". ")[0] + "." for at in starts]
    step = max(1, len(parts) // rows)
    return parts[::step][:rows]


def book(data: Path, rows: int, tokens: int) -> list[Row]:
    """Windows of books to be summarised."""
    return [
        (Request(id=str(i), prompt=BOOK.format(text=text)), ())
        for i, text in enumerate(windows(data, int(4.1 * tokens), rows))
    ]


def facts(data: Path, rows: int, tokens: int) -> list[Row]:
    """A question about one sentence that was put somewhere into a part of a book."""
    draw = random.Random(0)
    sample = []
    for i, text in enumerate(windows(data, int(4.1 * tokens), rows)):
        place, code = PLACES[i % len(PLACES)], draw.randrange(1000, 9999)
        sentences = text.split(". ")
        sentences.insert(draw.randrange(1, len(sentences)), f"The secret code of the {place} archive is {code}")
        prompt = FACT.format(text=". ".join(sentences), place=place)
        sample.append((Request(id=str(i), prompt=prompt), (str(code),)))
    return sample


def rows_of(engine: Engine, args: argparse.Namespace) -> list[Row]:
    """The prompts of a set, all to be answered greedily."""
    if args.set == "news":
        sample = news(engine, args.data, args.rows, args.least, args.most)
    elif args.set == "book":
        sample = book(args.data, args.rows, args.most)
    else:
        sample = facts(args.data, args.rows, args.most)
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens)
    return [(replace(request, params=params), references) for request, references in sample]


def settings_of(cell: str) -> dict[str, object]:
    """``kv_policy=window;kv_budget=512`` as settings."""
    pairs = (part.partition("=") for part in cell.split(";") if part)
    return {name: setting_named(name).coerce({"true": True}.get(value, value)) for name, _, value in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", choices=["news", "book", "facts"], default="news")
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--least", type=int, default=1500)
    parser.add_argument("--most", type=int, default=3500)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--freely", action="store_true")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cell", action="append", default=[])
    args = parser.parse_args()
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    base = EngineConfig(kv_policy="none", chunk_size=512)
    engine = Engine.open(base)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = rows_of(engine, args)
    requests, references = [request for request, _ in rows], {place: texts for place, (_, texts) in enumerate(rows)}
    lengths = [len(engine.encode(request)) for request in requests]
    print(
        f"{args.set}: {len(requests)} prompts of {min(lengths)} to {max(lengths)} tokens", file=sys.stderr, flush=True
    )
    kept = args.out.with_suffix(f".{args.set}.{args.rows}.{args.most}.pt")
    full_answers = FullCacheAnswers.load(kept, requests)
    if full_answers is None:
        full_answers = FullCacheAnswers.generate(engine, requests, Stop())
        full_answers.save(kept)
    done = set()
    if args.out.exists():
        done = {(r["set"], r["cell"]) for r in map(json.loads, args.out.read_text().splitlines())}
    for cell in args.cell:
        if (args.set, cell) in done:
            continue
        before = time.monotonic()
        other = engine.with_config(replace(EngineConfig(), **settings_of(cell)))
        agreement = full_answers.compare(other, Stop(), references, freely=args.freely)
        record = {"set": args.set, "cell": cell, "prompts": len(requests), "mean_prompt": sum(lengths) / len(lengths)}
        record |= agreement.record() | {"seconds": round(time.monotonic() - before, 1)}
        with args.out.open("a") as out:
            out.write(json.dumps(record) + "\n")
        print(json.dumps(record), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
