"""Questions to a language model behind an OpenAI-compatible endpoint, and what they cost."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from reward_models.endpoint import Endpoint, EndpointError, complete
from reward_models.judge.cache import AnswerCache

_REFUSED = (401, 403, 404)  # the key, the account or the model is wrong: so it will be for every question


class Answer(NamedTuple):
    text: str
    whole: bool  # not cut by the length limit: "Score: 1" may have been going to be 10


@dataclass
class Usage:
    """What was asked and what it took."""

    requests: int = 0  # answered over the network
    cached: int = 0  # answered from disk
    retries: int = 0
    failed: int = 0  # questions without an answer
    unreadable: int = 0  # answers without a verdict
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0  # in the prices' currency

    def add(self, other: Usage) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def __str__(self) -> str:
        cost = f", cost {self.cost:.4f}" if self.cost else ""
        return (
            f"{self.requests} requests, {self.cached} from the cache, {self.retries} retries, {self.failed} failed,"
            f" {self.unreadable} unreadable, {self.prompt_tokens} prompt and {self.completion_tokens} completion"
            f" tokens{cost}"
        )


class Chat:
    """A model that answers questions, each one alone, several at once.

    Args:
        options: fields of the request beside the model and the messages.
        cache: None keeps nothing.
        prices: of a million tokens, "prompt" and "completion".
        deadline_s: of a round of questions as a whole.
        concurrency: questions under way at a time.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        *,
        options: Mapping[str, Any],
        cache: AnswerCache | None,
        prices: Mapping[str, float],
        deadline_s: float,
        concurrency: int,
    ) -> None:
        self.endpoint, self.model, self.options, self.cache, self.prices = endpoint, model, options, cache, prices
        self.deadline_s, self.concurrency = deadline_s, concurrency

    def ask(self, questions: Sequence[str], usage: Usage) -> dict[str, Answer | None]:
        """Each distinct question's answer, None where there was none in time; `usage` is added to.

        Raises:
            EndpointError: not one question was answered.
        """
        if self.cache is not None:
            self.cache.refresh()
        answers: dict[str, Answer | None] = {}
        open_questions: dict[str, bytes] = {}
        for question in dict.fromkeys(questions):
            body = self._body(question)
            answers[question] = self._kept(body)
            if answers[question] is None:
                open_questions[question] = body
        usage.cached += len(answers) - len(open_questions)
        retries = self.endpoint.retries_made
        try:
            failures = complete(self._ask(open_questions, answers, usage)) if open_questions else []
        finally:
            usage.retries += self.endpoint.retries_made - retries
        usage.failed += len(failures)
        if failures and len(failures) == len(answers):
            raise failures[0]
        return answers

    async def _ask(
        self, questions: Mapping[str, bytes], answers: dict[str, Answer | None], usage: Usage
    ) -> list[EndpointError]:
        """Fills in the answers; returns the failures, the first that happened first."""
        until = asyncio.get_running_loop().time() + self.deadline_s
        free = asyncio.Semaphore(self.concurrency)
        failures: list[EndpointError] = []
        answered = 0

        async def ask(question: str, body: bytes) -> None:
            nonlocal answered
            async with free:
                # Do not spend every question's retries on a key that is wrong, or on a server that is not there.
                hopeless = [f for f in failures if f.status in _REFUSED or (f.status is None and not answered)]
                if hopeless:
                    failures.append(hopeless[0])
                    return
                try:
                    answer = self._read(await self.endpoint.post(client, body, until), body, usage)
                except EndpointError as error:
                    failures.append(error)
                else:
                    answers[question] = answer
                    answered += 1

        async with self.endpoint.client(self.concurrency) as client, asyncio.TaskGroup() as tasks:
            for question, body in questions.items():
                tasks.create_task(ask(question, body))
        return failures

    def _body(self, question: str) -> bytes:
        """The request. Its hash is the cache's key: of the model, the messages and the options, and of nothing else."""
        messages = [{"role": "user", "content": question}]
        return json.dumps({**self.options, "model": self.model, "messages": messages}, sort_keys=True).encode()

    def _kept(self, body: bytes) -> Answer | None:
        row = self.cache and self.cache.get(_key(body))
        if not row or not isinstance(row.get("text"), str) or not isinstance(row.get("whole"), bool):
            return None
        return Answer(row["text"], row["whole"])

    def _read(self, reply: Any, body: bytes, usage: Usage) -> Answer:
        try:
            choice = reply["choices"][0]
            text, whole = choice["message"].get("content"), choice.get("finish_reason") != "length"
            spent = reply.get("usage") or {}
            tokens = {name: int(spent.get(f"{name}_tokens") or 0) for name in ("prompt", "completion")}
        except (AttributeError, KeyError, IndexError, TypeError, ValueError):
            raise EndpointError(f"{self.endpoint.url}: the reply is no chat completion") from None
        answer = Answer(text if isinstance(text, str) else "", whole)
        if self.cache is not None:
            self.cache.put(_key(body), answer._asdict())
        usage.requests += 1
        usage.prompt_tokens += tokens["prompt"]
        usage.completion_tokens += tokens["completion"]
        usage.cost += sum(tokens[name] * price for name, price in self.prices.items()) / 1e6
        return answer


def _key(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
