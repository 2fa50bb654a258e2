"""All settings of a command, those of the job included, gathered from where the user gave them.

Flags and environment variables override the YAML file, which overrides the defaults. This file knows which values
contradict each other; it decides nothing and loads nothing.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from bmx.cluster_config import ClusterConfig
from bmx.config import EngineConfig
from bmx.errors import UsageError
from bmx.methods import expand_method, parse_method
from bmx.plain_yaml import plain_mapping
from bmx.prompt_config import PromptConfig
from bmx.request import SamplingParams
from bmx.settings import ALWAYS, IF_CUT, IF_GIVEN, NEVER, NOT_IN_BENCH, NOT_IN_PLAN, RUN, Setting, settings_in
from bmx.units import parse_bytes, parse_count, parse_names, parse_seconds, parse_shard

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MAX_CONFIG_BYTES = 1_000_000
MAX_TEXT_BYTES = 16 * 10**6  # of a file with a prompt template or a system prompt
MAX_LINE_BYTES = 16 * 10**6
JINJA_FILES = (".jinja", ".jinja2", ".j2")

Section = TypeVar("Section", bound="DataclassInstance")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig:
    """The files of a job, and how it behaves.

    Raises:
        UsageError: values that contradict each other.
    """

    output_file: Annotated[
        str | None,
        Setting(
            "Where answers go (default <input>.out.jsonl); - is stdout; *.parquet, *.csv and *.tsv are tables",
            decides_answers=NEVER,
            commands=NOT_IN_PLAN,
            help_in={
                "calibrate": "Where the measurements go (default <input>.calibration.json)",
                "bench": "Where the measurements go (default bench.json)",
            },
            is_path=True,
            short="-o",
        ),
    ] = None
    error_file: Annotated[
        str | None,
        Setting(
            "Where failed rows go (default <output>.errors.jsonl)",
            decides_answers=NEVER,
            commands=RUN,
            is_path=True,
            rare=True,
        ),
    ] = None
    resume: Annotated[
        bool,
        Setting("Resume where an earlier run of the same command ended", decides_answers=NEVER, commands=RUN),
    ] = True
    overwrite: Annotated[
        bool,
        Setting(
            "Start over: replace an existing output and its errors",
            decides_answers=NEVER,
            commands=NOT_IN_PLAN,
            help_in={
                "calibrate": "Start over: replace an existing calibration file",
                "bench": "Replace an existing output",
            },
        ),
    ] = False
    set_aside: Annotated[
        bool,
        Setting(
            "Move answers that belong to no row of this job to <output>.set-aside, and resume with the others",
            decides_answers=NEVER,
            commands=RUN,
        ),
    ] = False
    retry_failed: Annotated[
        bool, Setting("Answer the rows in the error file again", decides_answers=NEVER, commands=RUN)
    ] = False
    limit: Annotated[
        int | None,
        Setting("Only the first N rows", decides_answers=NEVER, unit="rows", parse=parse_count, commands=NOT_IN_BENCH),
    ] = None
    shard: Annotated[
        str | None,
        Setting(
            "Only the I-th of N shares of the rows, such as 2/8; each share has an output of its own",
            decides_answers=ALWAYS,
            metavar="I/N",
            parse=parse_shard,
            commands=NOT_IN_BENCH,
        ),
    ] = None
    order: Annotated[
        Literal["completion", "input"],
        Setting(
            "completion: write each answer as soon as it is finished; input: in the order of the input",
            decides_answers=NEVER,
            commands=RUN,
        ),
    ] = "completion"
    id_field: Annotated[
        str | None,
        Setting(
            "Field of plain rows that holds the id (default id, or else custom_id)",
            decides_answers=IF_GIVEN,  # a sampled answer depends on the row's id
            metavar="FIELD",
            commands=NOT_IN_BENCH,
        ),
    ] = None
    keep_fields: Annotated[
        tuple[str, ...],
        Setting(
            "Fields of plain rows that their answers repeat under 'row'; all is the whole row",
            decides_answers=NEVER,
            metavar="FIELD,...",
            parse=parse_names,
            commands=RUN,
        ),
    ] = ()
    ignore_unsupported: Annotated[
        tuple[str, ...],
        Setting(
            "Fields, or types of parts such as image_url, that bmx does not know and leaves out of rows; their answers "
            "name them",
            decides_answers=IF_CUT,
            metavar="FIELD,...",
            parse=parse_names,
            commands=NOT_IN_BENCH,
            rare=True,
        ),
    ] = ()
    max_errors: Annotated[
        int | None,
        Setting("Give up when more rows than this have failed", decides_answers=NEVER, unit="rows", commands=RUN),
    ] = None
    row_timeout: Annotated[
        float | None,
        Setting(
            "A row that takes longer than this is an error (30, 5m)",
            decides_answers=NEVER,
            unit="seconds",
            parse=parse_seconds,
            commands=RUN,
            rare=True,
        ),
    ] = None
    shutdown_timeout: Annotated[
        float,
        Setting(
            "After a signal, the time to finish the rows in flight; then they are dropped",
            decides_answers=NEVER,
            unit="seconds",
            parse=parse_seconds,
            commands=("run", "calibrate"),
            rare=True,
        ),
    ] = 10.0
    lock_wait: Annotated[
        float,
        Setting(
            "How long to wait for another run that uses the same output",
            decides_answers=NEVER,
            unit="seconds",
            parse=parse_seconds,
            commands=NOT_IN_PLAN,
            rare=True,
        ),
    ] = 0.0
    max_line_bytes: Annotated[
        int,
        Setting(
            "A longer line of the input is an error",
            decides_answers=NEVER,
            unit="bytes",
            parse=parse_bytes,
            rare=True,
        ),
    ] = MAX_LINE_BYTES
    served_model_name: Annotated[
        tuple[str, ...],
        Setting(
            "Name that OpenAI rows may ask for beside the model's own; may be given several times",
            decides_answers=NEVER,
            metavar="NAME",
            rare=True,
        ),
    ] = ()
    dry_run: Annotated[bool, Setting("Show the plan and stop", decides_answers=NEVER, commands=RUN)] = False
    progress: Annotated[
        Literal["auto", "rich", "plain", "none"],
        Setting(
            "auto: live on a terminal (rich), else a line every few seconds (plain)",
            decides_answers=NEVER,
            commands=NOT_IN_PLAN,
        ),
    ] = "auto"
    quiet: Annotated[
        bool,
        Setting("Print nothing unless something failed", decides_answers=NEVER, commands=NOT_IN_PLAN, short="-q"),
    ] = False
    verbose: Annotated[
        bool,
        Setting(
            "Report each finished row: its id and its lengths, never its text",
            decides_answers=NEVER,
            commands=RUN,
            short="-v",
        ),
    ] = False
    log_format: Annotated[
        Literal["text", "json"],
        Setting("Form of the log; json: one object per line", decides_answers=NEVER, commands=NOT_IN_PLAN, rare=True),
    ] = "text"
    stats_file: Annotated[
        str | None,
        Setting(
            "Keep the counters in this JSON file during the run",
            decides_answers=NEVER,
            commands=RUN,
            is_path=True,
            rare=True,
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.overwrite and self.retry_failed:
            raise UsageError("--overwrite answers all rows again, --retry-failed only some: choose one")
        if self.set_aside and (self.overwrite or not self.resume):
            raise UsageError("--set-aside resumes: it cannot be combined with --overwrite or --no-resume")
        if self.quiet and self.verbose:
            raise UsageError("--quiet and --verbose contradict each other")
        if self.max_errors is not None and self.max_errors < 0:
            raise UsageError("max_errors must be at least 0")
        if self.row_timeout is not None and self.row_timeout <= 0:
            raise UsageError("row_timeout must be above 0")

    @property
    def share(self) -> tuple[int, int]:
        """(i, n): the i-th of n shares of the rows."""
        first, shares = map(int, (self.shard or "1/1").split("/"))
        return first, shares


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodConfig:
    """A name for several settings, which take its place before anything else reads them."""

    method: Annotated[
        str | None,
        Setting(
            "A method of the literature by name, such as kivi or snapkv: sets several settings of the cache at once",
            decides_answers=NEVER,  # the settings that it stands for do
            metavar="NAME",
            parse=parse_method,
        ),
    ] = None


SECTIONS: Mapping[str, type] = {
    "Job": JobConfig,
    "Workers": ClusterConfig,
    "Method": MethodConfig,
    "Model, cache and memory": EngineConfig,
    "Sampling (a row's own values win)": SamplingParams,
    "Prompts": PromptConfig,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """All settings of a command, its inputs, and the names of the settings that the user gave."""

    inputs: tuple[str, ...]
    given: frozenset[str] = frozenset()
    job: JobConfig = JobConfig()
    engine: EngineConfig = EngineConfig()
    sampling: SamplingParams = SamplingParams()
    prompt: PromptConfig = PromptConfig()
    cluster: ClusterConfig = ClusterConfig()

    @classmethod
    def of(cls, inputs: tuple[str, ...], values: Mapping[str, Any], command: str = "run") -> RunConfig:
        """The configuration with these values of settings, by name, and defaults for the others.

        Args:
            inputs: the input files.
            values: of settings, by name.
            command: the command; files and behaviour of a job that it does not take keep their defaults.

        Raises:
            UsageError: a value out of range, or values that contradict each other.
        """
        taken = {name: value for name, value in values.items() if command in setting_named(name).commands}
        return cls(
            inputs=inputs,
            given=frozenset(values),
            job=_section(JobConfig, taken),
            engine=_section(EngineConfig, values),
            sampling=_section(SamplingParams, values),
            prompt=_section(PromptConfig, values),
            cluster=_section(ClusterConfig, taken),
        )

    def flat(self) -> dict[str, Any]:
        """All settings by name, as ``--print-config`` shows them."""
        parts = (self.job, self.cluster, self.engine, self.sampling, self.prompt)
        return {f.name: getattr(part, f.name) for part in parts for f in fields(part)}


def _section(section: type[Section], values: Mapping[str, Any]) -> Section:
    """One section of the configuration, with those of the values that are its own."""
    return section(**{field.name: values[field.name] for field in fields(section) if field.name in values})


def given_settings(flags: Mapping[str, Any], config_file: str | None = None) -> dict[str, Any]:
    """The values that the user gave, by name: flags and variables override the config file; a method is its settings.

    Args:
        flags: settings that were given, by name; ``None`` means not given.
        config_file: a YAML file of settings.

    Raises:
        UsageError: an unknown name, a wrong type, or a setting that contradicts the method.
    """
    given = dict(read_yaml(config_file)) if config_file else {}
    given.update({name: value for name, value in flags.items() if value is not None})
    template = given.get("prompt_template")
    if isinstance(template, str) and _names_file(template) and template.endswith(JINJA_FILES):
        given["jinja"] = True
    if given.get("jinja") and template is None:
        raise UsageError("jinja is on, and there is no prompt template", hint="--prompt-template @file.jinja")
    return expand_method({name: _value(setting_named(name), value) for name, value in given.items()})


def _value(setting: Setting, given: Any) -> Any:
    r"""A given value in its setting's type. ``@FILE`` is read; in other text, a typed ``\n`` or ``\t`` acts.

    Raises:
        UsageError: a wrong type, or a file that cannot be read.
    """
    if setting.is_object and isinstance(given, str) and not given.lstrip().startswith("{"):
        given = _text_of(given, setting)
    if not setting.from_file or not isinstance(given, str):
        return setting.coerce(given)
    if _names_file(given):
        return setting.coerce(_text_of(given[1:], setting))
    text = given.removeprefix("@") if given.startswith("@@") else given
    return setting.coerce(text.replace("\\n", "\n").replace("\\t", "\t") if setting.typed_escapes else text)


def _names_file(text: str) -> bool:
    """Whether the value of a setting that may be read from a file is ``@FILE``."""
    return text.startswith("@") and not text.startswith("@@")


def _text_of(path: str, setting: Setting) -> str:
    """The text of a file, without its last line end."""
    hint = "a text that begins with @ is written @@" if setting.from_file else f"it takes {setting.expected}"
    raw = _file_bytes(path, f"the file of {setting.flag}", MAX_TEXT_BYTES, hint)
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError:
        raise UsageError(f"the file of {setting.flag}, {path}, is not UTF-8") from None


@cache
def all_settings() -> tuple[Setting, ...]:
    """Every setting, section by section."""
    return tuple(setting for title, section in SECTIONS.items() for setting in settings_in(section, title))


@cache
def _settings_by_name() -> dict[str, Setting]:
    return {setting.name: setting for setting in all_settings()}


def setting_named(name: str) -> Setting:
    """The setting of that name.

    Raises:
        UsageError: no setting has that name; the hint names the closest one.
    """
    known = _settings_by_name()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise UsageError(f"unknown setting {name!r}", hint=f"did you mean {near[0]!r}?" if near else None)
    return known[name]


def read_yaml(path: str) -> dict[str, Any]:
    """Settings from a YAML file: flat keys, safe loader, each key once.

    Raises:
        UsageError: no such file, no YAML, not a mapping, or a key twice.
    """
    raw = _file_bytes(path, "config file", MAX_CONFIG_BYTES)
    try:
        return {name.replace("-", "_"): value for name, value in plain_mapping(raw).items()}
    except ValueError as error:
        raise UsageError(f"config file {path} {error}") from None


def _file_bytes(path: str, what: str, most: int, hint: str | None = None) -> bytes:
    """A small file that the settings name.

    Args:
        path: its path; ``~`` at its beginning is the home folder.
        what: what it is, for messages.
        most: bytes that it may have.
        hint: what to do if it cannot be read.
    """
    path = os.path.expanduser(path)
    try:
        with Path(path).open("rb") as file:
            raw = file.read(most + 1)
    except OSError as error:
        raise UsageError(f"cannot read {what} {path}: {error.strerror}", hint=hint) from None
    except ValueError as error:
        raise UsageError(f"cannot read {what} {path}: {error}", hint=hint) from None
    if len(raw) > most:
        raise UsageError(f"{what} {path} is larger than {most:,} bytes")
    return raw
