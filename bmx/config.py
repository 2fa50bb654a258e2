"""The settings of the engine: the model, its KV cache and its memory.

Each setting is declared once, as a field with its type, its default and its ``Setting``. This file knows which values
contradict each other; it decides nothing and loads nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from bmx.errors import UsageError
from bmx.kv_formats import AUTO_FORMAT, check_keys, formats_of
from bmx.model_config import ModelConfig
from bmx.policies import DEFAULT_POLICY, POLICIES
from bmx.settings import (
    ALWAYS,
    IF_CHUNKED,
    IF_CUT,
    IF_EVICTING,
    NEVER,
    NOT_IN_BENCH,
    Setting,
    check_types,
    settings_in,
)
from bmx.units import (
    LayerFactors,
    is_budget,
    parse_budget,
    parse_count,
    parse_format,
    parse_layers,
    parse_memory,
    parse_policy,
    parse_shared,
)

FAKE = "fake"  # the name of a stand-in model that answers at once
MAX_SLOTS = 4096  # where max_num_seqs says nothing: a step of more sequences is no faster
CHUNK_SIZE = 512  # the default where chunk ends decide answers


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig(ModelConfig):
    """The model, the KV cache and the memory.

    Raises:
        UsageError: a value of another type, or values that contradict each other.
    """

    kv_policy: Annotated[
        str,
        Setting(
            "How KV pairs are ranked for eviction: average-attention (Batch-Max), none (keep everything: the full "
            f"cache), or {', '.join(POLICIES[1:-1])}",
            decides_answers=ALWAYS,
            parse=parse_policy,
            metavar="POLICY",
            compared_in={"calibrate": "window,keydiff"},
            calibrated=True,
        ),
    ] = DEFAULT_POLICY
    kv_budget: Annotated[
        int | float | str,
        Setting(
            "KV pairs that each layer and head keeps for a sequence: a number, a share of its prompt (25%), as many "
            "as take a share of the bytes of its full cache (25%bytes), or auto: what `bmx calibrate` recommends",
            decides_answers=IF_EVICTING,
            unit="KV pairs",
            metavar="PAIRS",
            parse=parse_budget,
            help_in={
                "calibrate": "KV pairs that each layer and head keeps for a sequence: numbers, shares of its prompt or "
                "of its bytes (default 50%bytes, 25%bytes and 12.5%bytes)"
            },
            compared_in={"plan-batch": "512,1024,2048", "calibrate": "256,25%"},
            calibrated=True,
        ),
    ] = 2048
    kv_sink: Annotated[
        int,
        Setting(
            "First tokens that are never evicted",
            decides_answers=IF_EVICTING,
            unit="tokens",
            calibrated=True,
            rare=True,
        ),
    ] = 4
    kv_recent: Annotated[
        int,
        Setting(
            "Newest tokens that are never evicted; far-attention ranks a pair by the queries that follow them",
            decides_answers=IF_EVICTING,
            unit="tokens",
            calibrated=True,
            rare=True,
        ),
    ] = 32
    kv_protect: Annotated[
        Literal["none", "instructions"],
        Setting(
            "instructions: never evict the job's own words, that is the system prompt and the prompt template's text "
            "around the fields",
            decides_answers=IF_EVICTING,
            commands=NOT_IN_BENCH,
            calibrated=True,
            rare=True,
        ),
    ] = "none"
    kv_layer_budgets: Annotated[
        str | LayerFactors,
        Setting(
            "The budget of each layer, or of each of its kv heads: uniform, pyramid, or factors measured by "
            "`bmx calibrate`",
            decides_answers=IF_EVICTING,
            parse=parse_layers,
            metavar="LAYERS",
            rare=True,
            compared_in={"calibrate": "uniform,measured"},
            calibrated=True,
        ),
    ] = "uniform"
    kv_format: Annotated[
        str,
        Setting(
            "How KV pairs are stored: model (the model's own type), fp8, int8, int4 or, where no key is evicted, int2; "
            f"int8/int4 for keys in int8 and values in int4; auto is {AUTO_FORMAT}, and model with --kv-policy none",
            decides_answers=ALWAYS,
            parse=parse_format,
            metavar="FORMAT",
            help_in={"calibrate": "How KV pairs are stored (default model, int8, int8/int4 and int4)"},
            compared_in={"calibrate": "model,int8,int8/int4"},
            calibrated=True,
        ),
    ] = "auto"
    kv_value_norm: Annotated[
        bool,
        Setting(
            "Rank by attention times the norm of the value", decides_answers=IF_EVICTING, calibrated=True, rare=True
        ),
    ] = False
    kv_probe: Annotated[
        str | None,
        Setting(
            "A short text whose attention also ranks the pairs after each chunk, so that what it attends to stays; "
            "'instructions' takes the prompt template's or the system prompt's words",
            decides_answers=IF_EVICTING,
            commands=NOT_IN_BENCH,
            calibrated=True,
            private=True,
            rare=True,
        ),
    ] = None
    kv_probe_weight: Annotated[
        float,
        Setting(
            "The probe's share of a pair's score, above 0 and at most 1",
            decides_answers=IF_EVICTING,
            commands=NOT_IN_BENCH,
            calibrated=True,
            metavar="SHARE",
            rare=True,
        ),
    ] = 0.5
    kv_share_layers: Annotated[
        str | None,
        Setting(
            "Layers that read the keys and values of an earlier one: 7:3,12:5 (see `bmx calibrate --share-layers`)",
            decides_answers=ALWAYS,
            parse=parse_shared,
            metavar="LAYERS",
            rare=True,
            calibrated=True,
        ),
    ] = None
    state_format: Annotated[
        Literal["float32", "bfloat16"],
        Setting(
            "How layers with a recurrent state (gated delta nets, Mamba) store it; bfloat16 takes half the memory",
            decides_answers=ALWAYS,
            rare=True,
            calibrated=True,
        ),
    ] = "float32"
    kv_archive: Annotated[
        Literal["none", "model", "int8", "int8/int4", "int4", "int2"],
        Setting(
            "Keep every pair of prompt and answer, in this format, and write answers on all of them; the budget then "
            "is for reading alone",
            decides_answers=IF_EVICTING,
            help_in={
                "calibrate": "Formats in which every pair of prompt and answer is kept, and answers are written on all "
                "of them; none keeps the slot alone (default none, int8/int4 and int4, read under 25%bytes)"
            },
            compared_in={"calibrate": "none,int4"},
            calibrated=True,
        ),
    ] = "none"
    kv_archive_place: Annotated[
        str,
        Setting(
            "Where the archive is: device, host (a GPU's pairs in the host's memory), or a folder, for a file in it",
            decides_answers=NEVER,
            metavar="PLACE",
            rare=True,
        ),
    ] = "device"
    kv_recall: Annotated[
        Literal["all", "attention", "pages", "clusters", "bits"],
        Setting(
            "Which pairs a token of the answer reads: all; or those chosen by a token that reads all (attention), by "
            "the bounds of pages of keys, by clusters of keys, or by keys in two bits",
            decides_answers=IF_EVICTING,
            calibrated=True,
            rare=True,
        ),
    ] = "all"
    kv_recall_pairs: Annotated[
        int,
        Setting(
            "Pairs that a token of the answer reads where they are chosen",
            decides_answers=IF_EVICTING,
            unit="KV pairs",
            metavar="PAIRS",
            parse=parse_count,
            calibrated=True,
            rare=True,
        ),
    ] = 256
    kv_recall_every: Annotated[
        int,
        Setting(
            "Tokens of the answer from one choice to the next, at most the newest that never go (--kv-recent)",
            decides_answers=IF_EVICTING,
            unit="tokens",
            calibrated=True,
            rare=True,
        ),
    ] = 1
    calibration: Annotated[
        str | None,
        Setting(
            "File of `bmx calibrate` that --kv-budget auto reads (default <input>.calibration.json)",
            decides_answers=NEVER,
            commands=NOT_IN_BENCH,
            is_path=True,
            rare=True,
        ),
    ] = None
    chunk_size: Annotated[
        int | None,
        Setting(
            "Largest number of prompt tokens of one sequence in a step (default 512; planned for the full cache)",
            decides_answers=IF_CHUNKED,
            rare=True,
            unit="tokens",
            parse=parse_count,
            calibrated=True,
        ),
    ] = None
    memory_limit: Annotated[
        int | None,
        Setting(
            "Most memory for everything: weights, activations and KV cache (8G, 8GiB)",
            decides_answers=NEVER,
            unit="bytes",
            parse=parse_memory,
        ),
    ] = None
    kv_cache_memory: Annotated[
        int | None,
        Setting(
            "Most memory for the KV cache alone, with the states of layers without attention (300M)",
            decides_answers=NEVER,
            unit="bytes",
            parse=parse_memory,
            aliases=("kv_cache_memory_bytes",),
        ),
    ] = None
    gpu_memory_utilization: Annotated[
        float,
        Setting(
            "Share of the free memory (GPU or CPU) that bmx may use, at most 1",
            decides_answers=NEVER,
            metavar="SHARE",
            rare=True,
        ),
    ] = 0.92
    max_num_seqs: Annotated[
        int | None,
        Setting(
            "Most sequences at once", decides_answers=NEVER, unit="sequences", metavar="N", parse=parse_count, rare=True
        ),
    ] = None
    max_num_batched_tokens: Annotated[
        int | None,
        Setting(
            "Largest number of tokens in a step; one chunk of a prompt always fits",
            decides_answers=NEVER,
            rare=True,
            unit="tokens",
            parse=parse_count,
        ),
    ] = None
    enforce_eager: Annotated[
        bool,
        Setting("On a GPU, launch every step instead of replaying CUDA graphs", decides_answers=NEVER, rare=True),
    ] = False
    max_model_len: Annotated[
        int | None,
        Setting("Longest prompt and answer together (32k)", decides_answers=IF_CUT, unit="tokens", parse=parse_count),
    ] = None
    prefix_reuse: Annotated[
        bool,
        Setting(
            "Compute text that several prompts begin with only once",
            decides_answers=NEVER,
            commands=NOT_IN_BENCH,
            aliases=("enable_prefix_caching",),
            rare=True,
        ),
    ] = True

    def __post_init__(self) -> None:
        check_types(self)
        kv_format = next(setting for setting in settings_in(EngineConfig) if setting.name == "kv_format")
        chosen = kv_format.coerce(self.kv_format)
        if chosen == "auto":
            chosen = "model" if self.kv_policy == "none" or self.archives else AUTO_FORMAT
        object.__setattr__(self, "kv_format", chosen)
        check_keys(chosen, self.kv_policy)
        budget = self.kv_budget
        if not is_budget(budget):
            hint = "512 is a number of KV pairs, 0.25 a quarter of each prompt, '25%bytes' a quarter of its bytes"
            raise UsageError(f"kv_budget must be a whole number or a share, not {budget!r:.80}", hint=hint)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise UsageError(f"gpu_memory_utilization must be above 0 and at most 1: {self.gpu_memory_utilization}")
        if self.kv_sink < 0 or self.kv_recent < 1:
            raise UsageError("kv_sink must be at least 0 and kv_recent at least 1")
        if not 0 < self.kv_probe_weight <= 1:
            raise UsageError(f"kv_probe_weight must be above 0 and at most 1: {self.kv_probe_weight}")
        if not isinstance(budget, int) and budget != "auto" and self.kv_layer_budgets != "uniform":
            raise UsageError(
                "kv_layer_budgets needs a budget in KV pairs, not a share", hint="give --kv-budget a number"
            )
        if self.kv_policy != "none" and isinstance(budget, int) and budget <= self.kv_sink + self.kv_recent:
            raise UsageError(
                f"kv_budget {self.kv_budget} leaves no room beside {self.kv_sink} sink and "
                f"{self.kv_recent} recent tokens",
                hint=f"the smallest budget is {self.kv_sink + self.kv_recent + 1}; start with a quarter of the prompt",
            )
        self._check_archive()
        if self.tensor_parallel_size > 1:
            self._check_split()
        if self.max_num_batched_tokens and self.max_num_batched_tokens < self.eviction_chunk_size:
            raise UsageError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is below chunk_size {self.eviction_chunk_size}",
                hint="lower --chunk-size too (it changes what is evicted when)",
            )

    def _check_split(self) -> None:
        """Refuse what cannot be split over devices: each of them knows its own heads alone."""
        factors = self.kv_layer_budgets
        if self.quantization != "none":
            message, hint = f"quantised weights ({self.quantization}) cannot be split over devices", "--quantization"
        elif self.kv_policy == "random":
            message, hint = "kv_policy random ranks pairs by the number of their head in the model", "--kv-policy"
        elif not isinstance(factors, str) and any(isinstance(layer, tuple) for layer in factors):
            message, hint = "kv_layer_budgets has factors of single heads", "--kv-layer-budgets"
        else:
            return
        raise UsageError(f"tensor_parallel_size: {message}", hint=f"leave out {hint}, or --tensor-parallel-size")

    def _check_archive(self) -> None:
        """Refuse settings of the archive that contradict each other."""
        if self.archives and self.kv_policy == "none":
            hint = "leave --kv-archive out: --kv-format int4 stores the full cache in fewer bits"
            raise UsageError("kv_policy none evicts nothing, so there is nothing to archive", hint=hint)
        if self.kv_recall == "all":
            return
        if not self.archives and (self.kv_recall != "pages" or self.kv_policy == "none"):
            hint = "give --kv-archive a format; without one, only pages of a policy that evicts can be chosen"
            raise UsageError(f"kv_recall {self.kv_recall} needs an archive to choose from", hint=hint)
        if not 1 <= self.kv_recall_every <= self.kv_recent:
            raise UsageError(f"kv_recall_every must be from 1 to kv_recent ({self.kv_recent}): {self.kv_recall_every}")
        if not self.archives and self.kv_recall_every > 1:
            raise UsageError("without an archive, pages are chosen at each token", hint="leave --kv-recall-every out")
        if self.kv_recall_pairs <= self.kv_sink + self.kv_recent:
            raise UsageError(
                f"kv_recall_pairs {self.kv_recall_pairs} leaves no room beside {self.kv_sink} sink and "
                f"{self.kv_recent} recent tokens"
            )

    @property
    def archives(self) -> bool:
        """Whether every pair is kept behind the slots in which prompts are read."""
        return self.kv_archive != "none"

    @property
    def eviction_chunk_size(self) -> int:
        """Most prompt tokens of a chunk, where the ends of chunks decide what is evicted."""
        return self.chunk_size or CHUNK_SIZE

    @property
    def chunking_is_free(self) -> bool:
        """Whether answers do not depend on where chunks end: nothing is evicted, and nothing is rounded when stored."""
        return self.kv_policy == "none" and self.kv_format == "model" and self.state_format == "float32"

    @property
    def pair_formats(self) -> tuple[str, str]:
        """The formats of keys and values."""
        return formats_of(self.kv_format)

    @property
    def full_cache(self) -> EngineConfig:
        """The same settings with a cache that keeps every pair."""
        bare = self.without_archive
        return replace(bare, kv_policy="none", kv_probe=None, kv_value_norm=False, kv_protect="none")

    @property
    def without_archive(self) -> EngineConfig:
        """The same settings with answers written in the slots in which prompts are read."""
        return replace(self, kv_archive="none", kv_archive_place="device", kv_recall="all")
