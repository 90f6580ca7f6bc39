"""Conformance on two ranks, unequal lengths on each, under ZeRO 2 and under ZeRO-3 with every weight sharded."""

import importlib.util
import subprocess
import sys

import pytest
from stage_runs import ROOT, environment

BACKENDS = [
    "native",
    pytest.param("vllm", marks=pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vllm here")),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_ranks_generate_as_transformers_does_and_as_they_train(backend):
    job = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*job, str(ROOT / "tests" / "engine" / "conformance_job.py"), backend],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("all variants passed") == 2
