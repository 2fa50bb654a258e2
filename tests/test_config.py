"""Settings: where they come from, what they may be, and what is said when they are wrong."""

from __future__ import annotations

import os
import re
import shlex
from typing import Any, Literal, get_args, get_origin

import pytest
import typer
import yaml
from typer.testing import CliRunner

from bmx.cli.commands import app
from bmx.cli.help import EXAMPLES
from bmx.cli.reference import PAGE, reference
from bmx.compress.policy import CompressionPolicy
from bmx.config import EngineConfig
from bmx.engine.arguments import gather_settings
from bmx.errors import UsageError
from bmx.job.fingerprint import differences, fingerprint
from bmx.methods import METHODS
from bmx.run_config import SECTIONS, RunConfig, all_settings, given_settings, setting_named
from bmx.settings import COMMANDS, DecidesAnswers, Setting, settings_in

GUIDE = PAGE.with_name("guide.md")
SETTINGS = all_settings()
OWN = [setting for setting in SETTINGS if setting.name != "method"]  # which stands for others


@pytest.fixture(autouse=True)
def _no_settings_of_the_developer(monkeypatch):
    for name in os.environ:
        if name.startswith("BMX_"):
            monkeypatch.delenv(name)


@pytest.fixture
def config_file(tmp_path):
    """Writes a config file and returns its path."""

    def write(text: str | bytes) -> str:
        path = tmp_path / "bmx.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def printed(*args: str, env: dict[str, str] | None = None) -> str:
    """What ``bmx run --print-config`` says."""
    result = CliRunner().invoke(app, ["run", "in.jsonl", "--print-config", *args], env=env, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def shown(*args: str, env: dict[str, str] | None = None) -> dict[str, Any]:
    """The settings in force."""
    return yaml.safe_load(printed(*args, env=env))


def gather(**given: Any) -> dict[str, Any]:
    """The settings in force when these are given."""
    return RunConfig.of(("in.jsonl",), given_settings(given)).flat()


def flag(name: str) -> str:
    """A setting's flag."""
    return f"--{name.replace('_', '-')}"


# Order


@pytest.mark.parametrize(
    ("name", "default", "in_file", "in_environment", "as_flag"),
    [
        ("max_tokens", 256, 1, 2, 3),
        ("temperature", 0.0, 0.1, 0.2, 0.3),
        ("kv_policy", "average-attention", "none", "far-attention", "none"),
        ("kv_budget", 2048, 0.25, 700, 0.5),
        ("kv_layer_budgets", "uniform", "pyramid", "uniform", "pyramid"),
        ("model", "demo", "./one", "./two", "./three"),
        ("system_prompt", None, "one", "two", "three"),
        ("stop", [], ["one"], ["two"], ["three"]),
        ("stop_token_ids", [], [1], [2], [3]),
        ("max_num_seqs", None, 1, 2, 3),
    ],
)
def test_a_flag_wins_over_the_environment_over_the_file_over_the_default(
    config_file, name, default, in_file, in_environment, as_flag
):
    def text(value: Any) -> str:
        return str(value[0] if isinstance(value, list) else value)

    file = ["--config", config_file(yaml.safe_dump({name: in_file}))]
    env = {f"BMX_{name.upper()}": text(in_environment)}
    assert shown()[name] == default
    assert shown(*file)[name] == in_file
    assert shown(*file, env=env)[name] == in_environment
    assert shown(*file, flag(name), text(as_flag), env=env)[name] == as_flag


def test_switches_can_be_turned_off_again(config_file):
    file = ["--config", config_file("chat_template: true\noverwrite: true")]
    assert shown(*file)["chat_template"] is True
    assert shown(*file, "--no-chat-template")["chat_template"] is False
    assert shown("--chat-template", env={"BMX_CHAT_TEMPLATE": "false"})["chat_template"] is True
    assert shown(*file, env={"BMX_OVERWRITE": "false"})["overwrite"] is False
    assert shown("--overwrite", env={"BMX_OVERWRITE": "0"})["overwrite"] is True


def test_a_flag_that_may_be_repeated_keeps_all_its_values():
    assert shown("--stop", "a b", "--stop", "\n", "--stop", "ü")["stop"] == ["a b", "\n", "ü"]


def test_the_config_file_itself_may_come_from_the_environment(config_file):
    assert shown(env={"BMX_CONFIG": config_file("seed: 5")})["seed"] == 5


def sample(setting: Any) -> Any:
    """A value that a setting takes and that is not its default."""
    special: dict[str, Any] = {
        "shard": "2/3",
        "kv_policy": "h2o",
        "kv_layer_budgets": "pyramid",
        "kv_format": "fp8",
        "kv_share_layers": "7:3",
        "kv_recall": "pages",
        "kv_recall_pairs": 1500,
        "chat_template_kwargs": '{"enable_thinking": false}',
        "json_schema": '{"type":"object"}',
    }
    special |= {"kv_budget": 2000, "kv_probe_weight": 0.25}  # more than kv_sink and kv_recent; not the default
    special |= {"memory_limit": 8 * 10**9, "kv_cache_memory": 3 * 10**8}
    if setting.name in special:
        return special[setting.name]
    if get_origin(setting.type) is Literal:
        return next(word for word in get_args(setting.type) if word != setting.default)
    samples = {bool: not setting.default, int: 600, float: 0.5, str: "text", tuple: ["7"]}
    kind = get_origin(setting.type) if get_origin(setting.type) is tuple else setting.type
    kind = next((t for t in get_args(setting.type) if t is not type(None)), kind) if kind is not tuple else kind
    return samples[kind]


def typed(name: str, value: Any, word: str) -> list[str]:
    """A setting as it is typed on the command line."""
    if isinstance(value, bool):
        return [flag(name) if value else f"--no{flag(name)[1:]}"]
    return [flag(name), word]


@pytest.mark.parametrize("turn", range(3))
def test_every_setting_is_a_flag_a_variable_and_a_yaml_key(config_file, turn):
    later = {"retry_failed": 1, "verbose": 1, "set_aside": 1}  # not together with --overwrite, --quiet
    later |= {"guided_regex": 1, "guided_choice": 2}  # not together with --json-schema
    later |= {"tensor_parallel_size": 1}  # not together with --quantization
    values = {s.name: sample(s) for s in OWN if later.get(s.name, 0) == turn}
    words = {name: value[0] if isinstance(value, list) else str(value) for name, value in values.items()}
    as_flags = shown(*(word for name in values for word in typed(name, values[name], words[name])))
    as_variables = shown(env={f"BMX_{name.upper()}": word for name, word in words.items()})
    as_keys = shown("--config", config_file(yaml.safe_dump(values)))
    assert as_flags == as_variables == as_keys
    defaults = shown()
    assert {name for name in defaults if as_flags[name] != defaults[name]} == set(values)
    assert list(defaults) == [setting.name for setting in OWN]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--overwrite", "--retry-failed"), "--retry-failed"),
        (("-q", "-v"), "--verbose"),
        (("--system-prompt", "\udcff"), "UTF-8"),
        (("--prompt-template", "{a} \ud800"), "UTF-8"),
        (("--shard", "0/3"), "shard"),
        (("--shard", "4/3"), "shard"),
        (("--shard", "1"), "2/8"),
        (("--max-errors", "-1"), "max_errors"),
        (("--row-timeout", "0"), "row_timeout"),
        (("--row-timeout", "soon"), "5m"),
        (("--lock-wait", "-1"), "lock_wait"),
        (("--max-line-bytes", "0"), "max_line_bytes"),
    ],
)
def test_what_contradicts_itself_or_makes_no_sense_is_refused(bmx, args, said):
    ended = bmx("run", "in.jsonl", "--print-config", *args)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err


@pytest.mark.parametrize(("text", "seconds"), [("30", 30), ("0.5", 0.5), ("90s", 90), ("5m", 300), ("2 h", 7200)])
def test_times_have_units(text, seconds):
    assert shown("--row-timeout", text)["row_timeout"] == seconds


# Help


def help_of(*args: str, columns: int = 80, **env: str) -> str:
    """What ``bmx ... --help`` prints in a terminal of so many columns."""
    result = CliRunner().invoke(app, [*args, "--help"], env={"COLUMNS": str(columns), **env}, prog_name="bmx")
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_setting_has_a_help_text():
    words = " ".join(help_of("run").split())
    for setting in SETTINGS:
        assert flag(setting.name) in words
        assert setting.help in words


def test_each_command_takes_the_settings_that_say_so():
    for command in COMMANDS:
        flags = set(re.findall(r"--[a-z-]+", "".join(re.findall(r"(?m)^  .{2}  --.*", help_of(command)))))
        assert {s.flag for s in SETTINGS if command in s.commands and not s.short} == flags & {s.flag for s in SETTINGS}
        assert {s.flag for s in SETTINGS if command in s.commands} <= set(re.findall(r"--[a-z-]+", help_of(command)))


@pytest.mark.parametrize("command", ["", *COMMANDS, "env"])
@pytest.mark.parametrize("columns", [80, 100, 200])
def test_t1_help_fits_the_terminal_and_has_examples_and_exit_codes(command, columns):
    lines = help_of(*filter(None, [command]), columns=columns).splitlines()
    assert max(map(len, lines)) <= min(columns, 100)
    assert lines[0].startswith(f"Usage: bmx {command}".rstrip())
    assert [line.isprintable() for line in lines] == [True] * len(lines)
    examples = lines[lines.index("Examples:") + 1 :][:2]
    assert all(line.startswith("  bmx ") for line in examples)
    assert ("Exit codes:" in lines) == bool(command)
    assert ("Environment variables:" in lines) == (command in COMMANDS)
    assert all("…" not in line for line in lines)


@pytest.mark.parametrize("line", [line for lines in EXAMPLES.values() for line in lines])
def test_t1_every_example_is_a_command_line_that_bmx_takes(line):
    _, name, *args = shlex.split(line.split(">", maxsplit=1)[0])
    assert typer.main.get_command(app).commands[name].make_context(name, args) is not None


def test_t1_the_front_page_is_short_and_names_every_command():
    page = help_of()
    assert len(page.splitlines()) <= 35
    assert all(re.search(rf"(?m)^  {command} ", page) for command in (*COMMANDS, "env"))
    assert "--install-completion" in page
    assert CliRunner().invoke(app, [], env={"COLUMNS": "80"}).stdout == page


def test_t1_choices_are_listed_as_they_are_typed_and_values_say_their_unit():
    text = help_of("run")
    for setting in SETTINGS:
        if setting.choices:
            assert re.search(rf"{setting.flag} {re.escape('|'.join(setting.choices))}(?m:$| )", text)
    for words in ("--memory-limit BYTES", "--max-tokens TOKENS", "--row-timeout SECONDS", "--stats-file FILE"):
        assert words in text
    assert {"(default 256)", "(default 16M)", "(default on)"} <= set(
        re.findall(r"\(default \w+\)", " ".join(text.split()))
    )
    assert not re.search(r"<(str|int|bool|float|list)", text)
    assert text.index("Job:") < text.index("Prompts:") < text.index("Job, rarely needed:")


@pytest.mark.parametrize(("command", "default"), [("calibrate", "<input>.calibration.json"), ("bench", "bench.json")])
def test_t1_an_output_is_described_as_the_commands_own(command, default):
    about = help_of(command).split("-o, --output-file FILE")[1].split("      --")[0]
    assert f"Where the measurements go (default {default})" in " ".join(about.split())


@pytest.mark.parametrize("command", ["", *COMMANDS, "env"])
def test_t1_h_is_help(command):
    words = [*filter(None, [command])]
    assert CliRunner().invoke(app, [*words, "-h"], env={"COLUMNS": "80"}).stdout == help_of(*words)


def test_t1_a_shell_completes_commands_flags_and_choices():
    def completed(line: str) -> list[str]:
        env = {"_BMX_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
        return CliRunner().invoke(app, [], env=env, prog_name="bmx").stdout.split()

    assert {"run", "plan-batch"} <= set(completed("bmx "))
    assert completed("bmx run --kv-bud") == ["--kv-budget"]
    assert completed("bmx run --kv-protect ") == ["none", "instructions"]


@pytest.mark.parametrize(
    ("args", "said", "hint"),
    [
        (("run", "in.jsonl", "--max-token", "5"), "no such option", "bmx run -h"),
        (("run",), "missing argument 'INPUT...'", "bmx run -h"),
        (("walk",), "no such command 'walk'", "bmx -h"),
        (("--nope",), "no such option", "bmx -h"),
    ],
)
def test_t1_a_command_line_that_cannot_be_read_is_an_error_and_a_hint(bmx, args, said, hint):
    ended = bmx(*args)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.complaint[0]
    assert ended.complaint[1] == f"hint: {hint} shows what it takes"


# Paths and texts in files


@pytest.mark.parametrize("name", sorted(setting.name for setting in SETTINGS if setting.is_path))
def test_e_a_path_may_begin_with_the_home_folder_wherever_it_comes_from(config_file, monkeypatch, name):
    monkeypatch.setenv("HOME", "/home/somebody")
    expected = "/home/somebody/x"
    assert shown(f"{flag(name)}=~/x")[name] == expected
    assert shown(env={f"BMX_{name.upper()}": "~/x"})[name] == expected
    assert shown("--config", config_file(f"{name}: ~/x"))[name] == expected


def test_e_the_config_file_itself_may_lie_in_the_home_folder(config_file, monkeypatch):
    path = config_file("seed: 7")
    monkeypatch.setenv("HOME", os.path.dirname(path))
    assert shown("--config=~/bmx.yaml")["seed"] == 7


@pytest.mark.parametrize("name", ["system_prompt", "prompt_template"])
def test_t2_a_text_may_be_read_from_a_file(config_file, tmp_path, monkeypatch, name):
    (tmp_path / "text").write_bytes("Übersetze:\r\n\\nabla {document}\r\n".encode())
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = "Übersetze:\n\\nabla {document}"
    for path in (f"@{tmp_path}/text", "@~/text"):
        assert gather(**{name: path})[name] == expected
        assert shown(flag(name), path)[name] == expected if name == "system_prompt" else True
    assert gather(**{name: "@@home {document}"})[name] == "@home {document}"
    text = printed(flag(name), "@@home {document}")
    assert printed("--config", config_file(text)) == text
    with pytest.raises(UsageError, match=r"cannot read the file of --.* nowhere: No such file") as error:
        gather(**{name: "@nowhere"})
    assert error.value.hint == "a text that begins with @ is written @@"


def test_the_reference_page_is_that_of_the_settings():
    assert PAGE.read_text(encoding="utf-8") == reference(), "python -m bmx.cli.reference writes it"


# What is declared about a setting


def test_every_field_of_a_section_says_whether_it_decides_answers():
    for section in SECTIONS.values():
        for setting in settings_in(section):
            assert isinstance(setting.decides_answers, DecidesAnswers)
    with pytest.raises(TypeError, match="decides_answers"):
        Setting("Something new")


@pytest.mark.parametrize("name", sorted({s.name for s in SETTINGS if s.decides_answers is DecidesAnswers.IF_TRUE}))
def test_a_setting_that_decides_answers_when_it_is_on_leaves_fingerprints_alone_when_it_is_off(name):
    given = {"model": "fake", "prompt_template": "{x}"}
    off, on = (fingerprint(RunConfig.of(("x",), given_settings(given | {name: value}))) for value in (False, True))
    assert name not in off
    assert on == off | {name: True}
    assert differences(on, off) == f"{name} was true, is false"


# --print-config


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("--stop", "\n\n", "--stop", "😀 'x': {y}", "--prompt-template", "A:\\n{a}\n{{}}", "--system-prompt", " # no"),
        ("--memory-limit", "8GiB", "--max-model-len", "32k", "--kv-policy", "none", "--no-chat-template"),
        ("--model", "yes", "--system-prompt", "null", "--revision", "007", "--temperature", "1e-3", "-o", "-"),
    ],
)
def test_the_printed_config_is_a_config_file_that_says_the_same(config_file, args):
    text = printed(*args)
    assert printed("--config", config_file(text)) == text


# Wrong names


@pytest.mark.parametrize(
    ("name", "meant"), [("max_token", "max_tokens"), ("kv_buget", "kv_budget"), ("chunksize", "chunk_size")]
)
def test_an_unknown_setting_is_refused_with_the_one_that_was_probably_meant(config_file, name, meant):
    with pytest.raises(UsageError, match=name) as error:
        RunConfig.of((), given_settings({}, config_file(f"{name}: 5")))
    assert error.value.hint == f"did you mean {meant!r}?"


@pytest.mark.parametrize("text", ["zzzzzz: 1", "inputs: [a.jsonl]", "1: 2", "engine: {model: demo}"])
def test_an_unknown_setting_is_refused(config_file, text):
    with pytest.raises(UsageError, match="unknown setting"):
        RunConfig.of((), given_settings({}, config_file(text)))


@pytest.mark.parametrize("text", ["seed: 1\nseed: 2", "seed: 1\nseed: 1", "kv_budget: 100\nkv-budget: 200"])
def test_a_setting_given_twice_is_refused(config_file, text):
    with pytest.raises(UsageError, match="twice"):
        RunConfig.of((), given_settings({}, config_file(text)))


@pytest.mark.parametrize(
    "text",
    [
        "- seed",
        "seed",
        "5",
        "false",
        "seed: [",
        "seed: 1\n---\nseed: 2",
        "seed: !!python/object/apply:os.getcwd []",
        b"seed: \xff",
        b"\x00",
        "? [a]\n: 1",
        "#" * 1_000_001,
    ],
    ids=lambda text: repr(text[:20]),
)
def test_a_file_that_is_no_flat_yaml_is_refused(config_file, text):
    with pytest.raises(UsageError, match="config file"):
        RunConfig.of((), given_settings({}, config_file(text)))


def test_a_config_file_that_is_missing_or_a_folder_is_refused(tmp_path):
    for path in (tmp_path / "missing.yaml", tmp_path):
        with pytest.raises(UsageError, match="cannot read config file"):
            RunConfig.of((), given_settings({}, str(path)))


def test_a_config_file_that_is_too_large_is_refused_for_that(config_file):
    with pytest.raises(UsageError, match="is larger than 1,000,000 bytes") as error:
        RunConfig.of((), given_settings({}, config_file("#" * 1_000_001)))
    assert "YAML" not in error.value.message


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "kv-budget: 500\n", "\ufeffkv_budget: 500\r\n", "{kv_budget: 500}"]
)
def test_unusual_but_valid_files_are_read(config_file, text):
    expected = 500 if "500" in text else 2048
    assert RunConfig.of((), given_settings({}, config_file(text))).engine.kv_budget == expected


# Wrong types


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", "many"),
        ("max_tokens", 1.5),
        ("max_tokens", None),
        ("max_tokens", [5]),
        ("max_tokens", True),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", [0.5]),
        ("temperature", 10**400),
        ("overwrite", "yes"),
        ("overwrite", 1),
        ("overwrite", None),
        ("model", True),
        ("model", None),
        ("revision", 7),
        ("model", ["a"]),
        ("system_prompt", {"a": "b"}),
        ("progress", "loud"),
        ("progress", None),
        ("dtype", 16),
        ("stop", None),
        ("stop", 5),
        ("stop", {"a": "b"}),
        ("stop", [None]),
        ("stop", [["a"]]),
        ("stop_token_ids", "x"),
        ("stop_token_ids", [1.5]),
        ("stop_token_ids", [True]),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_value_of_the_wrong_type_is_refused_and_named(config_file, name, value):
    with pytest.raises(UsageError, match=name):
        RunConfig.of((), given_settings({}, config_file(yaml.safe_dump({name: value}))))


@pytest.mark.parametrize("name", ["max_tokens", "model", "stop", "kv_budget"])
def test_a_bomb_of_yaml_anchors_is_refused_in_a_short_line(config_file, name):
    levels = "".join(f"&a{i} [{f'*a{i - 1}, ' * 10}], " for i in range(1, 5))
    with pytest.raises(UsageError, match="alias") as error:
        RunConfig.of((), given_settings({}, config_file(f"{name}: [&a0 [boom], {levels}]")))
    assert len(error.value.message) < 500


# Sizes and counts


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("300M", 300_000_000),
        ("8G", 8_000_000_000),
        ("8GB", 8_000_000_000),
        ("8GiB", 8 * 2**30),
        ("8gi", 8 * 2**30),
        ("8 GiB", 8 * 2**30),
        ("1.5g", 1_500_000_000),
        ("1500k", 1_500_000),
        ("2TiB", 2 * 2**40),
        ("4096000", 4_096_000),
        (4_096_000, 4_096_000),
    ],
)
def test_sizes_are_powers_of_ten_or_with_an_i_of_two(text, size):
    assert gather(memory_limit=text)["memory_limit"] == size
    assert gather(kv_cache_memory=text)["kv_cache_memory"] == size


@pytest.mark.parametrize(
    "text",
    ["", "0", 0, "0G", -1, "-1G", "8X", "G", "8GG", "8 G B", "1e9", "nan", "inf", "0x10", "0.5", True, "9" * 400],
)
def test_a_size_that_is_none_is_refused(text):
    with pytest.raises(UsageError, match="memory_limit"):
        gather(memory_limit=text)


@pytest.mark.parametrize(
    ("text", "shown", "meant"),
    [
        ("8", "8 bytes", "8G"),
        (24, "24 bytes", "24G"),
        ("1", "1 byte", "1G"),
        ("300", "300 bytes", "300M"),
        ("1.5k", "1,500 bytes", "1.5G"),
        ("16kb", "16,000 bytes", "16G"),
        ("999999", "999,999 bytes", ""),
    ],
)
@pytest.mark.parametrize("name", ["memory_limit", "kv_cache_memory"])
def test_t3_a_memory_of_less_than_a_megabyte_has_lost_its_unit(name, text, shown, meant):
    with pytest.raises(UsageError, match=f"{name} cannot be {shown}") as error:
        gather(**{name: text})
    assert error.value.hint.startswith(f"did you mean {meant}?" if meant else "sizes are written like 300M")


def test_a_line_may_be_shorter_than_any_memory():
    assert gather(max_line_bytes="2k")["max_line_bytes"] == 2000


@pytest.mark.parametrize(
    ("text", "count"), [("4096", 4096), (4096, 4096), ("32k", 32_000), ("32K", 32_768), ("1.5k", 1500), (" 7 ", 7)]
)
def test_counts_know_k_and_large_k(text, count):
    assert gather(max_model_len=text)["max_model_len"] == count
    assert gather(limit=text)["limit"] == count


@pytest.mark.parametrize(
    "text", ["", "0", 0, -1, "1.5", 0.5, "k", "32m", "1e3", "nan", "inf", True, "1_000", "9" * 400, "9" * 400 + "k"]
)
def test_a_count_that_is_none_is_refused(text):
    with pytest.raises(UsageError, match="limit"):
        gather(limit=text)


# Ranges


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gpu_memory_utilization", 0),
        ("gpu_memory_utilization", 1.01),
        ("gpu_memory_utilization", float("nan")),
        ("kv_sink", -1),
        ("kv_recent", 0),
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 2.01),
        ("top_p", -0.1),
        ("top_p", 1.01),
        ("top_k", -2),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("stop", ""),
        ("stop", ["a"] * 1000),
        ("seed", 2**63),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_value_out_of_range_is_refused_and_named(name, value):
    with pytest.raises(UsageError, match=name):
        gather(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("gpu_memory_utilization", 1), ("temperature", 0), ("top_p", 1), ("top_k", 0), ("min_p", 1), ("kv_sink", 0)],
)
def test_the_ends_of_ranges_are_allowed(name, value):
    assert gather(**{name: value})[name] == value


def test_a_budget_without_room_beside_sinks_and_recent_tokens_is_refused():
    with pytest.raises(UsageError, match="kv_budget 36 leaves no room"):
        gather(kv_budget=36)
    assert gather(kv_budget=37)["kv_budget"] == 37
    assert gather(kv_budget=36, kv_policy="none")["kv_budget"] == 36


def test_a_step_smaller_than_a_chunk_is_refused():
    with pytest.raises(UsageError, match="chunk_size 512"):
        gather(max_num_batched_tokens=511)
    assert gather(max_num_batched_tokens=511, chunk_size=511)["chunk_size"] == 511


# ---- methods: several settings by one name ----


def test_every_method_is_valid_settings_in_their_own_types():
    for name, own in METHODS.items():
        assert {setting: setting_named(setting).coerce(value) for setting, value in own.items()} == own
        config = RunConfig.of(("in.jsonl",), given_settings({"method": name}))
        assert {setting: getattr(config.engine, setting) for setting in own} == own
        CompressionPolicy.from_config(config.engine)


def test_a_method_is_its_settings_from_wherever_it_is_given(config_file):
    expected = shown("--kv-policy", "none", "--kv-format", "int2")
    assert shown("--method", "kivi") == expected
    assert shown("--method", "KIVI") == expected
    assert shown(env={"BMX_METHOD": "Kivi"}) == expected
    assert shown("--config", config_file("method: kivi")) == expected
    assert shown("--method", "kivi", "--config", config_file("method: h2o")) == expected
    assert gather_settings("demo", None, {"method": "kivi"})[0] == EngineConfig(kv_policy="none", kv_format="int2")
    assert "method" not in expected


def test_a_method_and_its_settings_resume_each_other():
    by_name, by_hand = (
        RunConfig.of(("x",), given_settings({"model": "fake"} | given))
        for given in ({"method": "pyramidkv"}, {"kv_policy": "window", "kv_layer_budgets": "pyramid"})
    )
    assert fingerprint(by_name) == fingerprint(by_hand)
    assert by_name.given == by_hand.given


@pytest.mark.parametrize("told", ["average-attention", "keydiff"])
def test_a_setting_that_contradicts_the_method_is_refused_a_default_that_was_typed_too(told, config_file):
    said = f"method snapkv sets kv_policy to window; it was given as {told}"
    with pytest.raises(UsageError, match=said):
        gather(method="snapkv", kv_policy=told)
    with pytest.raises(UsageError, match=said):
        given_settings({"method": "snapkv"}, config_file(f"kv_policy: {told}"))
    with pytest.raises(UsageError, match=said):
        gather_settings("demo", None, {"method": "snapkv", "kv_policy": told})


def test_settings_that_a_method_does_not_name_or_names_alike_stay():
    settings = gather(method="SnapKV", kv_policy="window", kv_budget="25%", kv_format="model")
    assert (settings["kv_policy"], settings["kv_budget"], settings["kv_format"]) == ("window", 0.25, "model")
    assert gather(method="vatp", kv_policy="h2o")["kv_policy"] == "h2o"


def test_an_unknown_method_is_refused_with_the_list_of_the_known_ones():
    with pytest.raises(UsageError, match="method cannot be 'snapvk'") as refused:
        gather(method="snapvk")
    assert refused.value.hint == f"it takes one of {', '.join(METHODS)}"
    assert list(METHODS) == sorted(METHODS)


def test_the_guide_s_table_has_what_each_method_sets():
    table = re.findall(
        r"^\| `([a-z0-9-]+)` \| [^|]+ \| (`kv_[^|]+) \|", GUIDE.read_text(encoding="utf-8"), re.MULTILINE
    )
    written = {name: yaml.safe_load("\n".join(re.findall("`([^`]+)`", row))) for name, row in table}
    assert written == {name: dict(own) for name, own in METHODS.items()}
    assert list(written) == list(METHODS)


def test_the_full_cache_of_an_engine_is_in_the_model_s_own_type_as_on_the_command_line():
    assert gather_settings("demo", None, {"kv_policy": "none"})[0].kv_format == "model"
    assert gather_settings(EngineConfig(kv_format="int8"), None, {"kv_policy": "none"})[0].kv_format == "int8"
