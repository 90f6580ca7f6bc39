"""What a grid leaves behind its runs: tables, pictures, and results.json with every number in them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agrpo.ablation import tables
from agrpo.ablation.comparison import Comparison, compare
from agrpo.ablation.grid import Plan
from agrpo.ablation.runner import Failure
from agrpo.reporting.files import replace, to_json


def write_results(plan: Plan, failures: Sequence[Failure] = ()) -> str | None:
    """Write everything into the grid's directory.

    Returns:
        The main tables in Markdown, for a reader; None where no cell has finished.
    """
    found = compare(plan)
    if not found.cells:
        return None
    root = plan.grid.root
    made = {"table": tables.main_table(found), "side-by-side": tables.side_by_side(found)}
    made["significance"] = tables.significance(found)
    if found.verdicts:
        made["claims"] = tables.claim_table(found)
    for name, table in made.items():
        replace(root / f"{name}.md", [table.markdown()])
        replace(root / f"{name}.tex", [table.latex()])
        replace(root / f"{name}.csv", [(tables.number_table(found) if name == "table" else table).csv()])
    replace(root / "results.json", [json.dumps(json.loads(to_json(_numbers(found, failures))), indent=1), "\n"])
    pictures = _draw(found, root)
    shown = [made[name].markdown() for name in ("table", "side-by-side", "claims") if name in made]
    power = tables.what_seeds_can_show(max((d.contrast.estimate.n for d in found.differences), default=0))
    return "\n".join([*shown, power, "", _places(root, list(made), pictures)])


def _draw(found: Comparison, root: Path) -> list[Path]:
    if importlib.util.find_spec("matplotlib") is None:
        return []
    from agrpo.ablation.figures import draw_bars, draw_dynamics, draw_radars

    drawn = {"bars": draw_bars, "radar": draw_radars, "dynamics": draw_dynamics}
    paths = [draw(found, root / f"{name}.png") for name, draw in drawn.items()]
    return [path for path in paths if path is not None]


def _places(root: Path, names: list[str], pictures: list[Path]) -> str:
    lines = [f"tables    {root}/{{{','.join(names)}}}.{{md,csv,tex}}", f"numbers   {root / 'results.json'}"]
    if pictures:
        lines.append(f"pictures  {root}/{{{','.join(path.name for path in pictures)}}}")
    else:
        lines.append("pictures  none: matplotlib is not installed (pip install 'agrpo[plot]')")
    return "\n".join(lines)


def _numbers(found: Comparison, failures: Sequence[Failure]) -> dict[str, Any]:
    grid = found.plan.grid
    return {
        "grid": grid.model_dump(mode="json"),
        "versions": sorted({cell.versions for cell in found.cells}),
        "seconds": sum(cell.seconds for cell in found.cells),
        "cells": [asdict(cell) for cell in found.cells],
        "means": [asdict(line) for line in found.lines],
        "differences": [asdict(difference) for difference in found.differences],
        "beats": {row: asdict(estimate) for row, estimate in found.beats.items()},
        "claims": [
            {
                "text": v.claim.text,
                "band": tables.band(v.claim),
                "verdict": v.verdict,
                "measured": asdict(v.estimate) if v.estimate else None,
            }
            for v in found.verdicts
        ],
        "failures": [asdict(failure) for failure in failures],
    }
