"""The page of models that run: ``python benchmarks/models_page.py`` writes docs/models.md from ``models.jsonl``.

Knows the form of the page, and under which names people know the types.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
RESULTS = Path(__file__).with_name("models.jsonl")
FEW = 10
INTRODUCTION = """# Models that run

This page is written by `python benchmarks/models_page.py` from what `benchmarks/models.py` found; a test compares it.
It has every model type that transformers {version} reads as a language model, or as a model of images and text. Each
was tried as a tiny random model in float32, opened as a user would: five prompts of unequal lengths, read in chunks of
7 tokens in three slots.

- *Exact*: the answers are `generate`'s, token for token, with the full cache; with a small budget no row fails.
- *Refused*: bmx names the reason and stops before it answers anything.
- *Not known*: there was no tiny model of the type, or `generate` itself did not answer. bmx may run it or refuse it.

A type is the `model_type` in a model's `config.json`. Names are of models that are published under it, and never all.
What is said of a type holds for its usual configurations: another may have layers that are refused.

Of {types} types, {exact} are exact, {refused} refused, {wrong} wrong or failing, and {unknown} not known.
"""


@dataclass
class Outcome:
    """What became of a model.

    Attributes:
        type: its ``model_type``.
        state: ``exact``, ``wrong``, ``refused``, ``failed`` (a row or the program), or ``unbuilt`` (no tiny model).
        why: the reason, unless it is exact.
        text_only: whether the type reads images too, which bmx leaves out.
        keeps_states: whether it has layers that keep a state.
        distinct: different tokens in transformers' answers; few say little.
        transformers: the version.
    """

    type: str
    state: str
    why: str = ""
    text_only: bool = False
    keeps_states: bool = False
    distinct: int = 0
    transformers: str = ""


Results = dict[str, Outcome]


def read_results(path: Path) -> Results:
    """Outcomes by the names of families."""
    if not path.exists():
        return {}
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {line.pop("name"): Outcome(**line) for line in lines}


def write_results(path: Path, results: Results) -> None:
    """A line for each."""
    lines = (json.dumps({"name": name} | asdict(outcome)) + "\n" for name, outcome in results.items())
    path.write_text("".join(lines), encoding="utf-8")


def page(results: Results) -> str:
    """The page as Markdown: a section for each state, in it a row for each type."""
    rows = {(found.type, found.state, found.why, found.keeps_states): found for found in results.values()}
    found = sorted(rows.values(), key=lambda outcome: outcome.type)
    exact, refused, unknown = ([o for o in found if o.state == state] for state in ("exact", "refused", "unbuilt"))
    wrong = [outcome for outcome in found if outcome.state in {"wrong", "failed"}]
    counts = {
        name: len({outcome.type for outcome in outcomes})
        for name, outcomes in zip(
            ("types", "exact", "refused", "wrong", "unknown"), (found, exact, refused, wrong, unknown), strict=True
        )
    }
    versions = ", ".join(sorted({outcome.transformers for outcome in found}))
    parts = [
        INTRODUCTION.format(version=versions, **counts),
        _section("Exact: attention alone", [o for o in exact if not o.text_only and not o.keeps_states]),
        _section(
            "Exact: hybrids, with layers that keep a state", [o for o in exact if not o.text_only and o.keeps_states]
        ),
        _section("Exact for text: models that also read images", [o for o in exact if o.text_only]),
        _section("Refused", refused),
        _section("Wrong, or fail while they run", wrong),
        "## Not known\n\n" + ", ".join(f"`{outcome.type}`" for outcome in unknown) + "\n" if unknown else "",
    ]
    return "\n".join(part for part in parts if part)


def _section(title: str, outcomes: list[Outcome]) -> str:
    if not outcomes:
        return ""
    reasons = any(outcome.why for outcome in outcomes)
    rows = [(f"`{o.type}`", PUBLISHED.get(o.type, ""), *([o.why] if reasons else [])) for o in outcomes]
    columns = ("type", "published as", *(["why"] if reasons else []))
    lines = [columns, ("---",) * len(columns), *rows]
    weak = ", ".join(f"`{o.type}`" for o in outcomes if o.state == "exact" and o.distinct < FEW)
    remark = (
        f"\nThe answers of {weak} hold fewer than {FEW} different tokens: their test says little.\n" if weak else ""
    )
    table = "".join(
        f"| {' | '.join(cell.replace('<', '&lt;').replace('|', '/') for cell in line)} |\n" for line in lines
    )
    return f"## {title}\n\n{table}{remark}"


PUBLISHED = {
    "afmoe": "Trinity",
    "apertus": "Apertus",
    "arcee": "AFM 4.5B",
    "aria": "Aria",
    "aya_vision": "Aya Vision",
    "bamba": "Bamba",
    "bart": "BART",
    "bitnet": "BitNet b1.58 2B4T",
    "bloom": "BLOOM",
    "cohere": "Command R, Aya 23",
    "cohere2": "Command R7B, Command A",
    "cohere2_vision": "Command A Vision",
    "ctrl": "CTRL",
    "cwm": "Code World Model",
    "dbrx": "DBRX",
    "deepseek_v2": "DeepSeek V2",
    "deepseek_v3": "DeepSeek V3, R1",
    "deepseek_v32": "DeepSeek V3.2",
    "deepseek_v4": "DeepSeek V4",
    "diffllama": "DiffLlama",
    "doge": "Doge",
    "dots1": "dots.llm1",
    "emu3": "Emu3",
    "ernie4_5": "ERNIE 4.5 0.3B",
    "ernie4_5_moe": "ERNIE 4.5 21B-A3B, 300B-A47B",
    "exaone4": "EXAONE 4",
    "exaone_moe": "K-EXAONE",
    "falcon": "Falcon 7B, 40B",
    "falcon_h1": "Falcon-H1",
    "falcon_mamba": "Falcon Mamba",
    "flex_olmo": "FlexOlmo",
    "fuyu": "Fuyu",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3 4B to 27B",
    "gemma3_text": "Gemma 3 270M, 1B",
    "gemma3n": "Gemma 3n",
    "gemma3n_text": "Gemma 3n, its text model",
    "gemma4": "Gemma 4",
    "gemma4_text": "Gemma 4, its text model",
    "glm": "GLM-4 9B, GLM-Edge",
    "glm4": "GLM-4-0414",
    "glm4_moe": "GLM-4.5, GLM-4.6",
    "glm4_moe_lite": "GLM-4.7-Flash",
    "glm4v": "GLM-4.1V",
    "glm4v_moe": "GLM-4.5V",
    "glm_moe_dsa": "GLM-5",
    "gpt2": "GPT-2",
    "gpt_bigcode": "StarCoder, SantaCoder",
    "gpt_neo": "GPT-Neo",
    "gpt_neox": "Pythia, GPT-NeoX",
    "gpt_oss": "gpt-oss 20B, 120B",
    "gptj": "GPT-J",
    "granite": "Granite 3",
    "granitemoe": "Granite 3 with experts",
    "granitemoehybrid": "Granite 4",
    "helium": "Helium",
    "hunyuan_v1_dense": "Hunyuan 0.5B to 7B",
    "hunyuan_v1_moe": "Hunyuan A13B",
    "idefics": "IDEFICS",
    "idefics2": "Idefics2",
    "idefics3": "Idefics3",
    "internvl": "InternVL 3",
    "jais2": "Jais 2",
    "jamba": "Jamba",
    "jetmoe": "JetMoE",
    "kimi_linear": "Kimi Linear 48B-A3B",
    "lfm2": "LFM2",
    "lfm2_moe": "LFM2 8B-A1B",
    "lfm2_vl": "LFM2-VL",
    "llama": "Llama 1 to 3.3, SmolLM2, TinyLlama",
    "llama4": "Llama 4",
    "llama4_text": "Llama 4, its text model",
    "llava": "LLaVA 1.5",
    "llava_next": "LLaVA 1.6",
    "llava_onevision": "LLaVA-OneVision",
    "longcat_flash": "LongCat-Flash",
    "mamba": "Mamba",
    "mamba2": "Mamba-2",
    "mimo_v2_flash": "MiMo-V2-Flash",
    "minicpm3": "MiniCPM3",
    "minimax": "MiniMax-Text-01, M1",
    "minimax_m2": "MiniMax M2",
    "ministral": "Ministral 8B",
    "mistral": "Mistral 7B, Nemo, Small 3",
    "mistral3": "Mistral Small 3.1 and 3.2, Ministral 3",
    "mixtral": "Mixtral 8x7B, 8x22B",
    "mllama": "Llama 3.2 Vision",
    "modernbert-decoder": "ModernBERT as a decoder",
    "moshi": "Moshi",
    "mpt": "MPT",
    "nanochat": "nanochat",
    "nemotron": "Nemotron-4, Minitron",
    "nemotron_h": "Nemotron-H, Nemotron Nano 2 and 3",
    "olmo": "OLMo",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "olmo_hybrid": "OLMo Hybrid",
    "olmoe": "OLMoE",
    "opt": "OPT",
    "ovis2": "Ovis2",
    "paligemma": "PaliGemma",
    "persimmon": "Persimmon",
    "phi": "Phi-1.5, Phi-2",
    "phi3": "Phi-3, Phi-4",
    "phi4_multimodal": "Phi-4-multimodal",
    "phimoe": "Phi-3.5-MoE",
    "qwen2": "Qwen 2, Qwen 2.5, QwQ",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen2_moe": "Qwen1.5-MoE, Qwen2 57B-A14B",
    "qwen2_vl": "Qwen2-VL",
    "qwen3": "Qwen 3",
    "qwen3_5": "Qwen 3.5, Qwen 3.6",
    "qwen3_5_moe": "Qwen 3.5 and 3.6 with experts (35B-A3B)",
    "qwen3_5_moe_text": "Qwen 3.5 with experts, its text model",
    "qwen3_5_text": "Qwen 3.5, its text model",
    "qwen3_moe": "Qwen 3 30B-A3B, 235B-A22B",
    "qwen3_next": "Qwen3-Next 80B-A3B",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_moe": "Qwen3-VL 30B-A3B, 235B-A22B",
    "recurrent_gemma": "RecurrentGemma",
    "rwkv": "RWKV-4",
    "seed_oss": "Seed-OSS 36B",
    "smollm3": "SmolLM3",
    "smolvlm": "SmolVLM",
    "solar_open": "Solar Open 100B",
    "stablelm": "StableLM",
    "starcoder2": "StarCoder2",
    "vaultgemma": "VaultGemma",
    "vipllava": "ViP-LLaVA",
    "whisper": "Whisper's decoder alone; whole models are refused",
    "xlstm": "xLSTM 7B",
    "youtu": "Youtu-LLM",
    "zamba": "Zamba",
    "zamba2": "Zamba2",
}
DECODERS = (
    "bert bert-generation camembert data2vec-text electra ernie roberta roberta-prelayernorm roc_bert xlm-roberta"
)
PUBLISHED |= dict.fromkeys([*DECODERS.split(), "xlm-roberta-xl"], "decoders alone (`is_decoder`); others are refused")


if __name__ == "__main__":
    PAGE.write_text(page(read_results(RESULTS)), encoding="utf-8")
