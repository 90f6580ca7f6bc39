"""docs/coming_from.md: each name on its left is TRL's, each on its right is ours."""

import dataclasses
import re

import pytest
from test_docs import ROOT, keys_of

from agrpo.config import STAGES
from agrpo.config.trl import is_flat

PAGE = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
STAGE_OF = {"GRPOConfig": "agrpo", "SFTConfig": "sft", "RewardConfig": "reward"}
ENVIRONMENT = {"NPROC", "NNODES"}
OURS = {stage: {*keys_of(stage), "data.columns", "method"} for stage in STAGES}
SECTIONS = {f"{key.rsplit('.', n)[0]}" for keys in OURS.values() for key in keys for n in range(1, key.count(".") + 1)}


def tables():
    """(heading of the left column, [(left names, right names, remark)])."""
    for table in re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in line.strip("| \n").split(" | ")] for line in table.splitlines()]
        names = [[re.findall(r"`([^`]+)`", cell) for cell in row[:2]] + [" ".join(row[2:])] for row in rows]
        yield head[0], names


def test_the_tables_are_read():
    found = [head for head, _ in tables()]
    assert found == ["GRPOConfig", "SFTConfig", "RewardConfig", "argument", "argument", "key"]
    assert all(len(rows) >= 3 for _, rows in tables())


@pytest.mark.parametrize(("head", "rows"), list(tables()), ids=lambda value: value if isinstance(value, str) else "")
def test_every_name_on_the_right_is_a_key(head, rows):
    known = OURS[STAGE_OF[head]] if head in STAGE_OF else set().union(*OURS.values())
    for left, right, remark in rows:
        assert left and (right or remark.strip("— ")), f"{left}: says nothing"
        for name in right:
            assert name in known | SECTIONS | ENVIRONMENT, f"{left}: {name} is no key"


@pytest.mark.parametrize("head", STAGE_OF)
def test_every_name_on_the_left_is_trls(head):
    trl = pytest.importorskip("trl")
    fields = {field.name for field in dataclasses.fields(getattr(trl, head))}
    (rows,) = [rows for found, rows in tables() if found == head]
    for left, _, _ in rows:
        assert set(left) <= fields, f"{head} has no {set(left) - fields}"


@pytest.mark.parametrize("head", STAGE_OF)
def test_trls_names_are_understood(head):
    """In a file of ours, as the page promises: taken over, or refused with what to do."""
    stage = STAGE_OF[head]
    own = {field.alias or name for name, field in STAGES[stage].model_fields.items()}
    (rows,) = [rows for found, rows in tables() if found == head]
    for left, _, _ in rows:
        assert all(name in own or is_flat(name, stage) for name in left), left
