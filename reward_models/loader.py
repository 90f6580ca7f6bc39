"""From an import path in the configuration to a reward."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from agrpo.types import InputError, Reward

_GIVEN = ("prompts", "completions", "completion_ids")  # what every reward is handed; never a parameter


class RewardError(InputError):
    """A reward that the configuration names cannot be made; the message says which and what to do."""


def load_reward(target: str, parameters: Mapping[str, Any] | None = None) -> Reward:
    """The reward that `package.module.attr` or `package.module:attr` names.

    A function gets the parameters as keyword arguments at every call, where they win over columns of the same name; one
    that takes no completions makes a reward, as TRL's get_… do, and is called with them once; a class is instantiated
    with them; a module's `build(**parameters)` is called. The working directory is searched too.

    Raises:
        RewardError: no such module or attribute, nothing callable, or a parameter that the target does not name.
    """
    parameters = dict(parameters or {})
    found = find_target(target)
    if isinstance(found, ModuleType):
        build = getattr(found, "build", None)
        if not callable(build):
            raise RewardError(
                f"reward {target!r} is a module without a build(**parameters); name a function or class in it"
            )
        return _make(target, build, parameters)
    if inspect.isclass(found):
        return _make(target, found, parameters)
    if not callable(found):
        raise RewardError(f"reward {target!r} is a {type(found).__name__}, not a function, class or module")
    if _is_factory(found):
        return _make(target, found, parameters)
    _check_names(target, found, parameters)
    if not parameters:
        return found

    @functools.wraps(found)
    def bound(prompts, completions, completion_ids=None, **columns):
        return found(prompts=prompts, completions=completions, completion_ids=completion_ids, **(columns | parameters))

    return bound


def find_target(target: str) -> Any:
    """What an import path names; the working directory is searched too."""
    names = target.replace(":", ".").split(".")
    if target.count(":") > 1 or not all(name.isidentifier() for name in names):
        raise RewardError(f"reward {target!r} is no import path; write package.module.function")
    found: Any = _import(names[0], target)
    if found is None and os.getcwd() not in sys.path:  # console scripts do not search the working directory
        sys.path.append(os.getcwd())
        importlib.invalidate_caches()
        found = _import(names[0], target)
    if found is None:
        raise RewardError(f"reward {target!r}: no module named {names[0]!r}; is it installed, or in {os.getcwd()}?")
    for position, name in enumerate(names[1:], start=1):
        if hasattr(found, name):  # an attribute before a submodule of the same name, as `from … import` does
            found = getattr(found, name)
            continue
        path = ".".join(names[: position + 1])
        inner = _import(path, target) if isinstance(found, ModuleType) else None
        if inner is None:
            raise RewardError(f"reward {target!r}: {'.'.join(names[:position])!r} has no {name!r}{_hint(name, found)}")
        found = inner
    return found


def _import(path: str, target: str) -> ModuleType | None:
    """The module, None if it does not exist. One that exists but fails to import is an error with its own reason."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name == path or path.startswith(f"{error.name}."):
            return None
        raise RewardError(
            f"reward {target!r}: importing {path!r} needs {error.name!r}, which is not installed"
        ) from error
    except Exception as error:
        raise RewardError(f"reward {target!r}: importing {path!r} failed: {type(error).__name__}: {error}") from error


def _hint(name: str, found: Any) -> str:
    known = [known for known in dir(found) if not known.startswith("_")]
    if isinstance(found, ModuleType) and hasattr(found, "__path__"):
        known += [module.name for module in pkgutil.iter_modules(found.__path__)]
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _is_factory(found: Callable) -> bool:
    """Does the function make a reward, rather than being one? It has no place for completions then."""
    try:
        parameters = inspect.signature(found).parameters.values()
    except ValueError:
        return False
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return False
    return inspect.isfunction(found) and not any(p.name in _GIVEN for p in parameters)


def _make(target: str, factory: Callable, parameters: dict[str, Any]) -> Reward:
    _check_names(target, factory, parameters)
    try:
        inspect.signature(factory).bind(**parameters)
    except TypeError as error:
        raise RewardError(f"reward {target!r}: {error}") from error
    except ValueError:  # no signature to check
        pass
    reward = factory(**parameters)
    if not callable(reward):
        raise RewardError(f"reward {target!r} gave a {type(reward).__name__}, which cannot be called as a reward")
    return reward


def _check_names(target: str, function: Callable, parameters: dict[str, Any]) -> None:
    """Names only: **columns would swallow a misspelt parameter without a word."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some callables of extension modules have none
        return
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    own = [name for name, p in signature.parameters.items() if p.kind in by_name and name not in _GIVEN]
    for name in parameters:
        if name not in own:
            near = difflib.get_close_matches(name, own, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise RewardError(f"reward {target!r} has no parameter {name!r}{hint}; it has: {', '.join(own) or 'none'}")
