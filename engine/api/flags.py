"""The command line of a settings class: one flag for each of its fields, and a `--help` worth reading.

Nothing is declared twice: names, types, defaults and descriptions are the fields' own, written with `setting()`.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import shutil
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel, ByteSize, Field, SecretStr
from pydantic.fields import FieldInfo


def setting(
    default: Any,
    description: str,
    *,
    group: str,
    unit: str = "",
    aliases: Sequence[str] = (),
    env: str | None = None,
    **constraints: Any,
) -> Any:
    """A settings field. `aliases` are further flag names (snake_case); `env` is an environment name in place of
    prefix plus field name; `constraints` are pydantic's (ge, le, gt, pattern …)."""
    notes: dict[str, Any] = {"group": group, "unit": unit, "aliases": list(aliases), "env": env}
    return Field(default, description=description, json_schema_extra=notes, **constraints)


class SettingsError(ValueError):
    """A setting that cannot be used; the message is one line that says what to do."""


@dataclass(frozen=True, slots=True)
class Flag:
    """How one field looks on a command line."""

    field: str
    kind: type  # of one value: bool, str, int, float, Path, ByteSize, SecretStr, an Enum
    many: bool  # a list: repeatable, and comma-separated
    choices: tuple[str, ...]
    default: str  # as shown in --help; empty when there is none to show
    description: str
    group: str
    unit: str
    aliases: tuple[str, ...]
    env: str

    @property
    def options(self) -> list[str]:
        return [kebab(name) for name in (self.field, *self.aliases)]

    @property
    def metavar(self) -> str:
        if self.choices:
            return "{" + ",".join(self.choices) + "}"
        if self.kind is ByteSize:
            return "SIZE"
        by_kind = {int: "N", float: "X", Path: "PATH", SecretStr: "KEY"}
        return self.unit.upper().replace(" ", "_") or by_kind.get(self.kind, "TEXT")

    @property
    def help(self) -> str:
        notes = ["repeatable"] if self.many else []
        notes += [f"default: {self.default}"] if self.default else []
        return (self.description + (f" ({'; '.join(notes)})" if notes else "")).replace("%", "%%")


def kebab(name: str) -> str:
    return "--" + name.replace("_", "-")


@functools.cache
def flags_of(settings: type[BaseModel], env_prefix: str) -> dict[str, Flag]:
    """Field name → flag, in the order of the fields."""
    return {name: _flag(name, field, env_prefix) for name, field in settings.model_fields.items()}


def _flag(name: str, field: FieldInfo, env_prefix: str) -> Flag:
    kind, many, choices = _shape(field.annotation)
    notes = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    return Flag(
        field=name,
        kind=kind,
        many=many,
        choices=choices,
        default=_shown(field, kind),
        description=field.description or "",
        group=str(notes.get("group", "General")),
        unit=str(notes.get("unit", "")),
        aliases=tuple(typing.cast(list[str], notes.get("aliases", []))),
        env=str(notes.get("env") or env_prefix + name.upper()),
    )


def _shape(annotation: Any) -> tuple[type, bool, tuple[str, ...]]:
    """(type of one value, whether it is a list, literal choices) of a field's annotation."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return _shape(next(argument for argument in arguments if argument is not type(None)))
    if origin in (tuple, list):
        kind, _, choices = _shape(arguments[0])
        return kind, True, choices
    if origin is typing.Literal:
        return str, False, tuple(str(argument) for argument in arguments)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return annotation, False, tuple(member.name.lower() for member in annotation)
    return (annotation if isinstance(annotation, type) else str), False, ()


def _shown(field: FieldInfo, kind: type) -> str:
    default = field.default
    if field.is_required():
        return ""
    if kind is bool:
        return "on" if default else "off"
    if isinstance(default, Enum):
        return default.name.lower()
    if isinstance(default, list | tuple):
        return ",".join(str(value) for value in default)
    return "" if default is None or default == "" else str(default)


def parse(flags: dict[str, Flag], argv: Sequence[str], prog: str, description: str, epilog: str) -> dict[str, Any]:
    """Field name → what the command line said, unconverted. Raises SettingsError; --help and --version exit 0."""
    parser = _Parser(prog=prog, description=description, epilog=epilog, formatter_class=_Help, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"%(prog)s {version()}")
    groups: dict[str, Callable[..., argparse.Action]] = {}
    for flag in sorted(flags.values(), key=lambda flag: flag.group == "General"):  # what every command has comes last
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(flag.group).add_argument
        _add(groups[flag.group], flag)
    known, unknown = parser.parse_known_args(list(argv))
    if unknown:
        if not unknown[0].startswith("-"):
            raise SettingsError(f"unexpected argument {unknown[0]!r}: every setting is a flag; see --help")
        raise SettingsError(
            unknown_text("flag", unknown[0], [name for flag in flags.values() for name in flag.options])
        )
    return {name: value for name, value in vars(known).items() if value is not None}


def _add(add: Callable[..., argparse.Action], flag: Flag) -> None:
    if flag.kind is bool:
        add(*flag.options, dest=flag.field, nargs="?", const="true", metavar="true|false", help=flag.help)
        negations = ["--no-" + option[2:] for option in flag.options]
        add(*negations, dest=flag.field, action="store_const", const="false", help=argparse.SUPPRESS)
    else:
        action = "append" if flag.many else "store"
        add(*flag.options, dest=flag.field, action=action, metavar=flag.metavar, help=flag.help)


def unknown_text(what: str, name: str, known: Iterable[str]) -> str:
    """One line that names the nearest known name, when there is one."""
    bare = name.split("=", 1)[0]
    nearest = difflib.get_close_matches(bare, list(known), n=1, cutoff=0.5)
    return f"unknown {what} {bare!r}" + (f", did you mean {nearest[0]!r}?" if nearest else "; see --help")


def version() -> str:
    try:
        return metadata.version("tandem")
    except metadata.PackageNotFoundError:  # run from a checkout that was not installed
        return "0+checkout"


class _Parser(argparse.ArgumentParser):
    """argparse, saying what is wrong in one line instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(message)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Wide enough for our longest flags, and the usage line kept to one."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size((110, 40)).columns, 110)
        super().__init__(prog, max_help_position=38, width=width)

    def add_usage(self, usage: str | None, actions: Any, groups: Any, prefix: str | None = None) -> None:
        super().add_usage("%(prog)s [flags]", actions, groups, prefix)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = str(action.metavar)
        return f"{', '.join(action.option_strings)} {f'[{value}]' if action.nargs == '?' else value}"
