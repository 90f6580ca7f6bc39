"""Out of memory: what it looks like, and smaller pieces instead of an end."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

from agrpo.types import InputError

if TYPE_CHECKING:
    from agrpo.engine.hybrid import HybridEngine

T = TypeVar("T")


def is_out_of_memory(error: BaseException) -> bool:
    """Did an allocation fail, on a GPU or on the host? PyTorch's CPU allocator has no exception of its own."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error)


class MicroBatches:
    """The size of a micro-batch, halved when one does not fit. The objective's denominators are the whole step's: its
    gradient stays the same, up to the order in which it is summed.

    Args:
        tokens: of a micro-batch to begin with.
        note: told of each halving.
    """

    def __init__(self, tokens: int, note: Callable[[str], None]) -> None:
        self.tokens, self._note = tokens, note

    def run(self, engine: HybridEngine, update: Callable[[int], T]) -> T:
        """`update(tokens)`, again with half the tokens when memory runs out before its optimiser step.

        Raises:
            InputError: out of memory where this process cannot begin the step again alone: other ranks, or ZeRO, have
                part of its gradient.
        """
        while True:
            try:
                return update(self.tokens)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self.tokens <= 1:
                    raise
                smaller = self.tokens // 2
                if not engine.can_begin_again:
                    raise InputError(
                        f"out of memory in an update with training.micro_batch_tokens={self.tokens}: run the same"
                        f" command with training.micro_batch_tokens={smaller}, which resumes from the last checkpoint;"
                        " the gradient stays the same"
                    ) from None
            engine.begin_again()  # outside of the handler, whose traceback holds the activations
            self.tokens = smaller
            self._note(f"out of memory in an update: micro-batches of {smaller} tokens from here on, the same gradient")
