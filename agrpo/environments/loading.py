"""From an import path in the configuration to what makes an environment."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

from agrpo.config import EnvironmentConfig
from agrpo.import_paths import find_target
from agrpo.types import Environment, InputError


def load_environment(config: EnvironmentConfig | None) -> Callable[[], Environment] | None:
    """What makes an environment for one conversation, each time it is called. One is made here, to try.

    Without a configuration there is none.

    The target is a class or a function, as `package.module:Name` or `package.module.Name`; the working directory is
    searched too.

    Raises:
        InputError: no such module or name, parameters that it does not take, or what it makes has no reset and step.
    """
    if config is None:
        return None
    where = f"environment.target: {config.target!r}"
    found = find_target(config.target, "environment.target:")
    if not callable(found):
        raise InputError(f"{where}: is a {type(found).__name__}, not a class or function that makes an environment")
    try:
        inspect.signature(found).bind(**config.parameters)
    except TypeError as error:
        own = ", ".join(inspect.signature(found).parameters) or "none"
        raise InputError(f"{where}: {error}; its parameters: {own}") from None
    make = partial(found, **config.parameters)
    try:
        tried = make()
    except Exception as error:
        raise InputError(f"{where}: {type(error).__name__}: {error}") from error
    missing = [method for method in ("reset", "step") if not callable(getattr(tried, method, None))]
    if missing:
        raise InputError(f"{where}: makes a {type(tried).__name__} without {' and '.join(missing)}")
    return make
