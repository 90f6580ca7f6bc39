"""Rewards behind HTTP, for runs that keep them in another process: `agrpo serve-reward --config FILE`.

GET  /health   {"status": "ok"}, for everyone
POST /score    remote.Batch → remote.Reply, for whoever has the token
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from pydantic import Field, ValidationError

from agrpo.config import RewardSpec, Section
from agrpo.reporting.metrics import printable
from agrpo.types import InputError
from agrpo.yaml_input import ConfigError, explain, read_yaml
from reward_models.remote import Batch, Loss, Reply

try:
    from fastapi import FastAPI, HTTPException, Request

    from agrpo.serving import body_of, bound, require_token, serve, token_for
except ModuleNotFoundError as error:
    needed = f"a reward server needs {error.name}: pip install 'agrpo[serve]'"
    if __name__ == "__main__":
        print(f"error: {needed}", file=sys.stderr)
        raise SystemExit(2) from None
    raise ImportError(needed) from error

if TYPE_CHECKING:
    from reward_models.compose import RewardSet

TOKEN = "AGRPO_REWARD_TOKEN"


class Limits(NamedTuple):
    """Of one request."""

    completions: int
    megabytes: float


class ServedRewards(Section):
    """The configuration file: stage 3's `rewards`, and nothing else."""

    rewards: Annotated[list[RewardSpec], Field(min_length=1)]


def application(rewards: RewardSet, token: str, limits: Limits) -> FastAPI:
    """The service. Requests wait for each other: rewards need not be thread-safe, and all run in the same thread."""
    app = FastAPI(title="agrpo rewards", docs_url=None, redoc_url=None, openapi_url=None)
    turn, thread = asyncio.Lock(), ThreadPoolExecutor(1, thread_name_prefix="rewards")
    scoring = Scoring(rewards)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/score")
    async def score(request: Request) -> Reply:
        require_token(request, token)  # before a byte of the body is read
        batch = _parse(await body_of(request, "application/json", limits.megabytes))
        if len(batch.completions) > limits.completions:
            raise HTTPException(413, f"{len(batch.completions)} completions; {limits.completions} a request at most")
        async with turn:
            if await request.is_disconnected():  # it gave up while it waited, and may be asking again already
                raise HTTPException(499, "the client is gone")
            return await asyncio.get_running_loop().run_in_executor(thread, scoring, batch)

    return app


class Scoring:
    """Scores batches. Why a reward failed goes whole to stderr when it is new, and its last line to whoever asked."""

    def __init__(self, rewards: RewardSet) -> None:
        self.rewards = rewards
        self._told: dict[str, str] = {}

    def __call__(self, batch: Batch) -> Reply:
        rewards = self.rewards
        rewards.first_error.clear()  # of this batch, not of the first that any client sent
        scores = rewards.score(batch.prompts, batch.completions, batch.completion_ids, batch.columns)  # (N, K)
        errors: dict[str, Loss] = {}
        for name, lost in rewards.take_errors().items():
            reason = rewards.first_error[name].strip().splitlines()[-1][:500]
            errors[name] = Loss(scores=lost, reason=reason)
            if self._told.get(name) != reason:
                self._told[name] = reason
                whole = printable(rewards.first_error[name], sys.stderr.encoding)  # it may quote a completion
                print(f"reward {name}: {whole}", file=sys.stderr, flush=True)
        columns = {name: _or_null(scores[:, k].tolist()) for k, name in enumerate(rewards.names)}
        return Reply(scores=columns, total=_or_null(rewards.total(scores).tolist()), errors=errors)


def _or_null(scores: list[float]) -> list[float | None]:
    return [None if score != score else score for score in scores]  # NaN alone differs from itself


def _parse(body: bytes) -> Batch:
    try:
        return Batch.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)[:5]
        told = [f"{'.'.join(map(str, p['loc']))}: {p['msg'].removeprefix('Value error, ')}" for p in problems]
        raise HTTPException(422, "; ".join(line.removeprefix(": ") for line in told)) from None


def served_rewards(path: Path) -> list[RewardSpec]:
    """The rewards that a file lists.

    Raises:
        ConfigError: the file cannot be read or is wrong.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # rewards of one's own: a console script does not look there
    try:
        specs = ServedRewards.model_validate(read_yaml(path)).rewards
    except ValidationError as error:
        raise ConfigError(explain(error, ServedRewards, path)) from None
    for i, spec in enumerate(specs):
        if spec.normalise:
            raise ConfigError(
                f"{path}: rewards.{i}.normalise: the statistics belong into a run's checkpoint; say it in the run's"
                " own entry, target: reward_models.remote"
            )
    return specs


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="agrpo serve-reward", description="Rewards behind HTTP.")
    parser.add_argument("--config", type=Path, required=True, help="a YAML file with stage 3's rewards:")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8123, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--allow-other-hosts", action="store_true", help="a --host that other machines can reach")
    parser.add_argument("--max-batch", type=int, default=1024, help="completions a request (default: %(default)s)")
    parser.add_argument("--max-megabytes", type=float, default=32, help="of a request (default: %(default)s)")
    options = parser.parse_args(arguments)
    # The default would end us before the token's file is gone: uvicorn raises the signal again when it has stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        specs = served_rewards(options.config)
        with (
            token_for(TOKEN, options.host, options.allow_other_hosts) as (token, where),
            bound(options.host, options.port) as listener,
        ):
            from reward_models.configured import reward_set  # loads torch: after all that can be wrong quickly

            rewards = reward_set(specs)
            app = application(rewards, token, Limits(options.max_batch, options.max_megabytes))
            serve(app, listener, f"{', '.join(rewards.names)}; the token is in {where}")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
