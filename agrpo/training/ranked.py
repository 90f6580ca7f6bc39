"""Ranked data beside the sampled groups of policy optimisation: its stream of micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from agrpo.config import PolicyConfig
from agrpo.data.load import encode_groups, read_preference_groups, require_batch
from agrpo.data.streams import Stream
from agrpo.engine import distributed
from agrpo.training.batches import Sequences
from agrpo.training.preference import RankedBatch, margin_scale


class RankedData:
    """`objective.group_loss.ranked`: each `next` is this rank's groups of a step, or None where none are asked for."""

    def __init__(self, config: PolicyConfig, tokenizer: PreTrainedTokenizerBase, note: Callable[[str], None]) -> None:
        self._config = config.objective.group_loss
        self._micro_batch_tokens = config.training.micro_batch_tokens
        self._stream: Stream | None = None
        ranked = self._config.ranked
        if ranked is None:
            return
        data = read_preference_groups(ranked.data, note)
        self._groups, self._prompts, self._completions = encode_groups(data, tokenizer, ranked.max_length, note)
        where = "objective.group_loss.ranked.groups_per_step"
        require_batch(len(self._groups), ranked.groups_per_step, "preference groups", where)
        self._scale = margin_scale(self._groups)
        self._stream = Stream(
            len(self._groups), ranked.groups_per_step, config.seed, distributed.rank(), distributed.world()
        )

    def __next__(self) -> RankedBatch | None:
        if self._stream is None:
            return None
        rows = [index for _, index in next(self._stream)]
        batch = Sequences.of([self._prompts[i] for i in rows], [self._completions[i] for i in rows])
        groups = [self._groups[i] for i in rows]
        return RankedBatch(batch, groups, self._config, self._scale, self._micro_batch_tokens)

    def again(self) -> RankedBatch | None:
        """The last batch once more, for a step that is taken up in its middle."""
        if self._stream is not None:
            self._stream.position -= self._stream.batch
        return next(self)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._stream is None else self._stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._stream is not None:
            self._stream.load_state_dict(state)
