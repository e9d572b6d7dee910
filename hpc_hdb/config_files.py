"""Settings from a TOML file or a preset with ``--set`` overrides, and what is told of mistakes."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hpc_hdb.config import Settings
from hpc_hdb.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_SAME = {"cifar100": "paper-cifar100"}
"""Further names of presets: there are only the paper's settings for CIFAR-100."""


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    folder = resources.files("hpc_hdb") / "presets"
    files = [path.name for path in folder.iterdir()]
    return sorted([*_SAME, *(name[:-5] for name in files if name.endswith(".toml"))])


def load_settings(config: str, overrides: Sequence[str] = ()) -> Settings:
    """Read a configuration.

    Parameters
    ----------
    config : str
        Path of a TOML file, or the name of a preset.
    overrides : sequence of str
        ``section.key=value`` each; the value in TOML, or bare text for a string.

    Raises
    ------
    UserError
        If the file is missing or no TOML, or a key or value is wrong; the message names the
        nearest right one.
    """
    path = Path(config)
    if path.suffix == ".toml" or path.is_file():
        try:
            values = read_toml(path)
        except FileNotFoundError:
            raise UserError(f"no configuration file {config}") from None
    else:
        values = _preset(config)
    for override in overrides:
        _apply_override(values, override)
    return parse_settings(values, config)


def parse_settings(values: dict[str, Any], name: str) -> Settings:
    """Validate plain values; `name` is what an error calls them."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{name}: {_first_problem(error)}") from None


def read_settings(path: Path) -> Settings:
    """The settings that a run folder holds."""
    try:
        return parse_settings(tomllib.loads(path.read_text(encoding="utf-8")), str(path))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path.parent} is not a run folder: it has no {path.name}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a file that a user has written.

    Raises
    ------
    FileNotFoundError
        If it is missing.
    UserError
        If it cannot be read, or is no TOML.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows editors write that mark
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None


def nearest(word: str, known: Sequence[str]) -> str:
    """'; did you mean ...?', or the choices where nothing is near."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; choose from {', '.join(known)}"


def wrong_value(key: str, message: str, value: object) -> str:
    """What pydantic's `message` says of a value, in the user's words."""
    message = message.removeprefix("Value error, ")
    return f"{key}: {message[0].lower()}{message[1:]}, not {value!r}"


def _preset(name: str) -> dict[str, Any]:
    presets = preset_names()
    if name not in presets:
        raise UserError(f"'{name}' is neither a TOML file nor a preset{nearest(name, presets)}")
    file = resources.files("hpc_hdb") / "presets" / f"{_SAME.get(name, name)}.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not (equals and section and dot and name and text.strip()):
        raise UserError(f"--set {override}: write section.key=value, such as run.seed=1")
    try:
        (value,) = tomllib.loads(f"value = {text}").values()
    except (ValueError, RecursionError):  # no TOML, or more than one value
        value = text.strip()
    table = values.setdefault(section, {})
    if not isinstance(table, dict):
        raise UserError(f"--set {override}: [{section}] is not a table in this configuration")
    table[name] = value


def _first_problem(error: ValidationError) -> str:
    """The first validation error in the user's words."""
    problem = error.errors()[0]
    where = [str(part) for part in problem["loc"]]
    key = ".".join(where[:2])
    if problem["type"] == "extra_forbidden" and len(where) > 1:
        return f"unknown setting '{key}'{_nearest_setting(*where[:2])}"
    if problem["type"] == "extra_forbidden":
        return f"unknown section '{key}'{nearest(key, list(Settings.model_fields))}"
    if problem["type"] == "model_type":
        return f"{key} is a section: write [{key}] with its settings below"
    if key == "plan.timing":
        return (
            f'{key}: give a timing.json, "profile", or {{ resolution = [a, c] }} in seconds, '
            f"not {problem['input']!r}"
        )
    if problem["type"] == "path_type":
        return f"{key}: give a path in quotes, not {problem['input']}"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    if problem["type"] == "literal_error" and isinstance(problem["input"], str):
        choices = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
        return f"{key}: there is no '{problem['input']}'{nearest(problem['input'], choices)}"
    return wrong_value(key, problem["msg"], problem["input"])


def _nearest_setting(section: str, name: str) -> str:
    """As `nearest`, for a setting: of its own section first, then of the others."""
    settings = {
        key: list(type(field.default).model_fields) for key, field in Settings.model_fields.items()
    }
    own_first = sorted(settings, key=lambda key: key != section)
    for other, likeness in [*((key, 0.6) for key in own_first), (section, 0.5)]:
        if close := difflib.get_close_matches(name, settings[other], n=1, cutoff=likeness):
            return f"; did you mean '{other}.{close[0]}'?"
    return f"; choose from {', '.join(f'{section}.{own}' for own in settings[section])}"
