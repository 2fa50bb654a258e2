"""Names of fields that the settings give: each is looked for in the first rows, before a model is loaded.

Knows settings and names; knows nothing of what the fields hold.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from bmx.errors import UsageError
from bmx.job.input_rows import ALL_FIELDS, Reader
from bmx.job.row_checks import SAMPLING_FIELDS
from bmx.prompt_template import LITERAL_BRACES, PromptTemplate, shown_fields
from bmx.run_config import JobConfig, RunConfig

FIRST = 100  # rows of each file that are looked at
NEVER_IN_NAMES = frozenset('":%#\n')  # hardly: they are in braces of JSON or Jinja


def check_field_names(config: RunConfig, reader: Reader) -> tuple[str, ...]:
    """Refuse names of fields that none of the first rows has, and a template without fields.

    Rows that the template does not fill need not have its fields; without any row that it fills, nothing is known.

    Args:
        config: all settings.
        reader: reads the job's rows.

    Returns:
        What has no effect on the first rows, in words.

    Raises:
        UsageError: names the fields, and those that the rows have.
    """
    template = reader.prompts
    if template and not template.fields and not config.prompt.constant_prompt:
        hint = "write {document} for a field" + (", in Jinja {{ document }}" if config.prompt.jinja else "")
        raise UsageError("prompt_template has no field", hint=f"{hint}; --constant-prompt asks for the same each time")
    of_all, of_data = _settings(config.job), {"prompt_template": template.needed} if template else {}
    if not any((*of_all.values(), *of_data.values(), config.job.keep_fields)):
        return ()
    plain: dict[str, None] = {}
    data: dict[str, None] = {}
    for path in reader.paths:
        for names, is_data in replace(reader, paths=(path,)).first_fields(FIRST):
            plain |= dict.fromkeys(names)
            data |= dict.fromkeys(names) if is_data else {}
    _refuse_missing(of_all, plain)
    _refuse_missing(of_data, data, template)
    return tuple(_notes(config.job, plain, data, template))


def _notes(
    job: JobConfig, plain: Mapping[str, None], data: Mapping[str, None], template: PromptTemplate | None
) -> Iterator[str]:
    """What has no effect: settings for plain rows if no row is plain, and sampling fields beside a template."""
    if not plain:
        for setting in [name for name in ("id_field", "keep_fields") if getattr(job, name)]:
            yield f"{setting} has no effect: none of the first rows is a plain one"
    asked = [name for name in SAMPLING_FIELDS if template and name in data and name not in template.fields]
    if asked:
        yield f"with a template, {shown_fields(asked)} in a row is data: what it asks stands in its object 'sampling'"


def _settings(job: JobConfig) -> dict[str, tuple[str, ...]]:
    """Settings that name fields of plain rows, and those fields."""
    kept = tuple(name for name in job.keep_fields if name != ALL_FIELDS)
    return {"id_field": (job.id_field,) if job.id_field else (), "keep_fields": kept}


def _refuse_missing(
    wanted: Mapping[str, Iterable[str]], found: Mapping[str, None], template: PromptTemplate | None = None
) -> None:
    """Refuse the fields of a setting that no row has.

    Args:
        wanted: settings, and the fields that they name.
        found: the fields of rows; empty if there was no row to look at.
        template: the template, if these are its fields.
    """
    for setting, names in wanted.items():
        missing = [name for name in names if name not in found]
        if not missing or not found:
            continue
        hint = f"the rows have {shown_fields(found)}"
        near = difflib.get_close_matches(missing[0], found, n=1)
        if template and not NEVER_IN_NAMES.isdisjoint(missing[0]):
            hint = f"{LITERAL_BRACES}; {hint}"
        elif near:
            hint = f"did you mean {near[0]!r}? {hint}"
        raise UsageError(f"{setting} names {shown_fields(missing)}, which none of the first rows has", hint=hint)
