"""Sampling in other processes, on this machine or on others (`agrpo serve-rollout`): weights go there, completions come
back, over HTTP with a token.

GET  /health    {"status": "ok"}, for everyone
GET  /model     Described: what the server computes
POST /weights   some weights as safetensors; the headers say whose they are, and which part is the last
POST /generate  Asked → lengths, tokens, logp and finished of the completions, as safetensors

Weights carry a label, the run and its weight version. A server samples only for a request that names the label it
holds, and says it again with what it returns: completions of other weights are an error.
"""

from __future__ import annotations

import functools
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, TypeVar

import httpx2
import torch
from pydantic import Field
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from agrpo.config import Section, ServersConfig
from agrpo.engine import distributed
from agrpo.engine.backends.checking import require_policy
from agrpo.engine.backends.native import Sampling
from agrpo.engine.modules import Policy, whole_weights
from agrpo.network import is_loopback, is_token
from agrpo.types import InputError, Prompt, Rollout

LABEL, LAST = "Agrpo-Weights", "Agrpo-Last-Part"  # headers
TENSORS = "application/octet-stream"
PART_BYTES = 256 << 20  # of weights in one request; a larger tensor goes alone
_CONNECT_S = 10.0
_ATTEMPTS = 3  # to connect
_NO_VERSION = -1

Item = TypeVar("Item")
Result = TypeVar("Result")


class RolloutServerError(InputError):
    """A server that cannot be used: the message names it, and says what to do."""


class AskedPrompt(Section):
    ids: Annotated[list[int], Field(min_length=1)]
    slot: int


class Asked(Section):
    """What /generate is asked: the arguments of `RolloutBackend.generate`."""

    prompts: Annotated[list[AskedPrompt], Field(min_length=1)]
    counts: list[Annotated[int, Field(ge=1)]]
    sampling: Sampling
    key: tuple[int, int]
    first: int


class Described(Section):
    """What a server computes."""

    backend: str
    dtype: str
    stop: list[int]
    longest: int | None  # tokens of a prompt and its completion
    weights: dict[str, list[int]]  # name → shape


class RemoteBackend:
    """Samples on servers, each prompt with all its completions on one of them.

    Args:
        policy: what trains, or at ZeRO-3 the whole copy of it.
        tokenizer: decodes the texts.
        stop: token ids that end a completion.
        servers: where they are.
        longest: tokens of the longest prompt and completion to come, where known.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[int],
        servers: ServersConfig,
        longest: int | None = None,
    ) -> None:
        self.policy, self.tokenizer, self.stop = policy, tokenizer, list(stop)
        self.weight_version = _NO_VERSION
        self._run = distributed.gather_objects(secrets.token_hex(8))[0]  # another run's version 3 is not this one's
        self._checked = False
        self._pending: threading.Thread | None = None
        self._servers = _on_every_rank(lambda: [_Server(url, servers) for url in servers.urls])
        _on_every_rank(lambda: self._require_same_model(longest))

    def _require_same_model(self, longest: int | None) -> None:
        own = {name: list(weight.shape) for name, weight in whole_weights(self.policy)}
        dtype = str(self.policy.head.dtype).removeprefix("torch.")
        for server in self._servers:
            its = Described.model_validate_json(server.ask("GET", "/model").content)
            mend = "start it again with --model on the folder that this run starts from"
            if its.weights != own:
                odd = sorted(name for name in its.weights.keys() | own.keys() if its.weights.get(name) != own.get(name))
                raise RolloutServerError(f"{server.url}: serves another model ({odd[0]} differs): {mend}")
            if its.dtype != dtype:
                raise RolloutServerError(
                    f"{server.url}: computes in {its.dtype}, this run in {dtype}: start it again with --dtype {dtype}"
                )
            if sorted(its.stop) != sorted(self.stop):
                raise RolloutServerError(
                    f"{server.url}: ends completions at tokens {its.stop}, not {self.stop}: {mend}"
                )
            if its.longest is not None and longest is not None and its.longest < longest:
                raise RolloutServerError(
                    f"{server.url}: takes {its.longest} tokens of prompt and completion, this run needs {longest}:"
                    f" start it again with --longest {longest}"
                )

    # Weights

    def follow(self, weight_version: int) -> None:
        """Send the policy's weights to every server if they are newer. Every rank must call it."""
        if self.weight_version == weight_version:
            return
        if self._pending is not None:
            self._pending.join()  # it samples from the weights of before
        distributed.barrier()
        _on_every_rank(lambda: distributed.rank() == 0 and self._send(self._label(weight_version)))
        self.weight_version = weight_version

    def rest(self) -> None:
        """The servers hold nothing of this process's memory."""

    def _label(self, weight_version: int) -> str:
        return f"{self._run}:{weight_version}"

    def _send(self, label: str) -> None:
        for body, last in _parts(whole_weights(self.policy)):
            headers = {LABEL: label, LAST: str(int(last)), "Content-Type": TENSORS}
            send = functools.partial(_Server.ask, method="POST", path="/weights", content=body, headers=headers)
            _together(send, self._servers)

    # Generation

    def generate(
        self,
        prompts: Sequence[Prompt],
        counts: Sequence[int],
        sampling: Sampling,
        key: tuple[int, int],
        first: int = 0,
    ) -> Rollout:
        """Sample counts[p] completions of each prompt, as the servers' own backend does."""
        rollout = self._ask(prompts, counts, sampling, key, first)
        if not self._checked and len(rollout.lengths):
            require_policy(self.policy, rollout, sampling, "server")
            self._checked = True
        return rollout

    def begin(
        self, prompts: Sequence[Prompt], counts: Sequence[int], sampling: Sampling, key: tuple[int, int]
    ) -> Callable[[], Rollout]:
        """`generate`, without waiting for it: what is returned waits. The policy may be updated meanwhile."""
        if not self._checked:  # the check reads the policy as it is now
            rollout = self.generate(prompts, counts, sampling, key)
            return lambda: rollout
        wait, self._pending = _beside(lambda: self._ask(prompts, counts, sampling, key, 0))
        return wait

    def _ask(
        self,
        prompts: Sequence[Prompt],
        counts: Sequence[int],
        sampling: Sampling,
        key: tuple[int, int],
        first: int,
    ) -> Rollout:
        label = self._label(self.weight_version)
        wanted = [p for p, count in enumerate(counts) if count]
        shares = [wanted[s :: len(self._servers)] for s in range(len(self._servers))]
        busy = [(server, share) for server, share in zip(self._servers, shares, strict=True) if share]

        def ask(one: tuple[_Server, list[int]]) -> dict[str, Tensor]:
            server, share = one
            asked = Asked(
                prompts=[AskedPrompt(ids=list(prompts[p].ids), slot=prompts[p].slot) for p in share],
                counts=[counts[p] for p in share],
                sampling=sampling,
                key=key,
                first=first,
            )
            headers = {LABEL: label, "Content-Type": "application/json"}
            reply = server.ask("POST", "/generate", content=asked.model_dump_json(), headers=headers)
            return server.completions(reply, label, sum(counts[p] for p in share))

        replies = _together(ask, busy)
        found: dict[int, list[tuple[Tensor, Tensor, bool]]] = {p: [] for p in range(len(prompts))}
        for (_, share), its in zip(busy, replies, strict=True):
            owners = [p for p in share for _ in range(counts[p])]
            lengths = its["lengths"].tolist()
            rows = zip(its["tokens"].split(lengths), its["logp"].split(lengths), its["finished"].tolist(), strict=True)
            for p, row in zip(owners, rows, strict=True):
                found[p].append(row)
        rows = [row for p in found for row in found[p]]
        tokens = [row[0] for row in rows]
        return Rollout(
            prompts=tuple(prompts),
            group=torch.arange(len(prompts)).repeat_interleave(torch.tensor(counts, dtype=torch.long)),
            lengths=torch.tensor([len(t) for t in tokens], dtype=torch.long),
            tokens=torch.cat([torch.zeros(0, dtype=torch.long), *tokens]),
            logp=torch.cat([torch.zeros(0), *(row[1] for row in rows)]),
            finished=torch.tensor([row[2] for row in rows], dtype=torch.bool),
            texts=tuple(self.tokenizer.batch_decode([t.tolist() for t in tokens], skip_special_tokens=True)),
            weight_version=int(label.rpartition(":")[2]),
        )


class _Server:
    """One server: requests, and errors that name it."""

    def __init__(self, url: str, settings: ServersConfig) -> None:
        self.url, self._settings = url.rstrip("/"), settings
        try:
            parsed = httpx2.URL(url)
        except httpx2.InvalidURL as error:
            raise RolloutServerError(f"rollout.servers.urls: {url!r}: {error}") from None
        if parsed.userinfo:  # not quoted: it is a secret
            raise RolloutServerError("rollout.servers.urls: one has a user or password in it; use token_env")
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise RolloutServerError(f"rollout.servers.urls: {url!r}: write http://HOST:PORT or https://HOST")
        local = is_loopback(parsed.host)
        if parsed.scheme == "http" and not local and not settings.allow_plain_http:
            raise RolloutServerError(
                f"rollout.servers.urls: {url}: http would carry the token and the weights to {parsed.host} in the open;"
                " use https or a tunnel, or say allow_plain_http: true"
            )
        token = os.environ.get(settings.token_env, "")
        if not is_token(token):
            raise RolloutServerError(
                f"rollout.servers.token_env: the environment variable {settings.token_env} holds no token: set it to"
                " the one that agrpo serve-rollout has"
            )
        self._client = httpx2.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=httpx2.Timeout(settings.timeout_s, connect=_CONNECT_S),
            trust_env=not local,
        )

    def ask(self, method: str, path: str, **content: Any) -> httpx2.Response:
        for attempt in range(_ATTEMPTS):
            try:
                reply = self._client.request(method, path, **content)
                break
            except httpx2.ConnectError as error:
                if attempt + 1 == _ATTEMPTS:
                    raise self._failed(f"{error}; nothing listens there") from None
                time.sleep(2**attempt / 2)
            except httpx2.TimeoutException:
                raise self._failed(
                    f"no answer within {self._settings.timeout_s:g} s (rollout.servers.timeout_s)"
                ) from None
            except httpx2.RequestError as error:
                raise self._failed(f"{type(error).__name__}: {error}") from None
        if not reply.is_success:
            raise self._failed(f"{path} answers {reply.status_code}: {' '.join(reply.text.split())[:500]}")
        return reply

    def completions(self, reply: httpx2.Response, label: str, count: int) -> dict[str, Tensor]:
        """The tensors of a reply, which must be of the weights that were asked for."""
        if reply.headers.get(LABEL) != label:
            raise self._failed(f"sampled from weights {reply.headers.get(LABEL)}, not from {label}")
        its = load(reply.content)
        total = int(its["lengths"].sum())
        if not (
            len(its["lengths"]) == len(its["finished"]) == count and len(its["tokens"]) == len(its["logp"]) == total
        ):
            raise self._failed(f"{len(its['lengths'])} completions came, {count} were asked for")
        return its

    def _failed(self, reason: str) -> RolloutServerError:
        return RolloutServerError(
            f"rollout server {self.url}: {reason}; start agrpo serve-rollout there and run again: a run with"
            " checkpoints resumes"
        )


def _parts(weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[bytes, bool]]:
    """Safetensors of at most PART_BYTES each, and whether it is the last."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, weight in weights:
        own = weight.numel() * weight.element_size()
        if part and size + own > PART_BYTES:
            yield save(part), False
            part, size = {}, 0
        part[name] = weight.contiguous().cpu()
        size += own
    yield save(part), True


def _beside(work: Callable[[], Result]) -> tuple[Callable[[], Result], threading.Thread]:
    """Do it in a thread that does not keep the process alive; returns what waits for its result."""
    outcome: list[tuple[Result | None, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((work(), None))
        except BaseException as error:  # raised again where its result is asked for
            outcome.append((None, error))

    def wait() -> Result:
        thread.join()
        result, error = outcome[0]
        if error is not None:
            raise error
        return result

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return wait, thread


def _together(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """work(item) for all of them at once; the first one's error if some fail."""
    return [wait() for wait in [_beside(functools.partial(work, item))[0] for item in items]]


def _on_every_rank(work: Callable[[], Result]) -> Result:
    """Do it, and raise on every rank what went wrong on any: none waits for one that has given up."""
    result, failure = None, None
    try:
        result = work()
    except RolloutServerError as error:
        failure = str(error)
    for message in distributed.gather_objects(failure):
        if message is not None:
            raise RolloutServerError(message)
    return result
