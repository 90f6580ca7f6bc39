"""Sampling for runs elsewhere: `agrpo serve-rollout --model DIR`. `engine/backends/remote.py` has the protocol."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from agrpo.config import ModelConfig, RolloutConfig
from agrpo.types import InputError, Prompt, RolloutBackend
from agrpo.yaml_input import explain

try:
    from fastapi import FastAPI, HTTPException, Request, Response

    from agrpo.serving import body_of, bound, require_token, serve, token_for
except ModuleNotFoundError as error:
    if error.name not in ("fastapi", "uvicorn"):
        raise
    raise InputError(f"a rollout server needs {error.name}: pip install 'agrpo[serve]'") from None

if TYPE_CHECKING:
    from agrpo.engine.backends.remote import Asked
    from agrpo.engine.modules import Policy

TOKEN = "AGRPO_ROLLOUT_TOKEN"


class Refused(ValueError):
    """A request that cannot be served as it is. `status` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Served:
    """A policy that takes the weights it is sent and samples from them; `label` names those it holds, None if none.

    Args:
        policy: as loaded; its weights are overwritten.
        backend: samples from it; `name` is what it is called.
        stop: token ids that end a completion.
        longest: tokens of a prompt and its completion at most; None has no limit.
    """

    def __init__(
        self, policy: Policy, backend: RolloutBackend, name: str, *, stop: Sequence[int], longest: int | None = None
    ) -> None:
        from agrpo.engine.backends.remote import Described
        from agrpo.engine.modules import causal_lm, whole_weights

        self.backend = backend
        self.label: str | None = None
        self._weights = dict(whole_weights(policy))
        self._coming: str | None = None  # the label of weights that are not all here
        self._missing: set[str] = set()
        self._version = 0
        self._vocabulary = causal_lm(policy.lm).get_input_embeddings().num_embeddings
        self.description = Described(
            backend=name,
            dtype=str(policy.head.dtype).removeprefix("torch."),
            stop=list(stop),
            longest=longest,
            weights={name: list(weight.shape) for name, weight in self._weights.items()},
        )

    def take(self, label: str, tensors: bytes, last: bool) -> None:
        """Overwrite some weights; with the last of them the policy has this label."""
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            part = load(tensors)
        except (SafetensorError, ValueError) as error:
            raise Refused(422, f"not safetensors: {error}") from None
        for name, weight in part.items():
            own = self._weights.get(name)
            if own is None or own.shape != weight.shape or own.dtype != weight.dtype:
                raise Refused(422, f"{name}: {weight.dtype} {list(weight.shape)} has no place in the model served here")
        if self._coming != label:
            self.label, self._coming, self._missing = None, label, set(self._weights)
        with torch.no_grad():
            for name, weight in part.items():
                self._weights[name].copy_(weight)
        self._missing -= part.keys()
        if last:
            self._coming = None
            if self._missing:
                raise Refused(422, f"weights {label}: {len(self._missing)} did not come, {min(self._missing)} first")
            self._version += 1
            self.backend.follow(self._version)
            self.label = label

    def generate(self, label: str, asked: Asked) -> tuple[str, bytes]:
        """The label of the weights that sampled, and the completions as safetensors."""
        from safetensors.torch import save

        if self.label is None or self.label != label:
            raise Refused(409, f"holds weights {self.label}, asked for completions of {label}")
        self._require_possible(asked)
        prompts = [Prompt("", tuple(p.ids), p.slot, {}) for p in asked.prompts]
        rollout = self.backend.generate(prompts, asked.counts, asked.sampling, asked.key, asked.first)
        return self.label, save({name: getattr(rollout, name) for name in ("lengths", "tokens", "logp", "finished")})

    def _require_possible(self, asked: Asked) -> None:
        if len(asked.counts) != len(asked.prompts):
            raise Refused(422, f"{len(asked.prompts)} prompts and {len(asked.counts)} counts")
        longest = max(len(p.ids) for p in asked.prompts) + asked.sampling.max_completion_length
        limit = self.description.longest
        if limit is not None and longest > limit:
            raise Refused(422, f"{longest} tokens of prompt and completion; {limit} at most")
        if any(not 0 <= i < self._vocabulary for p in asked.prompts for i in p.ids):
            raise Refused(422, f"token ids must be in [0, {self._vocabulary})")


def application(served: Served, token: str, megabytes: float) -> FastAPI:
    """The service. Requests wait for each other, and all work is done in one thread."""
    from agrpo.engine.backends.remote import LABEL, LAST, TENSORS, Asked

    app = FastAPI(title="agrpo rollouts", docs_url=None, redoc_url=None, openapi_url=None)
    turn, thread = asyncio.Lock(), ThreadPoolExecutor(1, thread_name_prefix="rollouts")

    async def in_turn(request: Request, work: Callable[..., Any], *arguments: Any) -> Any:
        async with turn:
            if await request.is_disconnected():  # it gave up while it waited
                raise HTTPException(499, "the client is gone")
            try:
                return await asyncio.get_running_loop().run_in_executor(thread, work, *arguments)
            except Refused as refused:
                raise HTTPException(refused.status, str(refused)) from None

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/model")
    async def model(request: Request) -> Response:
        require_token(request, token)
        return Response(served.description.model_dump_json(), media_type="application/json")

    @app.post("/weights")
    async def weights(request: Request) -> dict[str, str]:
        require_token(request, token)  # before a byte of the body is read
        label, last = request.headers.get(LABEL, ""), request.headers.get(LAST) == "1"
        body = await body_of(request, TENSORS, megabytes)
        await in_turn(request, served.take, label, body, last)
        return {"label": label}

    @app.post("/generate")
    async def generate(request: Request) -> Response:
        require_token(request, token)
        try:
            asked = Asked.model_validate_json(await body_of(request, "application/json", megabytes))
        except ValidationError as error:
            raise HTTPException(422, str(error)) from None
        held, tensors = await in_turn(request, served.generate, request.headers.get(LABEL, ""), asked)
        return Response(tensors, media_type=TENSORS, headers={LABEL: held})

    return app


def _load(options: argparse.Namespace, rollout: RolloutConfig) -> Served:
    import torch

    from agrpo.engine import distributed
    from agrpo.engine.backends.build import build_backend
    from agrpo.engine.modules import Policy, cast_weights
    from agrpo.models import load_language_model, load_tokenizer, stop_ids

    config = ModelConfig(name_or_path=options.model)
    tokenizer, _ = load_tokenizer(config)
    lm = load_language_model(config, tokenizer, 0)
    longest = options.longest or getattr(lm.config, "max_position_embeddings", None)
    policy = cast_weights(Policy(lm), getattr(torch, options.dtype)).to(distributed.device()).eval()
    stop = stop_ids(tokenizer, lm)
    backend = build_backend(rollout, policy, tokenizer=tokenizer, stop=stop, longest=longest)
    return Served(policy, backend, rollout.backend, stop=stop, longest=longest)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="agrpo serve-rollout", description="Sampling for runs elsewhere.")
    parser.add_argument("--model", required=True, help="the folder that the run starts from; weights come from the run")
    parser.add_argument("--backend", choices=("native", "vllm"), default="native")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="the run's model.dtype")
    parser.add_argument("--longest", type=int, help="tokens of a prompt and its completion (default: all positions)")
    parser.add_argument("--max-sequences", type=int, default=256, help="that decode together (default: %(default)s)")
    parser.add_argument("--kv-cache-gib", type=int, default=1, help="vllm on a CPU (default: %(default)s)")
    parser.add_argument(
        "--gpu-memory-utilization", type=float, default=0.5, help="vllm on a GPU (default: %(default)s)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8124, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--allow-other-hosts", action="store_true", help="a --host that other machines can reach")
    parser.add_argument("--max-megabytes", type=float, default=4096, help="of a request (default: %(default)s)")
    options = parser.parse_args(arguments)
    # The default would end us before the token's file is gone: uvicorn raises the signal again when it has stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    vllm = {"kv_cache_gib": options.kv_cache_gib, "gpu_memory_utilization": options.gpu_memory_utilization}
    try:
        rollout = RolloutConfig(backend=options.backend, max_sequences=options.max_sequences, vllm=vllm)
        with (
            token_for(TOKEN, options.host, options.allow_other_hosts) as (token, where),
            bound(options.host, options.port) as listener,
        ):
            served = _load(options, rollout)  # after all that can be wrong quickly
            app = application(served, token, options.max_megabytes)
            serve(app, listener, f"{options.model}, by {options.backend}; the token is in {where}")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ValidationError as error:
        print(f"error: {explain(error, RolloutConfig, 'agrpo serve-rollout')}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.path.append(os.getcwd())
    raise SystemExit(main())
