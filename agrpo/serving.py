"""What the project's HTTP servers share: who may ask, how much, and where they listen."""

from __future__ import annotations

import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import uvicorn
from fastapi import FastAPI, HTTPException, Request

from agrpo.network import is_loopback, is_token
from agrpo.types import InputError

_SHORTEST_TOKEN = 16  # characters, where other machines can try


@contextmanager
def token_for(variable: str, host: str, allow_other_hosts: bool) -> Iterator[tuple[str, str]]:
    """The token and where it is: the environment's, or on loopback a new one in a file of the user's own until the end.

    Args:
        variable: of the environment, that may hold the token.

    Raises:
        InputError: other machines could connect, and that was not asked for or has no good token.
    """
    token, local = os.environ.get(variable, ""), is_loopback(host)
    if not local and not allow_other_hosts:
        raise InputError(f"--host {host}: other machines could connect; say --allow-other-hosts to mean that")
    if not local and len(token) < _SHORTEST_TOKEN:
        raise InputError(f"--host {host}: set {variable} to a token of {_SHORTEST_TOKEN} characters or more")
    if token:
        if not is_token(token):
            raise InputError(f"{variable}: holds white space or characters beyond ASCII")
        yield token, variable
        return
    descriptor, path = tempfile.mkstemp(prefix=f"{variable.lower().replace('_', '-')}-")  # mode 0600
    try:
        token = secrets.token_urlsafe(32)
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(token)
        yield token, path
    finally:
        with suppress(FileNotFoundError):
            os.unlink(path)


def require_token(request: Request, token: str) -> None:
    """Refuse with 401 whoever does not have it."""
    given = request.headers.get("Authorization", "").encode()
    if not secrets.compare_digest(given, f"Bearer {token}".encode()):
        raise HTTPException(401, "the token is missing or wrong", {"WWW-Authenticate": "Bearer"})


async def body_of(request: Request, kind: str, megabytes: float) -> bytes:
    """The request's body, refused with 415 where it is not of this media type and with 413 where it is too large."""
    if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != kind:
        raise HTTPException(415, f"send it with Content-Type: {kind}")
    limit = int(megabytes * 2**20)
    too_large = HTTPException(413, f"more than {megabytes:g} MiB in one request; send smaller batches")
    announced = request.headers.get("Content-Length", "0")
    if announced.isdigit() and int(announced) > limit:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    return bytes(body)


def bound(host: str, port: int) -> socket.socket:
    """Bound before anything loads, so that a taken port shows at once; nobody can connect until it listens."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise InputError(f"--host {host} --port {port}: {error}") from None
    return listener


def serve(app: FastAPI, listener: socket.socket, what: str) -> None:
    """Answer until a signal ends it; says on stderr where, and `what` is served."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, ws="none", lifespan="off", proxy_headers=False,
        timeout_graceful_shutdown=5,
    )  # fmt: skip
    print(f"serving at http://{shown}:{port}: {what}", file=sys.stderr, flush=True)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])
