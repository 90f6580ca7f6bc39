"""The process's own random generators. Sampling needs none of them; LoRA's dropout and rewards of one's own may."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_generators(seed: int, rank: int) -> None:
    """Generators whose own first state is the operating system's entropy. PyTorch's is the same on every rank."""
    torch.manual_seed(seed)
    random.seed(f"{seed}/{rank}")
    np.random.seed([seed, rank])


class RandomState:
    """The generators of Python, NumPy and PyTorch, of this process, as a checkpoint holds them."""

    def state_dict(self) -> dict[str, Any]:
        kind, keys, place, has_gauss, gauss = np.random.get_state()
        return {
            "python": list(random.getstate()),
            "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), place, has_gauss, gauss],
            "torch": torch.get_rng_state(),
            "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state["torch"])
        for own in state["cuda"]:
            torch.cuda.set_rng_state(own)
