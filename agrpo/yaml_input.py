"""Reading and explaining YAML: overrides, merging, secrets, and errors that name the key and the mend."""

from __future__ import annotations

import difflib
import re
import typing
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from agrpo.places import configuration, own_folder
from agrpo.types import InputError

_SECRET = re.compile(r"token|secret|passw|credential|authorization|api_?key|private_?key", re.IGNORECASE)
_REDACTED = "…redacted…"
_USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def is_secret(name: str) -> bool:
    """Does a key or a variable of this name hold a secret? `…_env` names the variable that does."""
    return bool(_SECRET.search(name)) and name != "added_tokens" and not name.endswith("_env")


class ConfigError(InputError):
    """A wrong configuration: the message says file, key and the mend."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: 1e-4 is a float here, where YAML 1.1 reads a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; of agrpo's own where `path` begins with `configs/` and there is none here."""
    path = configuration(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        folder = f"; agrpo's own lie in {own_folder('configs')}" if path.parts[:1] == ("configs",) else ""
        mend = f"; did you mean {path.parent / near[0]}?" if near else folder
        raise ConfigError(f"{path}: no such file{mend}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds a {type(values).__name__} where sections such as training: are expected")
    return values


def read_value(text: str, name: str, *kinds: type) -> Any:
    """A value that the command line holds as YAML, of one of these kinds; `name` is the option's, for errors."""
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, kinds):
        names: dict[type, str] = {dict: "a mapping such as {key: value}", str: "a text"}
        wanted = " or ".join(names[kind] for kind in kinds)
        raise ConfigError(f"{name}: {text!r} is not {wanted}")
    return value


def set_path(values: dict[str, Any], override: str) -> None:
    """Apply one `key.path=value` to nested mappings, in place. `rewards.0.weight=2` reaches into lists."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"command line: {override!r} is not key.path=value")
    try:
        value = yaml.load(text, _Loader) if text else None
    except yaml.YAMLError as error:
        raise ConfigError(f"command line: {key}: not YAML: {' '.join(str(error).split())}") from None
    here: Any = values
    parts = key.split(".")
    for part, following in pairwise(parts):
        place: Any = _index(here, part, key) if isinstance(here, list) else part
        inside = here[place] if isinstance(here, list) else here.get(part)
        if not isinstance(inside, dict | list):
            inside = here[place] = [] if following.isdigit() else {}
        here = inside
    here[_index(here, parts[-1], key) if isinstance(here, list) else parts[-1]] = value


def _index(items: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise ConfigError(f"command line: {key}: {part!r} is not an index into a list of {len(items)}")
    return int(part)


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid over `under`, section by section."""
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def redacted(config: BaseModel) -> dict[str, Any]:
    """The resolved configuration as plain values, without its secrets: what may be written to disk or shown."""

    def redact(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: redact(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [redact(v, key) for v in value]
        if not isinstance(value, str):
            return value
        return _REDACTED if is_secret(key) else _USER_IN_URL.sub(_REDACTED, value)

    plain: dict[str, Any] = redact(config.model_dump(mode="json", by_alias=True))
    return plain


def to_yaml(config: BaseModel) -> str:
    """The resolved configuration as YAML, secrets redacted."""
    return yaml.safe_dump(redacted(config), sort_keys=False, allow_unicode=True, width=120)


def explain(error: ValidationError, model: type[BaseModel], path: Path) -> str:
    """Every problem of a validation error, one a line: file, key, what is wrong, the nearest known name."""
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            known = _fields_at(model, problem["loc"][:-1])
            near = difflib.get_close_matches(str(problem["loc"][-1]), known, 1)
            message = "unknown key" + (f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(known)}")
        elif problem["type"] == "missing":
            message = "is required"
        elif not problem["type"].startswith("value_error"):
            message += f", got {problem['input']!r}"
        lines.append(f"{path}: {key}: {message}" if key else f"{path}: {message}")
    return "\n".join(lines)


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Names a section knows, found by walking the annotations along the error's location."""
    current: Any = model
    for part in location:
        fields = {field.alias or name: field for name, field in current.model_fields.items()}
        if part not in fields:
            continue  # an index into a list
        candidates = [fields[part].annotation, *_arguments(fields[part].annotation)]
        current = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return [field.alias or name for name, field in current.model_fields.items()]


def _arguments(annotation: Any) -> list[Any]:
    found = []
    for argument in typing.get_args(annotation):
        found += [argument, *_arguments(argument)]
    return found
