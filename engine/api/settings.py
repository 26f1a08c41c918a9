"""Settings of every Tandem command: one frozen class each, filled from flags, environment and a YAML file.

    class EngineSettings(Settings):
        env_prefix = "TANDEM_ENGINE_"
        port: int = setting(23333, "port to listen on", group="Network", ge=1, le=65535)

    settings = load(EngineSettings, sys.argv[1:], prog="engine", description="…", example="engine --port 9000")

Flags win over the environment, the environment over `--config file.yaml`, the file over the defaults. A name that no
field has is refused wherever it stands, with the nearest name that exists. Sizes take units (512MiB, 2GB); lists are
repeatable and comma-separated. Keys are `SecretStr`, so that no log and no repr shows them.

The sources are our own: pydantic-settings takes longer to import than pydantic itself, in every process of a cluster.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    SecretStr,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from engine.api.flags import Flag, SettingsError, flags_of, parse, setting, unknown_text

__all__ = ["Settings", "SettingsError", "load", "setting"]

_PRECEDENCE = """\
Flags win over the environment, the environment over --config, that over the defaults.
{flag} is {env} in the environment and {field} in the file."""


class Settings(BaseModel):
    """Base of every settings class. Raises SettingsError, or pydantic's ValidationError, for what cannot be used."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True, validate_default=True)
    env_prefix: ClassVar[str] = ""  # each subclass sets its own

    config: Path | None = setting(None, "YAML file with any of these settings", group="General")

    def __init__(self, **said: Any) -> None:
        """What is said here wins over the environment, that over the file."""
        given = _from_environment(self.env_prefix, self.flags()) | said
        super().__init__(**(_from_file(given.get("config"), self.flags()) | given))

    @classmethod
    def flags(cls) -> dict[str, Flag]:
        """Field name → its flag, environment name and documentation."""
        return flags_of(cls, cls.env_prefix)

    @field_validator("*", mode="before")
    @classmethod
    def _read_text(cls, value: Any, info: ValidationInfo) -> Any:
        flag = cls.flags()[str(info.field_name)]
        if flag.kind is SecretStr:
            _refuse_empty(value)
        if flag.many:
            return _split(value)
        if flag.kind is ByteSize and isinstance(value, str):
            return _size(value)
        if issubclass(flag.kind, Enum) and isinstance(value, str):
            return _member(flag, value)
        return value


SettingsType = TypeVar("SettingsType", bound=Settings)


def load(
    settings: type[SettingsType], argv: Sequence[str], prog: str, description: str, example: str = ""
) -> SettingsType:
    """The settings of this process. Exits 0 after --help and --version; exits 2 when they cannot be used, with one line
    on stderr that says what is wrong and where it was said."""
    try:
        return read(settings, argv, prog, description, example)
    except SettingsError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def read(
    settings: type[SettingsType], argv: Sequence[str], prog: str, description: str, example: str = ""
) -> SettingsType:
    """`load`, raising SettingsError instead of leaving the process."""
    said = parse(settings.flags(), argv, prog, description, _epilog(settings.flags(), example))
    try:
        return settings(**said)
    except ValidationError as error:
        raise SettingsError(_explain(error, settings.flags(), said)) from None


def _epilog(flags: dict[str, Flag], example: str) -> str:
    shown = next((flag for flag in flags.values() if "_" in flag.field), flags["config"])
    text = _PRECEDENCE.format(flag=shown.options[0], env=shown.env, field=shown.field)
    lines = ["  " + line for line in example.strip().splitlines()]
    return "\n".join([text, "", "examples:", *lines]) if lines else text


def _from_environment(prefix: str, flags: dict[str, Flag]) -> dict[str, str]:
    """Each field's own name in the environment; unknown names under our prefix are refused, they are misspellings."""
    field_of = {flag.env: name for name, flag in flags.items()}
    for name in os.environ:
        if prefix and name.startswith(prefix) and name not in field_of:
            raise SettingsError(unknown_text("environment variable", name, field_of))
    # An empty variable is an unset one, but for a key, where that would open what it was meant to lock.
    given = {name: flag for name, flag in flags.items() if os.environ.get(flag.env) or flag.kind is SecretStr}
    return {name: os.environ[flag.env] for name, flag in given.items() if flag.env in os.environ}


def _from_file(path: str | Path | None, flags: dict[str, Flag]) -> dict[str, Any]:
    if path is None:
        return {}
    field_of = {name: flag.field for flag in flags.values() for name in (flag.field, *flag.aliases)}
    found: dict[str, Any] = {}
    for key, value in _mapping(Path(path)).items():
        name = str(key).replace("-", "_")
        if name not in field_of or name == "config":
            raise SettingsError(f"{path}: {unknown_text('key', str(key), field_of)}")
        found[field_of[name]] = value
    return found


def _mapping(path: Path) -> dict[Any, Any]:
    import yaml  # few use files, and everybody would wait for it

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"--config {path}: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"--config {path}: not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"--config {path}: expected 'name: value' lines, got a {type(content).__name__}")
    return content


def _refuse_empty(value: Any) -> None:
    """A key from a variable that is not set must not open what it was meant to lock."""
    for item in value if isinstance(value, list | tuple) else [value]:
        if isinstance(item, str) and not item.strip(", "):
            raise ValueError("is empty, which would leave the door open unseen: give a key, or leave the setting out")


def _split(value: Any) -> Any:
    """A list from "a,b", ["a,b", "c"] or ["a", "b"]."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if isinstance(value, list | tuple):
        return tuple(part for item in value for part in (_split(item) if isinstance(item, str) else (item,)))
    return value


def _size(text: str) -> int:
    try:
        return TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        raise ValueError("expected a size like 512MiB or 2GB") from None


def _member(flag: Flag, text: str) -> Any:
    """The enum's member of this name, in whatever case."""
    if text.lower() not in flag.choices:
        raise ValueError(f"must be {' or '.join(map(repr, flag.choices))}")
    return next(member for member in flag.kind if member.name.lower() == text.lower())  # type: ignore[attr-defined]


def _explain(error: ValidationError, flags: dict[str, Flag], said: dict[str, Any]) -> str:
    """All that is wrong, on one line, each beside the place where it was said. Never shows a value: it may be a key."""
    lines = []
    for problem in error.errors(include_url=False, include_input=False):
        message = problem["msg"].removeprefix("Value error, ").replace("Input should", "must")
        message = message.replace("Field required", "is required")
        name = str(problem["loc"][0]) if problem["loc"] else ""
        lines.append(f"{_where(flags[name], flags, said)}: {message}" if name in flags else message)
    return "; ".join(lines)


def _where(flag: Flag, flags: dict[str, Flag], said: dict[str, Any]) -> str:
    if flag.field not in said and os.environ.get(flag.env):
        return flag.env
    file = said.get("config") or os.environ.get(flags["config"].env)
    if flag.field not in said and file:
        return f"{file}: {flag.field}"
    return flag.options[0]
