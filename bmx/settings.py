"""One setting, described once: how it is read and explained, which commands take it, and what depends on it.

A field of ``EngineConfig`` and the like carries its ``Setting`` as an annotation. The command line, YAML files, the
environment, the fingerprint of a run, calibration files and ``docs/settings.md`` are derived from it. This file knows
no setting by name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, MISSING, dataclass, fields, replace
from enum import Enum
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from bmx.errors import UsageError
from bmx.units import EXPECTED, UnlikelyError

COMMANDS = ("run", "plan-batch", "calibrate", "bench")
RUN = ("run",)
NOT_IN_BENCH = ("run", "plan-batch", "calibrate")
NOT_IN_PLAN = ("run", "calibrate", "bench")


class DecidesAnswers(Enum):
    """When the value of a setting can change an answer.

    Then it is part of the fingerprint, but for ``IF_CUT``: answers to rows of which nothing was cut hold for any value.
    """

    ALWAYS = "yes"
    IF_EVICTING = "where KV pairs are evicted"
    IF_CHUNKED = "where KV pairs are evicted, or pairs or states are stored in fewer bits"
    IF_CUT = "for rows that are cut"
    IF_TRUE = "when it is on"
    IF_GIVEN = "when it is given"
    NEVER = "no"


ALWAYS, IF_EVICTING, IF_CHUNKED, IF_CUT, IF_TRUE, IF_GIVEN, NEVER = DecidesAnswers


@dataclass(frozen=True, slots=True)
class Setting:
    """The description of one setting.

    Attributes:
        help: what it does, for people.
        decides_answers: when its value can change an answer. There is no default: each setting must say.
        unit: what a number counts, such as tokens or seconds.
        parse: reads values in a notation of its own, and raises ValueError for others.
        commands: the commands that take it.
        help_in: other help texts, by command.
        compared_in: commands that take several values and compare them, with an example for each.
        calibrated: whether candidates of ``bmx calibrate`` may differ in it; then a calibration file sets it.
        private: whether it may quote what prompts say; then records keep only a hash of it.
        is_path: whether it names a file or folder, which may be any bytes; ``~`` at its beginning is the home folder.
        from_file: whether ``@FILE`` stands for the text of that file.
        is_object: whether it is an object of JSON, whose text begins with a brace; other text names the file of it.
        typed_escapes: whether a backslash with n or t, as typed in a shell, is a line break or a tab.
        rare: whether help lists it after the common ones.
        metavar: what help calls its value; derived from unit and type if left out.
        short: its short flag.
        aliases: other names of its flag, which vLLM gives it.
        name, type, default, group: of the field that it describes, and the title of the field's section.
    """

    help: str
    _: KW_ONLY
    decides_answers: DecidesAnswers
    unit: str | None = None
    parse: Callable[[Any], Any] | None = None
    commands: tuple[str, ...] = COMMANDS
    help_in: Mapping[str, str] | None = None
    compared_in: Mapping[str, str] | None = None
    calibrated: bool = False
    private: bool = False
    is_path: bool = False
    from_file: bool = False
    is_object: bool = False
    typed_escapes: bool = False
    rare: bool = False
    metavar: str = ""
    short: str | None = None
    aliases: tuple[str, ...] = ()
    name: str = ""
    type: Any = str
    default: Any = None
    group: str = ""

    @property
    def flag(self) -> str:
        """Its flag on the command line."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def spellings(self) -> tuple[str, ...]:
        """Its flag and those of its aliases, each with the one that turns it off where it is on by default."""
        words = (name.replace("_", "-") for name in (self.name, *self.aliases))
        return tuple(f"--{word}/--no-{word}" if self.type is bool and self.default else f"--{word}" for word in words)

    @property
    def variable(self) -> str:
        """The environment variable that sets it."""
        return f"BMX_{self.name.upper()}"

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed words; empty if any value of the type is allowed."""
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    @property
    def placeholder(self) -> str:
        """What help calls its value, such as TOKENS or FILE; its words where it has choices; nothing for a switch."""
        if self.type is bool:
            return ""
        if self.metavar or self.choices:
            return self.metavar or "|".join(self.choices)
        if self.unit or self.is_path:
            return self.unit.upper() if self.unit else "FILE"
        return {int: "N", float: "NUMBER"}.get(self.item_type, "TEXT")

    @property
    def is_list(self) -> bool:
        """Whether it holds several values."""
        return get_origin(self.type) is tuple

    @property
    def is_mapping(self) -> bool:
        """Whether it holds values by name."""
        return get_origin(self.item_type) is dict

    @property
    def expected(self) -> str:
        """What values look like, for people."""
        if self.parse:
            return EXPECTED[self.parse]
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        choices = ", ".join(self.choices[:-1]) + (f" or {self.choices[-1]}" if self.choices else "")
        kind = choices.removeprefix(" or ") or words.get(self.item_type, str(self.item_type))
        return f"{kind}, or a list of such" if self.is_list else kind

    @property
    def item_type(self) -> Any:
        """The plain type: without None, and of one item of a list."""
        return next((t for t in get_args(self.type) if t not in (type(None), ...)), self.type)

    def in_command(self, command: str) -> Setting:
        """The setting as a command shows it: with that command's help text, and as text where it compares values."""
        words = (self.help_in or {}).get(command, self.help)
        several = (self.compared_in or {}).get(command)
        if several is None:
            return replace(self, help=words)
        return replace(
            self,
            help=f"{words}; several values to compare: {several}",
            type=str | None,
            parse=None,
            metavar=f"{self.placeholder},...",
        )

    def coerce(self, value: Any) -> Any:
        """``value`` as this setting's type.

        Raises:
            UsageError: it cannot be converted.
        """
        try:
            return self._coerced(value)
        except UnicodeEncodeError:
            raise UsageError(f"{self.name} is not UTF-8") from None
        except UnlikelyError as unlikely:
            raise UsageError(f"{self.name} cannot be {unlikely}", hint=unlikely.hint) from None
        except json.JSONDecodeError as damaged:
            hint = f"{str(damaged)[:1].lower()}{str(damaged)[1:]}; it takes {self.expected}"
            raise UsageError(f"{self.name} is not JSON: {_shown(value)}", hint=hint) from None
        except (ValueError, TypeError, OverflowError):
            raise UsageError(f"{self.name} cannot be {_shown(value)}", hint=f"it takes {self.expected}") from None

    def _coerced(self, value: Any) -> Any:
        if value is None and type(None) in get_args(self.type):
            return None
        listed = isinstance(value, list | tuple) and self.is_list  # names as they are, which no comma splits
        if self.parse and isinstance(value, Mapping) and (self.is_mapping or self.is_object):
            return self.parse(value)
        if self.parse and not listed:
            return self.parse(_converted(type(value) if type(value) in (int, float) else str, value))
        if self.choices:
            if value not in self.choices:
                raise ValueError
            return value
        if self.is_list:
            items = value if isinstance(value, (list, tuple)) else (value,)
            return tuple(self._item(item) for item in items)
        return self._item(value)

    def _item(self, value: Any) -> Any:
        item = _converted(self.item_type, value)
        if isinstance(item, str) and self.is_path:
            return os.path.expanduser(item)
        if isinstance(item, str):
            item.encode()
        return item


def _shown(value: Any) -> str:
    """A wrong value, for people: plain values as they are, others by what they are."""
    if value is None or isinstance(value, str | int | float):
        return repr(value)[:80]
    return "a list or mapping" if isinstance(value, list | tuple | Mapping) else f"of type {type(value).__name__}"


def _converted(kind: Any, value: Any) -> Any:
    """``value`` as ``kind``: a number's text is read, a whole number may be a float or become one; nothing else.

    Raises:
        TypeError, ValueError, OverflowError: another type, or text that is not such a number.
    """
    allowed = {str: (str,), bool: (bool,), int: (int, str), float: (int, float, str)}[kind]
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, allowed) or isinstance(value, bool) != (kind is bool):
        raise TypeError
    return kind(value)


@cache
def settings_in(section: type, group: str = "") -> tuple[Setting, ...]:
    """The settings that a dataclass declares, in the order of its fields.

    Args:
        section: a dataclass whose fields are annotated with a ``Setting``.
        group: the title under which help texts show them.
    """
    hints = get_type_hints(section, include_extras=True)
    described = []
    for field in fields(section):
        kind, setting = get_args(hints[field.name])
        default = None if field.default is MISSING else field.default
        described.append(replace(setting, name=field.name, type=kind, default=default, group=group))
    return tuple(described)


def check_types(section: Any) -> None:
    """Compare each value of a dataclass of settings with its declared type.

    Raises:
        UsageError: a value of another type; the message names the setting.
    """
    declaring: type = type(section)
    for name, kinds in _declared_types(declaring):
        value = getattr(section, name)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            words = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
            raise UsageError(f"{name} must be {words}, not {_shown(value)}")


@cache
def _declared_types(section: type) -> tuple[tuple[str, tuple[type, ...]], ...]:
    return tuple((setting.name, tuple(dict.fromkeys(_plain_types(setting.type)))) for setting in settings_in(section))


def _plain_types(declared: Any) -> tuple[type, ...]:
    """The classes of the values that a type allows; a whole number is a number too, and a list may be a tuple's."""
    origin = get_origin(declared)
    if origin in (Union, UnionType):
        return tuple(kind for part in get_args(declared) for kind in _plain_types(part))
    if origin is Literal:
        return tuple(type(word) for word in get_args(declared))
    return {tuple: (tuple, list), float: (float, int)}.get(origin or declared, (origin or declared,))
