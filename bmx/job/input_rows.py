"""Input rows: lines of strict JSON become requests, whatever dialect each is written in.

Knows lines and requests; knows nothing of models. A line that cannot become a request is a row with an error.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import jsonlines

from bmx.errors import InputFileError, RowError
from bmx.jinja_template import parse_template
from bmx.job.dialects import PLAIN, Asked, envelope_of, is_answer
from bmx.job.left_out import LeftOut
from bmx.job.line_reader import LineSet
from bmx.job.messages import checked_messages, invalid
from bmx.job.output_records import Dialect
from bmx.job.row_checks import (
    SAMPLING,
    names_to_leave_out,
    own_params,
    own_sampling,
    refuse_continuation,
    sampling_params,
)
from bmx.job.row_lines import RowLines
from bmx.job.strict_json import is_deeper, strict_loads
from bmx.job.tools import own_tools, reasoning_effort
from bmx.prompt_template import PromptTemplate
from bmx.request import Request, SamplingParams
from bmx.run_config import MAX_LINE_BYTES, RunConfig

WHOLE_REQUESTS = {"messages", "conversations", "body", "params", "request"}
REFERENCE = "reference"  # the field with a good answer, or a list of them, for `bmx calibrate`
ALL_FIELDS = "all"  # the name that stands for all fields of a row that are kept
DEEPEST_KEPT = 200  # levels of lists and objects in kept fields: a record with them must be read again


@dataclass(slots=True)
class InputRow:
    """An input line: its id, its dialect, and its request or what is wrong with it.

    Attributes:
        line: its number, counted through all inputs.
        id: the row's own id, or ``line-<n>``.
        key: a hash of the line and of everything else that decides its answer.
        size: bytes of the line.
        dialect: how the row is written, and its record too.
        request, error: one of them is set.
        references: good answers, for `bmx calibrate`.
        is_data: whether the template makes its prompt, so that all of its fields are data.
        kept: fields of the row that its record repeats; None if it repeats none.
        ignored: names of what was left out of it.
        cells: whether its values are cells of a CSV file, which are empty where there is no value.
    """

    line: int
    id: str | int
    key: str
    size: int = 0
    dialect: Dialect = "plain"
    request: Request | None = None
    error: RowError | None = None
    references: tuple[str, ...] = ()
    is_data: bool = False
    kept: dict[str, Any] | None = None
    ignored: tuple[str, ...] = ()
    cells: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """Reads rows from files, any number of times, with one line in memory at a time.

    Attributes:
        paths: the files, read one after the other; their lines are counted through.
        defaults: sampling parameters; a row's own values replace them.
        template: text with {field} placeholders, or Jinja, that makes the prompt of plain rows; or None.
        jinja: whether the template is written in Jinja.
        models: model names that a row may ask for; empty for any.
        hash_key: the key of the rows' hashes.
        longest: bytes of the longest line that is read.
        id_field: the field that holds the id of plain rows; None for the usual ones.
        keep: fields of plain rows that their records repeat; ``all`` is every field.
        ignored: squeezed names of what may be left out of rows.

    Raises:
        UsageError: the template cannot be read.
    """

    paths: tuple[Path, ...]
    defaults: SamplingParams = SamplingParams()
    template: str | None = None
    jinja: bool = False
    models: frozenset[str] = frozenset()
    hash_key: bytes = b""
    longest: int = MAX_LINE_BYTES
    id_field: str | None = None
    keep: tuple[str, ...] = ()
    ignored: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        _ = self.prompts

    @property
    def prompts(self) -> PromptTemplate | None:
        """The template, read."""
        return None if self.template is None else parse_template(self.template, jinja=self.jinja)

    def first_fields(self, count: int) -> Iterator[tuple[Set[str], bool]]:
        """Of the plain ones among the first rows: the names of their fields, and whether the template fills them.

        Args:
            count: the first rows of the first file.
        """
        for row, values in islice(self._parsed(), count):
            if values is not None and row.dialect == "plain":
                yield values.keys(), row.is_data

    def rows(
        self, skip: LineSet | None = None, every: int = 1, always: Container[int] = frozenset()
    ) -> Iterator[InputRow]:
        """Rows in the order of the files; blank lines are skipped.

        Args:
            skip: numbers of lines to skip.
            every: read only one in this many of the other lines, chosen at random, the same ones each time.
            always: numbers of lines that ``every`` never leaves out.

        Raises:
            InputFileError: a file is missing or cannot be read.
        """
        for row, values in self._parsed(skip, every, always):
            if not row.error and values is not None:
                try:
                    self._fill(row, values)
                except RowError as error:
                    row.error = error
                except RecursionError:
                    row.error = invalid("nested too deep")
            yield row

    def identities(self) -> Iterator[InputRow]:
        """All rows with their ids and keys alone.

        Raises:
            InputFileError: as ``rows``; or the first two rows, or the only one, are answers of an earlier run.
        """
        answers = 0
        for place, (row, values) in enumerate(self._parsed()):
            if place < 2 and values is not None and not row.is_data:
                answers += is_answer(values)
            if place == 1 and answers == 2:
                raise _answers_error()
            yield row
        if answers == 1 and place == 0:
            raise _answers_error()

    def _parsed(
        self, skip: LineSet | None = None, every: int = 1, always: Container[int] = frozenset()
    ) -> Iterator[tuple[InputRow, dict[str, Any] | None]]:
        """Rows with their ids and the values of their lines; a line that is not an object is a row with an error."""
        source = RowLines(self.paths, self.longest, self.hash_key, skip, every, always)
        reader = jsonlines.Reader(source, loads=strict_loads)
        while True:
            try:
                value = reader.read(allow_none=True)
                problem = None if isinstance(value, dict) else f"line {source.number} is not a JSON object"
            except EOFError:
                return
            except jsonlines.InvalidLineError as error:
                if source.blank:
                    continue
                value, problem = None, f"line {source.number}: {error.__cause__ or error}{source.torn}"
            row = InputRow(source.number, f"line-{source.number}", source.key, source.size, cells=source.cells)
            if source.too_long:
                row.error = invalid(f"the line is longer than {self.longest:,} bytes (--max-line-bytes)")
            elif source.fault:
                row.error = invalid(f"line {source.number}: {source.fault}")
            elif problem:
                row.error = RowError("invalid_json", problem)
            else:
                self._identify(row, value)
            yield row, value if isinstance(value, dict) else None

    def _is_data(self, values: dict[str, Any]) -> bool:
        """Whether the template makes the row's prompt: then all of the row's fields are data.

        A row that holds a whole request, such as messages, is answered as that, unless the template names its field.
        A request is a list or an object; text under the name of one is data.
        """
        prompts = self.prompts
        if prompts is None:
            return False
        whole = {name for name in WHOLE_REQUESTS if isinstance(values.get(name), list | dict)}
        if not whole or not whole.isdisjoint(prompts.fields):
            return True
        return envelope_of(values) is PLAIN and whole.isdisjoint(("messages", "conversations"))

    def _identify(self, row: InputRow, values: dict[str, Any]) -> None:
        """Give a row its own id, if it has one, its dialect, and the fields that its record repeats."""
        given = _given(row, values)
        row.is_data = self._is_data(given)
        envelope = PLAIN if row.is_data else envelope_of(given)
        fields = (self.id_field,) if self.id_field and envelope is PLAIN else envelope.ids
        name = next((given[field] for field in fields if given.get(field) is not None), None)
        if isinstance(name, float) and name.is_integer():
            name = int(name)
        if isinstance(name, str | int) and not isinstance(name, bool):
            row.id = name
        elif name is not None:
            where = f" ({self.id_field!r})" if self.id_field in fields else ""
            row.error = invalid(f"an id{where} must be text or a whole number, not {type(name).__name__}")
        row.dialect = envelope.dialect(given)
        if self.keep and envelope is PLAIN:
            kept = values if ALL_FIELDS in self.keep else {name: values[name] for name in self.keep if name in values}
            if is_deeper(kept, DEEPEST_KEPT):
                row.error = invalid(f"nested too deep to be repeated by its answer: more than {DEEPEST_KEPT} levels")
            else:
                row.kept = kept

    def _fill(self, row: InputRow, values: dict[str, Any]) -> None:
        """Turn the values of a line into the row's request."""
        given, left_out = _given(row, values), LeftOut(self.ignored)
        prompts = self.prompts if row.is_data else None
        asked = _of_template(prompts, values, left_out) if prompts else _of_request(given, left_out)
        if row.dialect == "plain":
            references = given.get(REFERENCE)
            texts = references if isinstance(references, list) else [references]
            row.references = tuple(text for text in texts if isinstance(text, str))
        else:
            self._check_model(asked.fields.get("model"))
        messages = None if asked.messages is None else checked_messages(asked.messages, left_out)
        refuse_continuation(asked.fields, messages[-1]["role"].lower() if messages else None)
        own = own_params(asked.fields, may_be_data=asked.may_be_data)
        row.request = Request(
            id=row.id,
            prompt=asked.prompt,
            messages=messages,
            params=sampling_params(self.defaults, own, may_be_data=asked.may_be_data) if own else self.defaults,
            raw=asked.raw,
            seeded="seed" in own,
            chat_template_kwargs=_template_kwargs(asked.fields),
            tools=own_tools(asked.fields, left_out, may_be_data=asked.may_be_data),
            reasoning_effort=reasoning_effort(asked.fields, left_out),
        )
        row.ignored = tuple(left_out.names)

    def _check_model(self, model: Any) -> None:
        if self.models and model is not None and not (isinstance(model, str) and model in self.models):
            names = " or ".join(sorted(self.models))
            message = f"the row asks for the model {model!r:.80}, this job answers as {names}; "
            message += "--served-model-name allows more names"
            raise RowError("model_not_found", message)


def _of_template(prompts: PromptTemplate, values: dict[str, Any], left_out: LeftOut) -> Asked:
    """What a row of data asks: the template filled with its fields, and its object ``sampling``.

    Raises:
        RowError: a field is missing, or the prompt is empty.
    """
    prompt = prompts.filled(values)
    if not prompt.strip():
        raise invalid("the prompt template and the row's fields make an empty prompt")
    data = SAMPLING in prompts.fields
    return Asked(prompt=prompt, fields={} if data else own_sampling(values, left_out))


def _of_request(values: dict[str, Any], left_out: LeftOut) -> Asked:
    """What a row asks that is written as a request.

    Raises:
        RowError: nothing that bmx answers.
    """
    if is_answer(values):
        raise invalid("this is an answer of an earlier run, not a prompt")
    return envelope_of(values).asked(values, left_out)


def _given(row: InputRow, values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a row that have a value: an empty cell has none."""
    return {name: value for name, value in values.items() if value != ""} if row.cells else values


def _answers_error() -> InputFileError:
    return InputFileError(
        "the input holds answers of an earlier run, not prompts",
        hint="give the file with the prompts; to ask about answers of bmx: --prompt-template 'Shorten: {text}'",
    )


def _template_kwargs(values: Mapping[str, Any]) -> dict[str, Any]:
    """The row's values for variables of the chat template.

    Raises:
        RowError: not an object.
    """
    kwargs = values.get("chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise RowError(
            "invalid_request", "'chat_template_kwargs' must be an object, such as {\"enable_thinking\": false}"
        )
    return kwargs or {}


def input_reader(config: RunConfig, paths: tuple[Path, ...], hash_key: bytes = b"") -> Reader:
    """A reader of these files, with the defaults and the template of the job.

    Args:
        config: all settings.
        paths: the files.
        hash_key: the key of the rows' hashes; commands that keep no records need none.
    """
    return Reader(
        paths=paths,
        defaults=config.sampling,
        template=config.prompt.prompt_template,
        jinja=config.prompt.jinja,
        models=frozenset(model_names(config)),
        hash_key=hash_key,
        longest=config.job.max_line_bytes,
        id_field=config.job.id_field,
        keep=config.job.keep_fields,
        ignored=names_to_leave_out(config.job.ignore_unsupported),
    )


def model_names(config: RunConfig) -> tuple[str, ...]:
    """The model names that a row may ask for: those of the settings, the model's own, and its last part."""
    model = config.engine.model
    last = Path(model).name.removesuffix(".gguf")
    demo = ("SmolLM2-135M-Instruct",) if model == "demo" else ()
    return tuple(dict.fromkeys((*config.job.served_model_name, model, last, *demo)))
