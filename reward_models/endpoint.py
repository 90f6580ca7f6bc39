"""A JSON endpoint over HTTP: one question, one answer, retried until a deadline; and who may see the secret."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx2

from agrpo.network import is_loopback, is_token
from reward_models.loader import RewardError

MAX_REPLY = 64 << 20  # bytes; more is an error, not memory
_PASSING = {408, 425, 429}  # refusals that another attempt may not meet; so are those from 500 up
_LONGEST_WAIT_S = 15.0

Result = TypeVar("Result")


class EndpointError(RuntimeError):
    """No usable answer. `status` is that of the refusal, None where there was no whole reply."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Endpoint:
    """Where requests go and how long they are tried. `retries_made` counts attempts after a first one.

    Args:
        url: http or https, without a user or password in it.
        secret_env: the environment variable that holds the bearer token; None sends none.
        timeout_s: of one attempt, from connecting to the reply's last byte.
        retries: attempts after the first, where the failure may pass: no connection, no reply in time, 408, 425, 429,
            5xx. Waits double from half a second, to 15 s at most, or as long as the server asks for.
        allow_plain_http: send the secret over http to another machine, where everyone on the way can read it.

    Raises:
        RewardError: a parameter that cannot be, the variable is not set, or the secret would travel in the open.
    """

    def __init__(
        self,
        url: str,
        *,
        secret_env: str | None,
        timeout_s: float,
        retries: int,
        allow_plain_http: bool = False,
    ) -> None:
        if not timeout_s > 0 or retries < 0:
            raise RewardError(f"timeout_s must be positive and retries not negative, got {timeout_s} and {retries}")
        self.url, self.timeout_s, self.retries = url, timeout_s, retries
        self.retries_made = 0
        host = _host(url)
        self._local = is_loopback(host)
        self._secret = None if secret_env is None else _from_environment(secret_env)
        if self._secret and not self._local and not url.startswith("https:") and not allow_plain_http:
            raise RewardError(
                f"{url}: http would carry the secret of {secret_env} to {host} in the open; use https or a tunnel, or"
                " say allow_plain_http: true"
            )
        self._tls = httpx2.create_ssl_context()  # once: reading the authorities takes longer than many a reward
        self._jitter = random.Random()  # its own: the run's random streams must not depend on the network

    def client(self, connections: int) -> httpx2.AsyncClient:
        """Connections for one round of questions. The environment's proxies are for other machines only."""
        return httpx2.AsyncClient(
            headers={"Content-Type": "application/json", "Accept-Encoding": "identity"}
            | ({"Authorization": f"Bearer {self._secret}"} if self._secret else {}),
            verify=self._tls,
            timeout=None,  # ours is of the attempt as a whole; httpx2's starts anew with every byte
            limits=httpx2.Limits(max_connections=connections),
            trust_env=not self._local,
        )

    async def post(self, client: httpx2.AsyncClient, body: bytes, until: float) -> Any:
        """The JSON that the endpoint answers to a JSON body.

        Args:
            until: the event loop's time at which to give up, whatever retries are left.

        Raises:
            EndpointError: refused, unreadable, or nothing in time; the message has the last reason and no secret.
        """
        failure = "nothing was tried in the time left"
        try:
            async with asyncio.timeout_at(until):
                for attempt in range(self.retries + 1):
                    try:
                        async with asyncio.timeout(self.timeout_s):
                            return await self._attempt(client, body)
                    except _MayPassError as passing:
                        failure, asked_s = str(passing), passing.wait_s
                    except TimeoutError:
                        failure, asked_s = f"no whole reply within {self.timeout_s:g} s", 0.0
                    except httpx2.RequestError as error:
                        failure, asked_s = f"{type(error).__name__}: {error}", 0.0
                    if attempt < self.retries:
                        backoff_s = min(_LONGEST_WAIT_S, 0.5 * 2**attempt)
                        await asyncio.sleep(max(asked_s, backoff_s * self._jitter.uniform(0.5, 1.0)))
                        self.retries_made += 1
        except TimeoutError:
            raise EndpointError(f"{self.url}: no answer before the deadline; last: {self._clean(failure)}") from None
        raise EndpointError(f"{self.url}: no answer in {self.retries + 1} attempts; last: {self._clean(failure)}")

    async def _attempt(self, client: httpx2.AsyncClient, body: bytes) -> Any:
        async with client.stream("POST", self.url, content=body) as response:
            reply = bytearray()
            async for chunk in response.aiter_bytes():
                reply += chunk
                if len(reply) > MAX_REPLY:
                    raise EndpointError(f"{self.url}: a reply of more than {MAX_REPLY} bytes", response.status_code)
        if response.is_success:
            try:
                return json.loads(reply)
            except (ValueError, RecursionError):
                raise EndpointError(f"{self.url}: the reply is not JSON", response.status_code) from None
        said = f"HTTP {response.status_code}: {self._clean(reply.decode('utf-8', 'replace')) or 'without a reason'}"
        if response.status_code in _PASSING or response.status_code >= 500:
            raise _MayPassError(said, response.headers.get("Retry-After", ""))
        raise EndpointError(f"{self.url}: {said}", response.status_code)

    def _clean(self, text: str) -> str:
        """What a message may quote of another's text: without the secret, which some servers repeat, and not all."""
        if self._secret:
            text = text.replace(self._secret, "…")
        return " ".join(text.split())[:500]


class _MayPassError(Exception):
    def __init__(self, message: str, retry_after: str) -> None:
        super().__init__(message)
        self.wait_s = float(retry_after) if retry_after.isascii() and retry_after.isdigit() else 0.0


def complete(work: Coroutine[Any, Any, Result]) -> Result:
    """Run to the end from ordinary code, also in a thread that has a loop running, as a notebook's has."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def _host(url: str) -> str:
    try:
        parsed = httpx2.URL(url)
    except (httpx2.InvalidURL, TypeError) as error:
        raise RewardError(f"url {url!r}: {error}") from None
    if parsed.userinfo:  # not quoted: it is a secret
        raise RewardError(
            "url: has a user or password in it, and the configuration is kept; use an environment variable"
        )
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise RewardError(f"url {url!r}: write http://HOST:PORT or https://HOST")
    return parsed.host


def _from_environment(variable: str) -> str:
    secret = os.environ.get(variable, "")
    if not secret:
        raise RewardError(f"the environment variable {variable} is not set; it holds the secret to send")
    if not is_token(secret):
        raise RewardError(f"the environment variable {variable} holds white space or characters beyond ASCII")
    return secret
