import json
import subprocess
import sys
from pathlib import Path

import pytest

from agrpo import cli
from agrpo.theory import TODAY, main

ROOT = Path(__file__).resolve().parent.parent


def test_one_pass_rate_as_json_has_the_promised_keys(capsys):
    assert main(["--beta", "1", "--group-size", "8", "--pass-rate", "0.3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == pytest.approx({"forward": 0.707770, "reverse": 0.770144, "symmetric": 0.727933}, abs=1e-6)


def test_the_limit_of_large_groups(capsys):
    assert main(["--beta", "1", "--group-size", "inf", "--pass-rate", "0.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["forward"] == pytest.approx((2 + 2**0.5) / 4)


def test_without_a_pass_rate_there_is_a_table(capsys):
    assert main(["--beta", "1", "--group-size", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "β = 1, groups of 8" in lines[0]
    assert [line.split()[0] for line in lines[3:]] == [f"{today:g}" for today in TODAY]
    assert lines[2].split() == ["today", "forward", "reverse", "symmetric"]
    assert ["0.3", "0.7078", "0.7701", "0.7279"] in [line.split() for line in lines]

    assert main(["--beta", "1", "--group-size", "8", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["pass_rate"] for row in rows] == list(TODAY)
    assert rows[0].keys() == {"pass_rate", "forward", "reverse", "symmetric"}


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"--beta": "-1"}, "--beta: must be a number, 0 or more, got -1"),
        ({"--beta": "nan"}, "--beta"),
        ({"--beta": "small"}, "got small"),
        ({"--group-size": "1"}, "--group-size: must be a whole number from 2, or inf, got 1"),
        ({"--group-size": "2.5"}, "--group-size"),
        ({"--group-size": "nan"}, "--group-size"),
        ({"--pass-rate": "30"}, "--pass-rate: must be between 0 and 1, got 30"),
        ({"--plot": "there/is/no/such/folder/a.png"}, "--plot"),
        ({"--plot": "picture.xyz"}, "--plot"),
    ],
)
def test_a_bad_value_exits_2_and_says_which(changed, what, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    options = {"--beta": "1", "--group-size": "8", "--pass-rate": "0.3"} | changed
    monkeypatch.setattr(sys, "argv", ["agrpo", "theory", *(f"{name}={value}" for name, value in options.items())])
    try:
        code = cli.main()
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert what in capsys.readouterr().err


def test_the_plot_is_drawn(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "reach.png"
    assert main(["--beta", "0.5", "--group-size", "8", "--pass-rate", "0.3", "--plot", str(out)]) == 0
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert str(out) in capsys.readouterr().out


def test_the_answer_does_not_wait_for_torch():
    program = (
        "import sys; sys.argv = 'agrpo theory --beta 1 --group-size 8 --pass-rate 0.3 --json'.split()\n"
        "from agrpo.cli import main; code = main(); heavy = {'torch', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(code or ', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
