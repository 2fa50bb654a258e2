"""Prompt templates: Jinja, names of fields that no row has, and what is data in a row that a template fills."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bmx.errors import RowError, UsageError
from bmx.jinja_template import jinja_template, parse_template
from bmx.model.instructions import Instructions
from bmx.prompt_config import PromptConfig
from bmx.run_config import given_settings

IN, OUT = Path("in.jsonl"), Path("in.out.jsonl")


@pytest.fixture
def run(bmx):
    """``bmx run`` of rows with the fake model."""

    def call(rows: list[dict[str, Any]], *flags: Any) -> Any:
        IN.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return bmx("run", IN, "-m", "fake", *flags)

    return call


def failed(template: str, **row: Any) -> str:
    with pytest.raises(RowError) as error:
        jinja_template(template).filled(row)
    return error.value.message


# Jinja


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("{{ title }}: {{ year }}", "T: 2024"),
        ("{% for page in pages %}\n{{ loop.index }}. {{ page }}\n{% endfor %}\nEnd", "1. a\n2. b\nEnd"),
        ("{% for page in pages %}{% if page == 'b' %}{% break %}{% endif %}{{ page }}{% endfor %}", "a"),
        ("{% if notes %}Notes: {{ notes }}{% else %}none{% endif %}", "none"),
        ("{{ notes or 'nothing' }}", "nothing"),
        ("{{ pages }} {{ good }} {{ deep }}", '["a", "b"] true {"ß": 1}'),
        ("{{ deep | tojson }} {{ deep.ß }}", '{"ß": 1} 1'),
        ("{{ more | default('-') }}{% if more is defined %}{{ more }}{% endif %}", "-"),
        ('{{ row["my column"] }} {"a": 1}', 'x {"a": 1}'),
        ("  {% if title %}\n  {{ title }}\n  {% endif %}\nEnd\n", "  T\nEnd\n"),
        ("{{ markup }}", "<b> {{ title }}"),
        ("{{ pages | map('upper') | list }} {{ (1, title) }}", '["A", "B"] [1, "T"]'),
    ],
)
def test_a_jinja_template_is_filled_from_the_fields_of_the_row(template, prompt):
    row = {"title": "T", "year": 2024, "pages": ["a", "b"], "notes": None, "good": True, "deep": {"ß": 1}}
    more = {"my column": "x", "markup": "<b> {{ title }}"}
    assert parse_template(template, jinja=True).filled(row | more) == prompt


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("\n{{ titel }}", "line 2: 'titel' is undefined; the row has 'title', 'zero'"),
        ("{% if more %}{% endif %}", "'more' is undefined"),
        ("{{ title.author }}", "no attribute 'author'"),
        ("\n\n{{ 1 / zero }}", "line 3: division by zero"),
        ("{{ title + 1 }}", "can only concatenate str"),
        ("{{ none_given }}", "the row has 'title', 'zero', and null: 'none_given'"),
        ("{{ raise_exception('no such title') }}", "line 1: no such title"),
        ("{{ title.__class__.__mro__ }}", "unsafe"),
        ("{% for i in range(100000) %}{{ 'w' * 99 }}{% endfor %}", "it prints 9,900,000 characters"),
        ("{{ 'w' * 10 ** 12 }}", "MB of memory"),
        ("{{ row.items }}", "it prints a builtin_function_or_method, which is no text"),
        ("{{ 'ab' | map('upper') }}", "it prints a generator, which is no text (x | list"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "range"),
    ],
)
def test_what_goes_wrong_in_a_template_is_the_rows_error_and_has_its_line(template, said):
    assert said in failed(template, title="T", zero=0, none_given=None)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% if x %}", "line 1: Unexpected end of template"),
        ("a\n{{ x", "line 2: unexpected end"),
        ("{{ x | shout }}", "No filter named 'shout'"),
        ("{% include 'other.jinja' %}", "includes another file"),
    ],
)
def test_a_jinja_template_that_cannot_be_read_is_refused_with_its_line(template, said):
    with pytest.raises(UsageError, match=f"prompt_template.*{said}"):
        jinja_template(template)


@pytest.mark.parametrize("name", ["t.jinja", "t.j2", "t.jinja2"])
def test_a_file_of_jinja_is_known_by_its_name_from_flags_and_yaml(tmp_path, name):
    file, config = tmp_path / name, tmp_path / "bmx.yaml"
    file.write_text("{{ title }}\\n\n")
    config.write_text(f'prompt_template: "@{file}"\n')
    for given in (given_settings({"prompt_template": f"@{file}"}), given_settings({}, str(config))):
        assert (given["jinja"], given["prompt_template"]) == (True, "{{ title }}\\n")
    assert "jinja" not in given_settings({"prompt_template": f"@@{file}"})


def test_jinja_decides_answers_and_is_shown_with_the_settings(run, bmx):
    Path("t.jinja").write_text("{{ title }}")
    assert run([{"id": 1, "title": "w1"}], "--prompt-template", "@t.jinja").code == 0
    shown = bmx("run", IN, "--prompt-template", "@t.jinja", "--print-config")
    assert "prompt_template: '{{ title }}'\njinja: true\n" in shown.out
    assert bmx("run", IN, "-m", "fake", "--prompt-template", "{{ title }}", "--jinja").code == 0
    assert bmx("run", IN, "-m", "fake", "--prompt-template", "{title}").code == 2


def test_jinja_without_a_template_is_refused(run):
    ended = run([{"title": "w1"}], "--jinja")
    assert ended.code == 2
    assert "no prompt template" in ended.err


@pytest.mark.parametrize(
    ("template", "before", "after"),
    [
        ("Read:\n{{ text }}\nSum up.", "Read:", "Sum up."),
        ("{% set n = 3 %}\nRead: {% for page in pages %}- {{ page }}{% endfor %} Sum up.", "Read:", "Sum up."),
        ("{{ text }} or {{ text }}", "", ""),
        ("{% if text %}{{ text }}{% endif %} Sum up.", "", "Sum up."),
    ],
)
def test_the_instructions_of_a_jinja_template_are_its_text_before_and_after_all_else(template, before, after):
    found = Instructions.from_config(PromptConfig(prompt_template=template, jinja=True))
    assert (found.before, found.after) == (before, after)


# Names that no row has

ROWS = [{"id": number, "title": "w1", "body": "w2"} for number in range(3)]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--prompt-template", "{titel}"), ("prompt_template names 'titel'", "did you mean 'title'?", "'body'")),
        (("--prompt-template", "{{ titel }}{{ x | d('') }}", "--jinja"), ("names 'titel', which", "mean 'title'?")),
        (
            ("--prompt-template", "{{ row['titel'] }}{{ row['x'] | d('') }}", "--jinja"),
            ("names 'titel', which", "'title'?"),
        ),
        (
            ("--prompt-template", "{{ row.titel }}{% if row.x is defined %}{% endif %}", "--jinja"),
            ("names 'titel', which",),
        ),
        (("--id-field", "titel"), ("id_field names 'titel'", "did you mean 'title'?")),
        (("--keep-fields", "title,urls"), ("keep_fields names 'urls'", "the rows have 'id', 'title', 'body'")),
        (("--prompt-template", '{"text": "x"} {title}'), ("write {{ and }}", ".jinja")),
        (("--prompt-template", '{"deep": {"text": "x"}} {title}'), ("write {{ and }}", ".jinja")),
        (("--prompt-template", "{% if title %}{title}"), ("write {{ and }}", ".jinja")),
        (("--prompt-template", "{{title}}"), ("single braces", "--jinja")),
        (("--prompt-template", "Hello"), ("no field", "--constant-prompt")),
        (("--prompt-template", "Hello", "--jinja"), ("no field", "{{ document }}", "--constant-prompt")),
    ],
)
@pytest.mark.parametrize("command", ["run", "plan-batch", "calibrate"])
def test_d4_a_name_that_no_row_has_ends_the_command_before_a_model_is_loaded(run, bmx, command, flags, said):
    if command != "run" and "--keep-fields" in flags:
        return
    IN.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    ended = bmx(command, IN, "-m", "no/such-model", *flags)
    assert ended.code == 2
    for words in said:
        assert words in " ".join(ended.err.split())
    assert not OUT.exists()


def test_d4_a_field_that_some_of_the_first_rows_have_is_no_mistake(run):
    rows = [*ROWS, {"id": "last", "title": "w1", "note": "w3"}]
    ended = run(rows, "--prompt-template", "{{ title }}{{ note }}", "--jinja")
    assert (ended.code, len(OUT.read_text().splitlines())) == (3, 1)


def test_d4_each_file_is_looked_at_and_rows_of_requests_need_no_field(run, bmx):
    IN.write_text('{"id": 1, "messages": [{"role": "user", "content": "w1"}], "x": 1}\n' * 1)
    Path("more.jsonl").write_text('{"id": 2, "title": "w1"}\n')
    assert bmx("run", IN, "more.jsonl", "-m", "fake", "--prompt-template", "{title}").code == 0
    assert bmx("run", IN, "-m", "fake", "--prompt-template", "{title}", "-o", "one.jsonl").code == 0


def test_a_constant_prompt_may_be_asked_for(run):
    flags = ("--prompt-template", "w1 w2", "--constant-prompt", "--temperature", 1)
    assert run(ROWS, *flags).code == 0
    assert len(OUT.read_text().splitlines()) == 3
