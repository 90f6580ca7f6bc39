"""A language model as judge: grades of single completions, or how many of its group's others a completion beats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reward_models.endpoint import Endpoint
from reward_models.judge.cache import AnswerCache
from reward_models.judge.chat import Chat
from reward_models.judge.prompts import PAIRWISE, SCALAR, placeholders
from reward_models.judge.scoring import Judge, PairwiseJudge, ScalarJudge
from reward_models.loader import RewardError

_OPTIONS = {"temperature": 0.0, "max_tokens": 1024}
_OURS = ("model", "messages", "stream", "n")  # of the request; options may not say them


def build(
    url: str,
    model: str,
    mode: str = "scalar",
    prompt: str | None = None,
    scale: Sequence[float] | None = None,
    rounds: int | None = None,
    options: Mapping[str, Any] | None = None,
    api_key_env: str | None = None,
    cache: str | None = None,
    prices: Mapping[str, float] | None = None,
    concurrency: int = 8,
    timeout_s: float = 60.0,
    retries: int = 3,
    deadline_s: float = 600.0,
    allow_plain_http: bool = False,
) -> Judge:
    """The judge that a configuration names; docs/rewards.md has the parameters.

    Raises:
        RewardError: a parameter that cannot be, or no key where one is named.
    """
    needs = {"scalar": {"completion"}, "pairwise": {"a", "b"}}
    if mode not in needs:
        raise RewardError(f"judge: mode is {mode!r}; there are scalar and pairwise")
    if mode != "scalar" and scale is not None:
        raise RewardError("judge: scale is of mode: scalar; a win rate is from 0 to 1")
    if mode != "pairwise" and rounds is not None:
        raise RewardError("judge: rounds is of mode: pairwise")
    template = prompt or {"scalar": SCALAR, "pairwise": PAIRWISE}[mode]
    if missing := needs[mode] - placeholders(template):
        raise RewardError(f"judge: the prompt lacks {', '.join(f'{{{name}}}' for name in sorted(missing))}")
    low, high = _scale((1, 10) if scale is None else scale)
    if rounds is not None and rounds < 1:
        raise RewardError(f"judge: rounds must be 1 or more, got {rounds}")
    if concurrency < 1 or not deadline_s > 0:
        raise RewardError(f"judge: concurrency must be 1 or more and deadline_s positive: {concurrency}, {deadline_s}")
    options = _OPTIONS if options is None else options
    if ours := sorted(set(_OURS) & set(options)):
        raise RewardError(f"judge: options may not say {', '.join(ours)}")
    prices = prices or {}
    if strange := sorted(set(prices) - {"prompt", "completion"}):
        raise RewardError(f"judge: prices are of prompt and completion, a million tokens each, not of {strange[0]}")
    endpoint = Endpoint(
        f"{url.rstrip('/')}/chat/completions",
        secret_env=api_key_env,
        timeout_s=timeout_s,
        retries=retries,
        allow_plain_http=allow_plain_http,
    )
    chat = Chat(
        endpoint,
        model,
        options=options,
        cache=None if cache is None else AnswerCache(Path(cache)),
        prices=prices,
        deadline_s=deadline_s,
        concurrency=concurrency,
    )
    return ScalarJudge(chat, template, low, high) if mode == "scalar" else PairwiseJudge(chat, template, rounds)


def _scale(scale: Sequence[float]) -> tuple[float, float]:
    numbers = [x for x in scale if isinstance(x, int | float) and math.isfinite(x)] if len(scale) == 2 else []
    if len(numbers) != 2 or not numbers[0] < numbers[1]:
        raise RewardError(f"judge: scale is {scale}, not the lowest and the highest grade, such as [1, 10]")
    return float(numbers[0]), float(numbers[1])
