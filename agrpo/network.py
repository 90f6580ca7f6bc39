"""Which addresses are this machine's own, and what a token may be."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether only this machine can be meant. A name other than localhost can come to mean any."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_token(text: str) -> bool:
    """Whether an HTTP header can carry it."""
    return bool(text) and text.isascii() and text.isprintable() and " " not in text
