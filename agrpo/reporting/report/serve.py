"""`agrpo report --serve`: the same page while the run goes on, on this machine alone, behind a token."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from agrpo.reporting.report.gather import gather
from agrpo.reporting.report.page import SAMPLE_BYTES, embedded, report

LOOPBACK = "127.0.0.1"


def server(runs: Sequence[Path], port: int) -> tuple[ThreadingHTTPServer, str]:
    """A server of the runs' page, not yet serving, and the page's address with its token.

    Only the page and its data are there, read anew at each request. A request needs the token, and a Host header that
    names this server: a page from elsewhere can neither guess the one nor send the other.
    """
    token = secrets.token_urlsafe(24)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            own = {f"{name}:{self.server.server_port}" for name in (LOOPBACK, "localhost")}
            given = parse_qs(parts.query).get("token", [""])[0]
            if self.headers.get("Host") not in own or not hmac.compare_digest(given.encode(), token.encode()):
                self._answer(403, "text/plain", "the address needs the token that `agrpo report --serve` printed\n")
            elif parts.path == "/":
                self._answer(200, "text/html", report(runs, live=True))
            elif parts.path == "/data.json":
                self._answer(200, "application/json", embedded(gather(runs, SAMPLE_BYTES)))
            else:
                self._answer(404, "text/plain", "nothing here\n")

        def _answer(self, status: int, kind: str, text: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("Referrer-Policy", "no-referrer")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("X-Frame-Options", "DENY")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Silent: a request's address holds the token."""

    found = ThreadingHTTPServer((LOOPBACK, port), Handler)
    return found, f"http://{LOOPBACK}:{found.server_port}/?token={token}"
