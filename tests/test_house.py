"""The rooms of the house, and who may import whom. The picture is in docs; this is the check."""

import ast
import sys
from pathlib import Path

import pytest

# A room may import its own level and the levels below it. A module that is in no list is at the top, beside the
# command line: it may import everything, and nothing below may import it.
LEVELS = [
    {"types", "algorithms", "import_paths", "network", "places"},
    {"yaml_input", "job", "config", "data", "environments", "models"},
    {"engine"},
    {"training", "evaluation", "reporting"},
]
TOP = len(LEVELS)
ALGORITHMS_MAY_IMPORT = {"torch", "scipy"} | sys.stdlib_module_names
ONE_FILE_EACH = ("vllm", "deepspeed", "peft")


def level(room: str) -> int:
    return next((i for i, rooms in enumerate(LEVELS) if room in rooms), TOP)


def imports(file: Path, package: tuple[str, ...]) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of every import in a file, those inside functions too.

    `from agrpo import config` counts as agrpo.config: whether a name is a module or not does not show in the source.
    """
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += (node.module or "").split(".") if node.module else []
            if len(base) == 1:
                found += [(node.lineno, f"{base[0]}.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, ".".join(base)))
    return found


def violations(root: Path) -> list[str]:
    """Each import under root that runs the wrong way, as 'file:line: what and why'."""
    wrong: list[str] = []
    importers: dict[str, set[Path]] = {name: set() for name in ONE_FILE_EACH}
    for top in ("agrpo", "reward_models", "stages"):
        for file in sorted((root / top).rglob("*.py")):
            path = file.relative_to(root)
            room = path.with_suffix("").parts[1]
            for line, name in imports(file, path.parent.parts):
                target, *rest = name.split(".")
                reason = None
                if target in importers:
                    importers[target].add(path)
                if top == "agrpo":
                    reason = _inside_agrpo(room, target, rest)
                elif top == "reward_models" and target == "stages":
                    reason = "rewards do not know the stages"
                if reason:
                    wrong.append(f"{path}:{line}: imports {name}: {reason}")
    for name, files in importers.items():
        if len(files) > 1:
            wrong.append(f"{name} is imported in {', '.join(map(str, sorted(files)))}: one file may")
    return wrong


def _inside_agrpo(room: str, target: str, rest: list[str]) -> str | None:
    if target in ("reward_models", "stages", "tests"):
        return f"agrpo never imports {target}"
    if room == "algorithms":
        own = target == "agrpo" and rest[:1] == ["algorithms"]
        return (
            None
            if own or target in ALGORITHMS_MAY_IMPORT
            else "algorithms import torch, scipy and the standard library"
        )
    if (
        target == "agrpo"
        and rest
        and not rest[0].startswith("__")
        and room != "__main__"
        and level(rest[0]) > level(room)
    ):
        return f"{room} is below {rest[0]}"
    return None


def test_imports_run_one_way():
    assert violations(Path(__file__).resolve().parent.parent) == []


@pytest.mark.parametrize(
    ("file", "source", "what"),
    [
        ("agrpo/data/records.py", "from agrpo.engine.hybrid import HybridEngine", "data is below engine"),
        ("agrpo/data/records.py", "from ..engine import hybrid", "data is below engine"),
        ("agrpo/data/records.py", "from .. import engine", "data is below engine"),
        ("agrpo/config.py", "from agrpo import training", "config is below training"),
        ("agrpo/types.py", "def f():\n    import agrpo.config", "types.py:2"),
        ("agrpo/engine/backends/native.py", "from ...launch import main", "engine is below launch"),
        ("agrpo/cli.py", "import reward_models.rules", "never imports reward_models"),
        ("agrpo/algorithms/objective.py", "from agrpo.types import Rollout", "algorithms import torch"),
        ("agrpo/algorithms/objective.py", "import numpy", "algorithms import torch"),
        ("reward_models/loader.py", "import stages.stage1_sft.main", "do not know the stages"),
    ],
)
def test_a_wrong_import_is_found(tmp_path, file, source, what):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    (found,) = violations(tmp_path)
    assert what in found


@pytest.mark.parametrize("name", ONE_FILE_EACH)
def test_a_second_importer_is_found(tmp_path, name):
    for file in ("agrpo/engine/one.py", "stages/stage1_sft/main.py"):
        path = tmp_path / file
        path.parent.mkdir(parents=True)
        path.write_text(f"from {name}.sub import thing")
    (found,) = violations(tmp_path)
    assert found.startswith(f"{name} is imported in agrpo/engine/one.py, stages/stage1_sft/main.py")


def test_right_imports_pass(tmp_path):
    sources = {
        "agrpo/algorithms/stationary.py": "import math\nimport scipy.special\nimport torch\nfrom .gae import returns",
        "agrpo/engine/hybrid.py": "import deepspeed\nfrom agrpo.types import Rollout\nfrom agrpo import __version__",
        "agrpo/reporting/summary.py": "from agrpo.training import update",
        "agrpo/launch.py": "from agrpo import cli, engine",
        "agrpo/__main__.py": "from agrpo.cli import main",
        "stages/stage1_sft/main.py": "import agrpo.training\nimport reward_models.loader",
        "reward_models/loader.py": "from agrpo.types import Reward",
    }
    for file, source in sources.items():
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    assert violations(tmp_path) == []
