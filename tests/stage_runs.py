"""Runs of the stages as a user starts them: processes of their own, a tiny model, a directory of the test's."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAINS = {
    "sft": "stages/stage1_sft/main.py",
    "reward": "stages/stage2_reward/main.py",
    "agrpo": "stages/stage3_agrpo/main.py",
    "preferences": "stages/stage2_reward/preferences.py",
}
_FEW = ["checkpoint.every=0", "evaluation.data.parameters.count=16", "evaluation.test.parameters.count=24"]
_POLICY = ["evaluation.samples=2", "evaluation.max_completion_length=16"]
# The quickstart's configurations, cut down to seconds.
TINY = {
    "sft": [
        *("model.config.hidden_size=32", "model.config.intermediate_size=64", "model.config.num_hidden_layers=1"),
        *("data.parameters.count=256", "training.max_steps=5", "training.batch_size=16", *_FEW, *_POLICY),
    ],
    "reward": ["data.parameters.count=128", "training.max_steps=5", "training.batch_size=8", *_FEW],
    "agrpo": [
        *("data.parameters.count=64", "training.max_steps=5", "sampling.num_generations=4"),
        *("sampling.prompts_per_step=4", "sampling.max_completion_length=16", *_FEW, *_POLICY),
    ],
    "preferences": [],
}
# Tells the completions of an untrained model apart, which are never right.
LENGTH_REWARD = "rewards=[{target: reward_models.rules.length, scale: 16, tokens: 4}]"


def environment(nproc=1):
    """This process's, without what makes it a member of a job."""
    job = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NNODES", "NODE_RANK")
    kept = {key: value for key, value in os.environ.items() if key not in job}
    return {**kept, "NPROC": str(nproc), "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


def command(stage, *arguments):
    return [sys.executable, "-m", "agrpo.launch", MAINS[stage], *map(str, arguments)]


def launch(stage, *arguments, nproc=1, timeout=600):
    """The finished process of a stage; its stdout and stderr are text."""
    return subprocess.run(
        command(stage, *arguments), cwd=ROOT, env=environment(nproc), capture_output=True, text=True, timeout=timeout
    )


def tiny(stage, run, *overrides):
    """Arguments of a tiny run in the directory `run`; overrides win."""
    return [f"run.dir={run.parent}", f"run.name={run.name}", *TINY[stage], *overrides]


def run_tiny(stage, run, *overrides, nproc=1):
    """Run a tiny stage that must succeed; its directory."""
    done = launch(stage, *tiny(stage, run, *overrides), nproc=nproc)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return run / stage


def run_several(runs, nproc=1, timeout=600):
    """Tiny stages, each (stage, run, overrides), in one job of `nproc` processes; the job, with stdout and stderr."""
    listed = json.dumps([(stage, tiny(stage, run, *overrides)) for stage, run, overrides in runs])
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"] if nproc > 1 else []
    return subprocess.run(
        [sys.executable, *torchrun, str(ROOT / "tests" / "several_runs.py"), listed],
        cwd=ROOT,
        env=environment(nproc),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def tiny_policy(folder, **architecture):
    """A tiny untrained policy with the quickstart's tokenizer, as a stage would leave it; its folder."""
    from agrpo.config import ModelConfig, TokenizerConfig
    from agrpo.models import load_language_model, load_tokenizer, save_language_model

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True}
    tags = ["<think>", "</think>", "<answer>", "</answer>"]
    config = ModelConfig(
        config={"model_type": "qwen2", **sizes, **more, "initializer_range": 0.1, **architecture},
        tokenizer=TokenizerConfig(kind="characters", added_tokens=tags),
    )
    tokenizer, _ = load_tokenizer(config, ["0123456789+-=;"])
    save_language_model(load_language_model(config, tokenizer, 0), tokenizer, folder)
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
