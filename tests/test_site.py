"""The documentation site: built without a warning, and a page needs nothing from anywhere else."""

import ast
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


def test_docstrings_describe_parameters_that_exist():
    """`Args:` of every function and class in the reference; a line may be of several, `beta, group_size: …`."""
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    modules = [ROOT / f"{name.replace('.', '/')}.py" for name in re.findall(r"^::: (\S+)", pages, re.MULTILINE)]
    modules = [path if path.exists() else path.with_suffix("") / "__init__.py" for path in modules]
    assert len(modules) > 40
    described = 0
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                wrong = described_by(node) - parameters_of(node)
                assert not wrong, f"{path}:{node.lineno}: {node.name} has no {', '.join(wrong)}"
                described += len(described_by(node))
    assert described > 100


def described_by(node):
    section = re.search(r"^Args:\n((?:    .*\n|\n)+)", (ast.get_docstring(node) or "") + "\n", re.MULTILINE)
    lines = re.findall(r"^    (\*{0,2}\w+(?:, \*{0,2}\w+)*):", section.group(1), re.MULTILINE) if section else []
    return {name.strip().lstrip("*") for line in lines for name in line.split(",")}


def parameters_of(node):
    """Of a function, or of a class's `__init__` or its fields."""
    if isinstance(node, ast.ClassDef):
        fields = {one.target.id for one in node.body if isinstance(one, ast.AnnAssign)}
        return fields.union(*(parameters_of(one) for one in node.body if getattr(one, "name", "") == "__init__"))
    own = node.args
    return {one.arg for one in (*own.posonlyargs, *own.args, *own.kwonlyargs, own.vararg, own.kwarg) if one}


def test_the_navigation_is_grouped():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert [next(iter(group)) for group in nav] == ["Start", "Use", "Understand", "API reference"]
