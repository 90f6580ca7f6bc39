"""Rollout servers for the tests: in a thread of this process, and as a user starts them."""

import contextlib
import copy
import os
import re
import subprocess
import sys
import threading
import time

import torch
import uvicorn
from stage_runs import ROOT, environment
from tiny import tokenizer

from agrpo.config import RolloutConfig
from agrpo.engine.backends.build import build_backend
from agrpo.engine.modules import Policy, causal_lm
from agrpo.rollout_server import Served, application
from agrpo.serving import bound

TOKEN = "a-token-of-the-tests-0123456789"
os.environ["AGRPO_ROLLOUT_TOKEN"] = TOKEN


def serving(lm, max_sequences=4):
    """The URL of a server in a thread, of a model like `lm` that holds no numbers yet, and what it serves."""
    base = causal_lm(lm)
    its = type(base)(copy.deepcopy(base.config))
    for weight in its.parameters():
        weight.data.fill_(torch.nan)
    policy = Policy(its).eval()
    rollout = RolloutConfig(max_sequences=max_sequences)
    backend = build_backend(rollout, policy, tokenizer=tokenizer(), stop=[1])
    served = Served(policy, backend, "native", stop=[1])
    listener = bound("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(application(served, TOKEN, 100), log_level="warning", lifespan="off"))
    threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    return f"http://127.0.0.1:{listener.getsockname()[1]}", served


@contextlib.contextmanager
def server_process(model, *options):
    """(URL, process) of `agrpo serve-rollout` on a free port."""
    command = [sys.executable, "-m", "agrpo.cli", "serve-rollout", "--model", str(model), "--port", "0", *options]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**environment(), "AGRPO_ROLLOUT_TOKEN": TOKEN}, stderr=subprocess.PIPE, text=True
    )
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.match(r"serving at (http://\S+):", line):
                break
        else:
            raise RuntimeError("".join(said))
        threading.Thread(target=lambda: list(process.stderr), daemon=True).start()  # a full pipe would stop it
        yield found[1], process
    finally:
        process.kill()
        process.wait()
