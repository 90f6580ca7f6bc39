"""The order in which rows are seen: deterministic, resumable, and the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

import numpy as np

from agrpo.types import InputError


class Stream(Iterator[list[tuple[int, int]]]):
    """Endless global batches of row indices, of which each rank takes the slots rank, rank + world, ….

    Every epoch is a permutation of its own, a function of (seed, epoch) alone. A batch that an epoch cannot fill is
    filled from the next one, so no row is ever dropped. The state is the position in global samples: a run may resume
    with another world size.

    Raises:
        ValueError: batch is larger than the data, or smaller than the number of ranks.
    """

    def __init__(self, size: int, batch: int, seed: int, rank: int = 0, world: int = 1, shuffle: bool = True) -> None:
        if not 1 <= batch <= size:
            raise ValueError(f"a batch of {batch} from {size} rows; lower the batch size or bring more data")
        if not 0 <= rank < world <= batch:
            raise ValueError(
                f"rank {rank} of {world} and a batch of {batch}; each rank needs at least one row of a batch"
            )
        self.size, self.batch, self.seed, self.shuffle = size, batch, seed, shuffle
        self.rank, self.world = rank, world
        self.position = 0  # global samples handed out so far
        self._orders: dict[int, np.ndarray] = {}

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[tuple[int, int]]:
        """This rank's (slot, index) pairs; the slot is the place in the global batch."""
        start = self.position
        self.position += self.batch
        return [(slot, self._index(start + slot)) for slot in range(self.rank, self.batch, self.world)]

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.position / self.size

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            InputError: it was taken with other data, batch size, seed or shuffling, so its position means nothing here.
        """
        for key, value in self._identity().items():
            if state[key] != value:
                raise InputError(
                    f"the checkpoint's data stream has {key} {state[key]}, this run's has {value}; "
                    "restore that setting or the data, or start a new run"
                )
        self.position = state["position"]

    def _identity(self) -> dict[str, Any]:
        return {"size": self.size, "batch": self.batch, "seed": self.seed, "shuffle": self.shuffle}

    def _index(self, sample: int) -> int:
        epoch, offset = divmod(sample, self.size)
        if not self.shuffle:
            return offset
        if epoch not in self._orders:
            # A batch spans two epochs at most. NumPy promises that the raw bits stay the same in all versions; what
            # permutation() makes of them it does not.
            self._orders = {key: order for key, order in self._orders.items() if key == epoch - 1}
            bits = np.random.Philox(np.random.SeedSequence([self.seed, epoch])).random_raw(self.size)
            self._orders[epoch] = np.argsort(bits, kind="stable")
        return int(self._orders[epoch][offset])
