"""How many processes there are, as the environment says."""

from __future__ import annotations

import os

from agrpo.yaml_input import ConfigError


def world_size() -> int:
    """Processes of this job, as torchrun or the launcher's environment says; 1 before either."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return count_from_environment("NPROC") * count_from_environment("NNODES")


def count_from_environment(name: str) -> int:
    """A positive number from the environment; 1 where it is not set."""
    text = os.environ.get(name) or "1"
    if not text.isdigit() or int(text) == 0:
        raise ConfigError(f"environment: {name}={text} is not a positive number of processes or nodes")
    return int(text)
