"""The optional loggers, as themselves: offline, with the names of metrics.jsonl and without secrets."""

import json
import os
import sqlite3
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from pydantic import ValidationError

from agrpo.config import common
from agrpo.config.common import LoggingConfig

ROOT = Path(__file__).resolve().parent.parent.parent
# A process of its own: both packages keep threads and read their settings once.
SCRIPT = """
import sys
from pathlib import Path
from agrpo.reporting.metrics import RunLog
config = {"seed": 7, "rewards": [{"api_key": "…redacted…"}]}
run = Path(sys.argv[1]) / "mine" / "agrpo"
with RunLog(run, "agrpo", 3, console=False, loggers=[sys.argv[2]], config=config) as log:
    for step in range(3):
        log.step(step, {"reward": 0.25 + step, "agrpo/kl_symmetric": 0.5, "loss": float("nan")})
"""


def run(tmp_path, logger):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "WANDB_MODE": "offline",
        "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
        "MY_SERVICE_TOKEN": "a-secret-of-the-environment",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), logger],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [path for path in tmp_path.rglob("*") if path.is_file()]


def holds(files, text):
    return [path for path in files if text.encode() in path.read_bytes()]


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed (pip install 'agrpo[wandb]')")
def test_wandb_offline_has_the_metrics_and_no_secret(tmp_path):
    files = run(tmp_path, "wandb")
    (record,) = [path for path in files if path.suffix == ".wandb"]
    for name in ("reward", "agrpo/kl_symmetric", "mine/agrpo"):
        assert name.encode() in record.read_bytes()
    for secret in ("0123456789abcdef0123456789abcdef01234567", "a-secret-of-the-environment"):
        assert holds(files, secret) == []


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed (pip install 'agrpo[trackio]')")
def test_trackio_has_the_metrics_of_each_step(tmp_path):
    files = run(tmp_path, "trackio")
    (database,) = [path for path in files if path.suffix == ".db"]
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select step, metrics from metrics order by step").fetchall()
    assert [step for step, _ in rows] == [0, 1, 2]
    assert [json.loads(metrics)["reward"] for _, metrics in rows] == [0.25, 1.25, 2.25]
    assert holds(files, "a-secret-of-the-environment") == []


def test_a_logger_that_is_not_installed_is_said_before_work_begins(monkeypatch):
    monkeypatch.setattr(common, "find_spec", lambda name: None)
    with pytest.raises(ValidationError, match=r"wandb is not installed: pip install 'agrpo\[wandb\]'"):
        LoggingConfig(loggers=["tensorboard", "wandb"])
    assert LoggingConfig(loggers=["tensorboard"]).loggers == ["tensorboard"]
    assert LoggingConfig(loggers=[]).loggers == []
