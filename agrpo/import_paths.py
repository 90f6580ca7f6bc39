"""From an import path in a configuration to what it names."""

from __future__ import annotations

import difflib
import importlib
import os
import pkgutil
import sys
from types import ModuleType
from typing import Any

from agrpo.types import InputError


def find_target(target: str, what: str) -> Any:
    """What `package.module.name` or `package.module:name` names; the working directory is searched too.

    Args:
        target: the path.
        what: stands before it in messages, such as "reward".

    Raises:
        InputError: no such module or name, or a module that fails to import.
    """
    names = target.replace(":", ".").split(".")
    if target.count(":") > 1 or not all(name.isidentifier() for name in names):
        raise InputError(f"{what} {target!r} is no import path; write package.module.function")
    found: Any = _import(names[0], target, what)
    if found is None and os.getcwd() not in sys.path:  # console scripts do not search the working directory
        sys.path.append(os.getcwd())
        importlib.invalidate_caches()
        found = _import(names[0], target, what)
    if found is None:
        raise InputError(f"{what} {target!r}: no module named {names[0]!r}; is it installed, or in {os.getcwd()}?")
    for position, name in enumerate(names[1:], start=1):
        if hasattr(found, name):  # an attribute before a submodule of the same name, as `from … import` does
            found = getattr(found, name)
            continue
        path = ".".join(names[: position + 1])
        inner = _import(path, target, what) if isinstance(found, ModuleType) else None
        if inner is None:
            raise InputError(f"{what} {target!r}: {'.'.join(names[:position])!r} has no {name!r}{_hint(name, found)}")
        found = inner
    return found


def _import(path: str, target: str, what: str) -> ModuleType | None:
    """The module, None if it does not exist. One that exists but fails to import is an error with its own reason."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name == path or path.startswith(f"{error.name}."):
            return None
        raise InputError(
            f"{what} {target!r}: importing {path!r} needs {error.name!r}, which is not installed"
        ) from error
    except Exception as error:
        raise InputError(f"{what} {target!r}: importing {path!r} failed: {type(error).__name__}: {error}") from error


def _hint(name: str, found: Any) -> str:
    known = [known for known in dir(found) if not known.startswith("_")]
    if isinstance(found, ModuleType) and hasattr(found, "__path__"):
        known += [module.name for module in pkgutil.iter_modules(found.__path__)]
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
