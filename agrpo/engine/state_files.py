"""The layer through which DeepSpeed writes and reads checkpoint files: into memory, and never by free unpickling."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from agrpo.types import InputError


class StateFiles:
    """Takes the place of DeepSpeed's checkpoint engine, whose interface this is.

    What is saved becomes bytes at once: a snapshot that later steps cannot touch. What is loaded may hold tensors,
    plain values and the `allowed` classes, nothing else.
    """

    name = "StateFiles"

    def __init__(self, allowed: Sequence[type]) -> None:
        self._allowed = list(allowed)
        self._taken: dict[str, bytes] = {}

    def take(self) -> dict[str, bytes]:
        """The files saved since the last call, by name."""
        taken, self._taken = self._taken, {}
        return taken

    def save(self, state_dict: Any, path: str) -> None:
        content = io.BytesIO()
        torch.save(state_dict, content)
        self._taken[Path(path).name] = content.getvalue()

    def load(self, path: str, map_location: Any = None) -> Any:
        """
        Raises:
            InputError: the file would run code when read, or is no checkpoint at all.
        """
        try:
            with torch.serialization.safe_globals(self._allowed):
                return torch.load(path, map_location=map_location, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            reason = str(error).split("\n")[0]
            raise InputError(f"{path}: refused: it holds more than tensors and plain values ({reason})") from None

    def create(self, info: Any) -> None: ...

    def commit(self, info: Any) -> bool:
        return True

    def makedirs(self, path: str, exist_ok: bool = False) -> None: ...

    def set_commit_info(self, info: Any) -> None: ...

    def get_commit_info(self) -> None: ...

    def cleanup(self) -> None: ...

    def is_data_parallel_writer(self, rank: int) -> bool:
        return rank == 0

    def is_decoupled(self) -> bool:
        return False

    def preserves_storage_sharing(self) -> bool:
        return True
