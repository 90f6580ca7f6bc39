"""A model that answers, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from agrpo.chat.settings import ChatSettings
from agrpo.config import ModelConfig
from agrpo.data.tokens import encode_prompt
from agrpo.engine import distributed
from agrpo.models import load_language_model, load_tokenizer, stop_ids
from agrpo.types import InputError, Text

Show = Callable[[Sequence[str]], None]  # the texts so far, one a sample


@dataclass(frozen=True)
class Answer:
    text: str
    ids: tuple[int, ...]  # the end token included
    finished: bool  # ended by itself, not by the length limit


class Speaker:
    """A language model and its tokenizer, on transformers' own generation, which can be watched."""

    def __init__(self, model: str, dtype: str = "float32") -> None:
        self.name = model
        config = ModelConfig(name_or_path=model)
        self.tokenizer, _ = load_tokenizer(config)
        lm = load_language_model(config, self.tokenizer, seed=0)
        self.stop = stop_ids(self.tokenizer, lm)
        self.lm = lm.to(dtype=getattr(torch, dtype), device=distributed.device()).eval()

    @torch.no_grad()
    def answer(self, prompt: Text, settings: ChatSettings, turn: int, show: Show) -> list[Answer]:
        """`settings.samples` answers, drawn together; the same turn of the same conversation draws the same ones.

        Raises:
            InputError: the conversation leaves no room in the model's positions.
        """
        ids = encode_prompt(self.tokenizer, prompt)
        longest = getattr(self.lm.config, "max_position_embeddings", None)
        room = settings.max_tokens if longest is None else min(settings.max_tokens, longest - len(ids))
        if room < 1:
            raise InputError(f"the conversation has {len(ids)} tokens, the model takes {longest}: /reset begins anew")
        watch = _Watch(self.tokenizer, self.stop, settings.samples, show)
        sampled = settings.temperature > 0
        filters = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
        tokens = torch.tensor([ids] * settings.samples, device=self.lm.device)
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed + turn)
            self.lm.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=room,
                do_sample=sampled,
                eos_token_id=self.stop,
                pad_token_id=self.tokenizer.pad_token_id,
                streamer=watch,
                **(filters if sampled else {}),
            )
        return [
            Answer(text, tuple(row), row[-1] in self.stop) for text, row in zip(watch.texts(), watch.rows, strict=True)
        ]


class _Watch(BaseStreamer):
    """Collects the tokens of several rows as they are drawn, and shows their texts."""

    def __init__(self, tokenizer: object, stop: Sequence[int], rows: int, show: Show) -> None:
        self.tokenizer, self.stop, self.show = tokenizer, frozenset(stop), show
        self.rows: list[list[int]] = [[] for _ in range(rows)]
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for row, token in zip(self.rows, value.flatten().tolist(), strict=True):
            if not row or row[-1] not in self.stop:  # what follows an end is padding
                row.append(token)
        self.show([text.rstrip("\ufffd") for text in self.texts()])  # a character whose bytes are not all there

    def end(self) -> None:
        self.show(self.texts())

    def texts(self) -> list[str]:
        return self.tokenizer.batch_decode(self.rows, skip_special_tokens=True)
