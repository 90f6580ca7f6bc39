"""The table of commands: readable, quick to start, and every entry leads to code that is there."""

import importlib.util
import subprocess
import sys
from functools import partial

import pytest
from stage_runs import ROOT, environment

from agrpo import cli


def agrpo(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "agrpo.cli", *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True
    )


def test_help_is_a_line_for_each_command_and_imports_nothing_heavy():
    program = (
        "import sys; sys.argv = ['agrpo', '--help']\nfrom agrpo.cli import main\ncode = main()\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'yaml', 'rich'} & set(sys.modules)\n"
        "sys.exit(code or ', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()[2:]
    assert [line.split()[0] for line in lines] == list(cli.COMMANDS)
    assert max(map(len, lines)) <= 132


@pytest.mark.parametrize(
    ("typed", "said"),
    [("trian", "did you mean train?"), ("evaluate", "did you mean eval?"), ("xyzzy", "there are sft, preferences,")],
)
def test_an_unknown_command_exits_2_and_names_the_nearest(typed, said):
    done = agrpo(typed, "--config", "x.yaml")
    assert done.returncode == 2 and done.stdout == ""
    assert said in done.stderr and "agrpo --help" in done.stderr and "Traceback" not in done.stderr


def test_without_a_command_the_usage_is_an_error():
    done = agrpo()
    assert done.returncode == 2 and done.stderr.startswith("usage: agrpo COMMAND") and done.stdout == ""


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_leads_to_code_that_is_there(name):
    run = cli.COMMANDS[name].run
    if isinstance(run, partial) and run.func is cli._module:
        assert importlib.util.find_spec(run.args[0]) is not None
    elif isinstance(run, partial):
        assert (ROOT / "stages" / run.args[0]).is_file()
    else:
        assert callable(run)
