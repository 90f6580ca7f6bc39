"""The page around a report's data: one HTML file, style, script and data inside, and a policy that allows no more."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from agrpo.reporting.files import replace, to_json
from agrpo.reporting.report.gather import gather

NAME = "report.html"
MOST_BYTES = 3_000_000
SAMPLE_BYTES = 1_200_000


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Writes the report of the runs, whole or not at all; the same runs give the same bytes."""
    replace(out, [report(runs)])
    return out


def report(runs: Sequence[Path], *, live: bool = False) -> str:
    """The HTML; fewer samples where it would otherwise pass MOST_BYTES.

    Args:
        live: the page asks its server for new data.
    """
    budget = SAMPLE_BYTES
    page = render(gather(runs, budget), live=live)
    while len(page.encode()) > MOST_BYTES and budget > 1000:
        budget //= 2
        page = render(gather(runs, budget), live=live)
    return page


def render(data: dict[str, Any], *, live: bool = False) -> str:
    """Data of a run is text to the browser. As JSON it cannot end its own element, and no script but ours may run."""
    style, script = _part("page.css"), _part("page.js")
    source = "'self'" if live else "'none'"
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; connect-src {source};"
        " base-uri 'none'; form-action 'none'"
    )
    names = [run["name"] for run in data["runs"]]
    title = names[0] if len(names) == 1 else f"{len(names)} runs compared"
    filled = {
        "LIVE": " data-live" if live else "",
        "POLICY": policy,
        "TITLE": html.escape(f"{title}: agrpo report"),
        "STYLE": style,
        "SCRIPT": script,
        "DATA": embedded(data),
    }
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda place: filled[place[1]], _part("page.html"))


def embedded(data: dict[str, Any]) -> str:
    """Strict ASCII JSON without <, > and &: nothing in it can be read as markup."""
    text = json.dumps(json.loads(to_json(data)), separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _part(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
