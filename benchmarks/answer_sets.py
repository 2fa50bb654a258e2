"""The sets of prompts that ``answers.py`` measures on: news, books, documents, facts, questions and long answers.

Each row has its request, good answers if there are any, and the name of the text that it is about: rows about one text
are not independent of each other. The template of a set holds the words that all of its prompts have in common.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bmx import Engine, Request, SamplingParams
from bmx.job.input_rows import input_reader
from bmx.prompt_template import brace_template
from bmx.run_config import RunConfig

HERE = Path(__file__).parent
SAMPLE = HERE.parent / "sample_inputs/long_documents.jsonl"
QUESTIONS = HERE / "questions.jsonl"  # {"id", "title", "text", "questions": [{"question", "answers"}]}

NEWS = (
    "Read the following news passages, then write a short summary of them.\n\n{text}\n\n"
    "Now write a short summary of all the passages."
)
BOOK = "Read this part of a book.\n\n{text}\n\nSummarize what happens in it in a few sentences."
RETELL = "Read this part of a book.\n\n{text}\n\nRetell it in your own words, with every detail, as a long story."
FACT = (
    "Read the following text, then answer in one short sentence what is asked after it.\n\n{text}\n\n"
    "Answer in one short sentence: {question}"
)
ASK = (
    "Read the following text. A question about it comes at the end.\n\n{text}\n\n"
    "Question: {question}\nAnswer the question in one short sentence."
)

LONG = "long"  # the set whose answers are long
SETS = ("news", "facts-1200", "facts-4000", "questions", "documents", "book", LONG)
RIGHT_OR_WRONG = ("facts-1200", "facts-4000", "questions")  # sets whose answers have one word that matters

CHARACTERS = 4.1  # of a token of a book
FACTS = (  # a sentence, the question about it, the names of what it is about, and the answers
    (
        "The train to {name} leaves from platform {answer}",
        "From which platform does the train to {name} leave?",
        ("Lisbon", "Oslo", "Vienna", "Cairo", "Lima", "Hanoi", "Riga", "Quito"),
        ("47", "82", "59", "31", "90", "26", "74", "63"),
    ),
    (
        "The captain of the ship {name} is called {answer}",
        "What is the captain of the ship {name} called?",
        ("Aurora", "Meridian", "Halcyon", "Tempest", "Corinth", "Esperance", "Valiant", "Orion"),
        ("Solberg", "Whitlock", "Moreno", "Tanaka", "Okafor", "Lindgren", "Petrov", "Dunmore"),
    ),
    (
        "The key of the {name} lies under the {answer}",
        "Under what does the key of the {name} lie?",
        ("chapel", "observatory", "boathouse", "granary", "bakery", "library", "windmill", "greenhouse"),
        ("copper kettle", "green bench", "stone lion", "red carpet", "broken clock", "iron stove", "blue vase", "oak"),
    ),
)


@dataclass(frozen=True, slots=True)
class Row:
    """A request, good answers to it (the shortest wording each, or whole texts), and the text that it is about."""

    request: Request
    references: tuple[str, ...]
    text: str


@dataclass(frozen=True, slots=True)
class AnswerSet:
    """Rows, and the prompt template whose words they have in common."""

    name: str
    template: str | None
    rows: tuple[Row, ...]


def news(engine: Engine, data: Path, rows: int, least: int, most: int) -> Iterator[Row]:
    """Articles of LongBench's multi_news whose prompts have ``least`` to ``most`` tokens, the first ones."""
    found = 0
    for line in (data / "multi_news/multi_news.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        text = row["context"].replace("NEWLINE_CHAR ", "\n").strip()
        request = _request(str(found), NEWS, 96, text=text)
        if found < rows and least <= len(engine.encode(request)) <= most:
            found += 1
            yield Row(request, tuple(row["answers"]), request.id)


def long(data: Path, rows: int, tokens: int, answer: int) -> Iterator[Row]:
    """Parts of books to be retold, in answers of exactly ``answer`` tokens.

    They are sampled: the likeliest tokens of a small model soon repeat themselves, which any cache predicts.
    """
    for i, text in enumerate(parts(data, rows, tokens)):
        request = _request(str(i), RETELL, answer, text=text)
        yield Row(replace(request, params=replace(request.params, ignore_eos=True, temperature=1.0)), (), str(i))


def book(data: Path, rows: int, tokens: int) -> Iterator[Row]:
    """Parts of books, to be summarised."""
    for i, text in enumerate(parts(data, rows, tokens)):
        yield Row(_request(str(i), BOOK, 256, text=text), (), str(i))


def facts(data: Path, texts: int, tokens: int) -> Iterator[Row]:
    """Questions about single sentences that were put somewhere into parts of books: one of each kind in a part."""
    draw = random.Random(0)
    for i, text in enumerate(parts(data, texts, tokens)):
        sentences = text.split(". ")
        for sentence, _, names, answers in FACTS:
            sentences.insert(draw.randrange(1, len(sentences)), sentence.format(name=names[i], answer=answers[i]))
        changed = ". ".join(sentences)
        for kind, (_, question, names, answers) in enumerate(FACTS):
            request = _request(f"{i}-{kind}", FACT, 24, text=changed, question=question.format(name=names[i]))
            yield Row(request, (answers[i],), str(i))


def questions() -> Iterator[Row]:
    """Questions with short answers about the texts of ``questions.jsonl``."""
    for line in QUESTIONS.read_text(encoding="utf-8").splitlines():
        document = json.loads(line)
        for i, asked in enumerate(document["questions"]):
            request = _request(f"{document['id']}-{i}", ASK, 24, text=document["text"], question=asked["question"])
            yield Row(request, tuple(asked["answers"]), document["id"])


def own_set(path: Path, template: str | None, max_tokens: int) -> AnswerSet:
    """Rows of a file as ``bmx run`` reads them, to be answered greedily; those that it would refuse are left out."""
    config = RunConfig.of((str(path),), {"prompt_template": template, "max_tokens": max_tokens})
    rows = []
    for row in input_reader(config, (path,)).rows():
        if row.request:
            params = replace(row.request.params, temperature=0.0, repetition_penalty=1.0)
            rows.append(Row(replace(row.request, params=params), row.references, str(row.id)))
    return AnswerSet(path.stem, template, tuple(rows))


def parts(data: Path, count: int, tokens: int) -> Sequence[str]:
    """Parts of the books with about ``tokens`` tokens, evenly spread, that begin and end with sentences."""
    size = int(CHARACTERS * tokens)
    found = []
    for path in sorted((data / "books").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        starts = range(len(text) // 20, len(text) - size, size)
        found += [text[at : at + size].partition(". ")[2].rpartition(". ")[0] + "." for at in starts]
    return found[:: max(1, len(found) // count)][:count]


def answer_sets(engine: Engine, data: Path | None, names: Sequence[str]) -> Iterator[AnswerSet]:
    """The sets of these names.

    Args:
        engine: counts tokens.
        data: the folder with news and books; not needed for documents and questions.
        names: some of ``SETS``.
    """
    makers = {
        "news": lambda: AnswerSet("news", NEWS, tuple(news(engine, data, 12, 1400, 2700))),
        "book": lambda: AnswerSet("book", BOOK, tuple(book(data, 4, 4000))),
        LONG: lambda: AnswerSet(LONG, RETELL, tuple(long(data, 6, 2000, 1000))),
        "documents": lambda: replace(own_set(SAMPLE, None, 96), name="documents"),
        "facts-1200": lambda: AnswerSet("facts-1200", FACT, tuple(facts(data, 8, 1200))),
        "facts-4000": lambda: AnswerSet("facts-4000", FACT, tuple(facts(data, 8, 4000))),
        "questions": lambda: AnswerSet("questions", ASK, tuple(questions())),
    }
    return (makers[name]() for name in names)


def _request(name: str, template: str, max_tokens: int, **fields: str) -> Request:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return Request(id=name, prompt=brace_template(template).filled(fields), params=params)
