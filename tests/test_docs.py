"""The docs and the code name the same settings, with the same types and defaults, the same rules and files."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from agrpo.config import METHODS, PREFERENCE_METHODS, STAGES
from reward_models import rules

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
# Where a heading's tables apply, and which of them a stage's keys are found under.
EVERY, SFT, PREFERENCES, REWARD, POLICY = "Every stage", "Stage 1", "Preferences", "Stage 2", "Stage 3"
GRADING = "Grading"
STAGES_OF = {
    EVERY: ("sft", "reward", "agrpo"),
    GRADING: ("sft", "agrpo"),
    SFT: ("sft",),
    PREFERENCES: ("preferences",),
    REWARD: ("reward",),
    POLICY: ("agrpo",),
}
HEADINGS_OF = {
    "sft": (EVERY, GRADING, SFT),
    "preferences": (EVERY, POLICY, PREFERENCES),
    "reward": (EVERY, REWARD),
    "agrpo": (EVERY, GRADING, POLICY),
}
# Sections that stand in several places and are described in one.
ELSEWHERE = ("evaluation.data.", "evaluation.test.", "evaluation.rewards[].", "objective.group_loss.ranked.data.")


def type_of(node: dict[str, Any]) -> str:
    """A JSON schema's node in the words of the tables: `float in (0, 1]`, `one of 0, 1`, `str or null`."""
    if "anyOf" in node:
        return " or ".join(type_of(one) for one in node["anyOf"])
    if "enum" in node or "const" in node:
        return "one of " + ", ".join(map(str, node.get("enum", [node.get("const")])))
    if "prefixItems" in node:
        return f"{len(node['prefixItems'])} × {type_of(node['prefixItems'][0])}"
    if "$ref" in node:
        return "section"
    if node["type"] == "array":
        return f"list of {type_of(node['items'])}"
    if node["type"] in ("integer", "number"):
        return {"integer": "int", "number": "float"}[node["type"]] + _bounds(node)
    named = {"string": "str", "boolean": "bool", "object": "mapping", "null": "null"}[node["type"]]
    return "path" if node.get("format") == "path" else named


def _bounds(node: dict[str, Any]) -> str:
    low = next((f"{mark}{node[key]:g}" for key, mark in _LOW.items() if key in node), None)
    high = next((f"{node[key]:.10g}{mark}" for key, mark in _HIGH.items() if key in node), None)
    if low and high:
        return f" in {low}, {high}"
    return "" if low is None else f" {'≥' if low[0] == '[' else '>'} {low[1:]}"


_LOW = {"minimum": "[", "exclusiveMinimum": "("}
_HIGH = {"maximum": "]", "exclusiveMaximum": ")"}


def keys_of(stage: str) -> dict[str, tuple[str, str]]:
    """Every key of a stage that can be set: dotted path → (type, default)."""
    schema = STAGES[stage].model_json_schema()
    found: dict[str, tuple[str, str]] = {}

    def walk(node: dict[str, Any], path: str, defaults: dict[str, Any]) -> None:
        for name, field in node["properties"].items():
            key = f"{path}{name}"
            default = defaults.get(name, field.get("default", ...))
            nested = [one for one in (field, *field.get("anyOf", ()), field.get("items", {})) if "$ref" in one]
            if "$ref" not in field:
                found[key] = (type_of(field), "required" if default is ... else _yaml(default))
            for one in nested:
                inside = f"{key}[]." if field.get("type") == "array" else f"{key}."
                if not inside.startswith(ELSEWHERE):
                    section = schema["$defs"][one["$ref"].rsplit("/", 1)[-1]]
                    walk(section, inside, default if isinstance(default, dict) else {})

    walk(schema, "", {})
    return found


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1000, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def documented() -> dict[str, dict[str, tuple[str, str]]]:
    """The rows of the tables: heading → key → (type, default)."""
    tables: dict[str, dict[str, tuple[str, str]]] = {heading: {} for heading in STAGES_OF}
    heading = ""
    for line in TEXT.splitlines():
        if line.startswith("## "):
            heading = next((known for known in STAGES_OF if line[3:].startswith(known)), "")
        if heading and (row := re.match(r"\| `([^`]+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", line)):
            key, kind, default, meaning = (cell.strip() for cell in row.groups())
            assert key not in tables[heading], f"{key} stands twice under {heading}"
            assert meaning, f"{key} has no meaning"
            tables[heading][key] = (kind, default.strip("`"))
        elif heading and line.startswith("| `"):
            raise AssertionError(f"not a row of four cells: {line}")
    return tables


@pytest.mark.parametrize("stage", STAGES)
def test_every_key_is_documented_with_its_type_and_default(stage):
    tables = documented()
    rows = {key: row for heading in HEADINGS_OF[stage] for key, row in tables[heading].items()}
    for key, expected in keys_of(stage).items():
        assert key in rows, f"docs/configuration.md does not name {key} of stage {stage}"
        assert rows[key] == expected, f"{key} of stage {stage}"


@pytest.mark.parametrize("heading", STAGES_OF)
def test_every_documented_key_exists(heading):
    rows = documented()[heading]
    assert rows
    for stage in STAGES_OF[heading]:
        assert set(rows) - set(keys_of(stage)) == set(), f"{heading}: not in the configuration of stage {stage}"


def test_every_preset_is_documented_setting_by_setting():
    def settings(values, path=""):
        for key, value in values.items():
            if isinstance(value, dict):
                yield from settings(value, f"{path}{key}.")
            else:
                yield f"{path}{key}", value

    presets = TEXT[TEXT.index("## Presets") :]
    of_stage_3, of_stage_2 = presets.split("\nOf stage 2:\n")
    listed = [(of_stage_3, *item) for item in METHODS.items()]
    for text, method, values in [*listed, *((of_stage_2, *item) for item in PREFERENCE_METHODS.items())]:
        (row,) = re.findall(rf"^\| `{method}` \|.*$", text, re.MULTILINE)
        told = re.findall(r"`([\w.]+)=([^`]*)`", row)
        assert [(key, yaml.safe_load(value)) for key, value in told] == list(settings(values)), method


@pytest.mark.parametrize("name", rules.__all__)
def test_every_rule_is_documented_with_its_columns_and_parameters(name):
    page = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if re.match(r"\| `", line) and f"`{name}`" in line.split("|")[1])
    parameters = inspect.signature(getattr(rules, name)).parameters.values()
    own = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "finished"}  # finished: of every reward
    assert own == set(re.findall(r"`(\w+)`", "".join(row.split("|")[2:4])))


PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("stages/*/README.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_headings_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:agrpo|reward_models|stages|configs|scripts|tests)/(?:[\w./-]*(?:/|\.\w+))?)`", text)
    for path in named:
        assert (ROOT / path).exists(), f"names {path}"
    for link, heading in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        target = page.parent / link if link else page
        assert target.exists(), f"links to {link}"
        assert not heading or heading in headings(target), f"links to {link}#{heading}"


def headings(page):
    """What a page's headings are called in links."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-") for heading in found}


EVERYWHERE = {key for stage in STAGES for key in keys_of(stage)}
SECTIONS = {key.split(".")[0] for key in EVERYWHERE if "." in key}


OURS = [page for page in PAGES if page.name != "coming_from.md"]  # which names others' keys too, and has its own test


@pytest.mark.parametrize("page", OURS, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_that_a_page_names_exist(page):
    """`objective.beta`, `engine.offload: cpu`, `seed=1`: also in sections that stand in several places."""
    spans = re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
    for span in spans:
        found = re.fullmatch(r"([a-z_]+(?:\.[a-z_]+)+)(?:(?:: |=).*)?", span)
        if (
            not found
            or found.group(1).split(".")[0] not in SECTIONS
            or re.search(r"\.(?:py|sh|md|yaml|json|txt|html)$", span)
        ):
            continue
        key = re.sub(r"^rewards\.(?=[a-z])", "rewards[].", found.group(1))
        own = any(key == one or one.startswith((f"{key}.", f"{key}[]")) for one in EVERYWHERE)
        assert own or f"{key}.".startswith(ELSEWHERE), f"{page.name} names {key}"
