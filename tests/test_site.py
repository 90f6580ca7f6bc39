"""The documentation site: built without a warning, and a page needs nothing from anywhere else."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import yaml
from stage_runs import ROOT


class Needs(HTMLParser):
    """What a browser would fetch to show a page: sources, style sheets, scripts, images."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag == "link" and given.get("rel") in ("canonical", "next", "prev", "edit"):
            return
        if tag != "a":
            self.addresses += [given[key] for key in ("src", "href", "data") if given.get(key)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="the site takes pip install 'agrpo[docs]'")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "WARNING" not in done.stderr
    return out


def test_every_page_of_docs_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = re.findall(r": ([\w/]+\.md)$", text, re.MULTILINE)
    pages = [str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")]
    assert sorted(named) == sorted(pages)


def test_no_page_fetches_anything_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        reader = Needs()
        reader.feed(page.read_text(encoding="utf-8"))
        assert reader.addresses
        assert not [one for one in reader.addresses if re.match(r"(?:https?:)?//", one)], page.name
        assert 'class="mermaid"' not in page.read_text(encoding="utf-8"), f"{page.name}: drawn by a script from a CDN"


def test_the_reference_shows_functions_with_their_docstrings(site):
    shown = {page.stem: page.read_text(encoding="utf-8") for page in (site / "reference").glob("*.html")}
    for name in ("rloo_advantages", "policy_loss", "reachable_pass_rate"):
        assert re.search(rf'id="agrpo\.algorithms\.\w+\.{name}"', shown["algorithms"]), name
    assert 'id="agrpo.types.Rollout"' in shown["types"]
    assert 'id="agrpo.engine.hybrid.HybridEngine.generate"' in shown["engine"]
    for name, text in shown.items():
        assert text.count("doc-heading") > 3, name


def test_the_navigation_is_grouped():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert [next(iter(group)) for group in nav] == ["Start", "Use", "Understand", "API reference"]
