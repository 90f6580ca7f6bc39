"""A reward that another process computes, over HTTP: `agrpo serve-reward`, or anything that speaks the same."""

from __future__ import annotations

import asyncio
import difflib
import json
import math
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from agrpo.types import Text
from reward_models.endpoint import Endpoint, EndpointError, complete
from reward_models.loader import RewardError


class Batch(BaseModel):
    """What is asked: N completions, as every reward is handed them."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    prompts: list[str | list[dict[str, Any]]]
    completions: list[str | list[dict[str, Any]]]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]] = {}

    @model_validator(mode="after")
    def _same_length(self) -> Self:
        count = len(self.completions)
        for name, values in {"prompts": self.prompts, "completion_ids": self.completion_ids, **self.columns}.items():
            if len(values) != count:
                raise ValueError(f"{name}: {len(values)} values for {count} completions")
        return self


class Loss(BaseModel):
    """Scores that a reward failed to give, beside those it abstained from; null stands for both."""

    scores: int
    reason: str  # the first


class Reply(BaseModel):
    """What is answered: each reward's N scores by name, the N totals as weighted there, and what was lost."""

    model_config = ConfigDict(strict=True, frozen=True)
    scores: dict[str, list[float | None]]
    total: list[float | None]
    errors: dict[str, Loss] = {}


class RemoteReward:
    """Scores completions by a reward server. One that gives no answer costs the call, never a score of 0.

    Args:
        url: of the server, such as http://127.0.0.1:8123.
        reward: which of the server's rewards to take; None for their total, weighted and gated as served.
        token_env: the environment variable with the server's token.
        timeout_s, retries, allow_plain_http: as of `Endpoint`; of each batch.
        deadline_s: of a call as a whole, of which a rollout that is scored while it is sampled takes some. Keep it well
            under the 30 minutes that other ranks wait for this one.
        batch: completions a request.

    `metrics`: of the last call, `retries` and `lost`, the scores that rewards on the server failed to give.

    Raises:
        RewardError: a parameter that cannot be, or no token.
    """

    __name__ = "remote"

    def __init__(
        self,
        url: str,
        reward: str | None = None,
        token_env: str = "AGRPO_REWARD_TOKEN",
        timeout_s: float = 30.0,
        retries: int = 3,
        deadline_s: float = 300.0,
        batch: int = 64,
        allow_plain_http: bool = False,
    ) -> None:
        if batch < 1 or not deadline_s > 0:
            raise RewardError(f"batch must be 1 or more and deadline_s positive, got {batch} and {deadline_s}")
        self.endpoint = Endpoint(
            f"{url.rstrip('/')}/score",
            secret_env=token_env,
            timeout_s=timeout_s,
            retries=retries,
            allow_plain_http=allow_plain_http,
        )
        self.reward, self.deadline_s, self.batch = reward, deadline_s, batch
        self.while_sampling = batch  # what is served may see a request as a whole: the requests are the same ones
        self.metrics = {"retries": 0, "lost": 0}

    def __call__(
        self, prompts: list[Text], completions: list[Text], completion_ids: list[list[int]], **columns: Any
    ) -> list[float | None]:
        """N scores: None where the reward abstained, NaN where it failed, which a RewardSet masks and counts.

        Keyword arguments that are no lists (TRL hands its trainer's state to rewards) are no columns and stay here.

        Raises:
            EndpointError: no answer in time or a refusal; or the server's rewards failed on every completion.
        """
        lists = {name: values for name, values in columns.items() if isinstance(values, list | tuple)}
        bodies = [
            _encode(
                prompts=prompts[start : start + self.batch],
                completions=completions[start : start + self.batch],
                completion_ids=completion_ids[start : start + self.batch],
                columns={name: values[start : start + self.batch] for name, values in lists.items()},
            )
            for start in range(0, len(completions), self.batch)
        ]
        before = self.endpoint.retries_made
        self.metrics = {"retries": 0, "lost": 0}
        try:
            replies = [_read(answer) for answer in complete(self._ask(bodies))]
        finally:
            self.metrics["retries"] = self.endpoint.retries_made - before
        scores = [score for reply in replies for score in self._chosen(reply)]
        if len(scores) != len(completions):
            raise EndpointError(f"{self.endpoint.url}: {len(scores)} scores for {len(completions)} completions")
        if self.metrics["lost"] and not any(score is not None and math.isfinite(score) for score in scores):
            reasons = {name: loss.reason for reply in reversed(replies) for name, loss in reply.errors.items()}
            told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
            raise EndpointError(f"{self.endpoint.url}: the rewards there failed. {told}")
        return scores

    async def _ask(self, bodies: list[bytes]) -> list[Any]:
        """One after the other: the server scores one batch at a time anyway."""
        until = asyncio.get_running_loop().time() + self.deadline_s
        async with self.endpoint.client(connections=1) as client:
            return [await self.endpoint.post(client, body, until) for body in bodies]

    def _chosen(self, reply: Reply) -> list[float | None]:
        if self.reward is None:
            scores, lost = list(reply.total), sum(loss.scores for loss in reply.errors.values())
        elif self.reward in reply.scores:
            scores = list(reply.scores[self.reward])
            lost = reply.errors[self.reward].scores if self.reward in reply.errors else 0
        else:
            near = difflib.get_close_matches(self.reward, reply.scores, 1) or list(reply.scores)
            raise EndpointError(f"{self.endpoint.url}: has no reward {self.reward!r}; it has {', '.join(near)}")
        self.metrics["lost"] += lost
        scores = [score if score is None or math.isfinite(score) else math.nan for score in scores]
        # A null may be an abstention or a loss; how many are losses is known. All are masked, whichever are counted.
        for i, score in enumerate(scores):
            if score is None and lost > 0:
                scores[i], lost = math.nan, lost - 1
        return scores


def _encode(columns: dict[str, Any], **given: Any) -> bytes:
    try:
        return json.dumps({**given, "columns": columns}, allow_nan=False).encode()
    except (TypeError, ValueError):
        for name, values in {**given, **columns}.items():
            try:
                json.dumps(values, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"column {name!r} cannot travel as JSON ({error}); map it to text or numbers, or drop it"
                ) from None
        raise


def _read(answer: Any) -> Reply:
    try:
        return Reply.model_validate(answer)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise EndpointError(f"the reply is not a reward server's: {where}: {first['msg']}") from None


build = RemoteReward
