"""Configurations that extend others, and TRL's flat keys: what they become, and what is refused."""

import dataclasses
import re

import pytest
import yaml
from stage_runs import launch

from agrpo.config import load_config, read_config, stage_of
from agrpo.config.trl import is_flat
from agrpo.yaml_input import ConfigError

MODEL = {"model": {"name_or_path": "elsewhere/model"}}
POLICY = {
    **MODEL,
    "data": {"source": "openai/gsm8k"},
    "training": {"max_steps": 3},
    "rewards": [{"target": "reward_models.rules.accuracy"}],
}
REWARD = {**MODEL, "data": {"source": "a/b"}, "training": {"max_steps": 3}}


@pytest.fixture
def write(tmp_path):
    def one(name, **values):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(yaml.safe_dump(values))
        return tmp_path / name

    return one


def test_a_file_lies_over_what_it_extends_and_later_over_earlier(write):
    write("parts/model.yaml", seed=1, model={"name_or_path": "a/b", "dtype": "bfloat16"}, run={"name": "model"})
    write("machine.yaml", extends="parts/model.yaml", seed=2, engine={"zero_stage": 2}, run={"dir": "there"})
    path = write("own.yaml", extends=["parts/model.yaml", "machine.yaml"], engine={"offload": "cpu"})
    assert read_config(path) == {
        "seed": 2,
        "model": {"name_or_path": "a/b", "dtype": "bfloat16"},
        "run": {"name": "model", "dir": "there"},
        "engine": {"zero_stage": 2, "offload": "cpu"},
    }


def test_the_resolved_configuration_holds_what_was_extended(write):
    write("base.yaml", **POLICY)
    path = write("agrpo.yaml", extends="base.yaml", seed=7)
    done = launch("agrpo", "--config", path, "--print-config")
    assert done.returncode == 0, done.stderr
    printed = yaml.safe_load(done.stdout)
    assert (printed["seed"], printed["training"]["max_steps"], "extends" in printed) == (7, 3, False)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"own.yaml": "own.yaml"}, r"own\.yaml: extends: goes round in a circle \(own.yaml → own.yaml\)"),
        ({"own.yaml": "b.yaml", "b.yaml": "own.yaml"}, r"\(own.yaml → b.yaml → own.yaml\); leave one of them out"),
        (
            {"own.yaml": "gone.yaml"},
            r"own\.yaml: extends: .*gone\.yaml does not exist; the path is relative to the file",
        ),
        ({"own.yaml": 3}, r"own\.yaml: extends: give a path, or a list of paths, to YAML files, got 3"),
        ({"own.yaml": [["a.yaml"]]}, r"extends: give a path"),
    ],
)
def test_wrong_extensions_are_refused(write, files, says):
    for name, extends in files.items():
        write(name, extends=extends)
    with pytest.raises(ConfigError, match=says):
        read_config(write("own.yaml", extends=files["own.yaml"]))


def test_a_method_wins_over_what_its_file_extends(write):
    """The result is that of one file with the method, whatever the method of the extended file was."""
    write("base.yaml", **POLICY, method="cppo", objective={"kl": "symmetric", "beta": 0.001}, pruning={"rate": 0.9})
    path = write("agrpo.yaml", extends="base.yaml", method="grpo")
    config = load_config("agrpo", path)
    assert (config.objective.kl, config.objective.beta, config.controllers.beta.kind) == ("forward", 0.001, "fixed")
    assert (config.pruning.rate, config.pruning.refill) == (0.9, False)  # said in the file, not by its method
    own = load_config("agrpo", write("own.yaml", extends="base.yaml", method="grpo", objective={"kl": "reverse"}))
    assert own.objective.kl == "reverse"


def test_the_stage_is_the_first_word_of_the_files_name(write):
    assert stage_of(write("agrpo-lora.yaml", **POLICY)) == "agrpo"
    assert stage_of(write("mine.yaml", extends="agrpo-lora.yaml")) == "agrpo"


FLAT = {
    "model_name_or_path": "a/b",
    "output_dir": "out/mine",
    "dataset_name": "openai/gsm8k",
    "dataset_config": "main",
    "max_steps": 450,
    "learning_rate": 5e-7,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 45,
    "adam_beta2": 0.99,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 8,
    "num_generations": 16,
    "max_completion_length": 1024,
    "beta": 0.001,
    "epsilon": 0.1,
    "num_iterations": 3,
    "loss_type": "dr_grpo",
    "scale_rewards": False,
    "use_vllm": False,
    "bf16": True,
    "gradient_checkpointing": True,
    "save_steps": 25,
    "use_peft": True,
    "lora_r": 8,
    "lora_dropout": 0.0,
    "reward_funcs": ["accuracy_reward", "json.dumps"],
    "reward_weights": [1.0, 0.5],
    "logging_steps": 1,
    "report_to": "tensorboard",
    "delta": None,
    "load_in_4bit": False,
}


def test_trls_keys_become_sections(write, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("NPROC", "2")
    told = []
    config = load_config("agrpo", write("agrpo.yaml", **FLAT, advantage={"kappa": 3.0}), note=told.append)
    assert (config.model.name_or_path, config.model.dtype, config.engine.zero_stage) == ("a/b", "bfloat16", 1)
    assert str(config.run_root) == "out/mine"
    assert (config.data.source, config.data.parameters) == ("openai/gsm8k", {"name": "main"})
    training = config.training
    assert (training.max_steps, training.learning_rate, training.min_lr_ratio) == (450, 5e-7, 0.0)
    assert (training.warmup_ratio, training.betas) == (0.1, (0.9, 0.99))
    assert (config.sampling.num_generations, config.sampling.prompts_per_step) == (16, 4 * 8 * 2 // 16)
    objective = config.objective
    assert (objective.beta, objective.epsilon_low, objective.epsilon_high) == (0.001, 0.1, 0.1)
    assert (objective.updates_per_rollout, objective.aggregation) == (3, "constant")
    assert (config.advantage.kind, config.advantage.kappa) == ("none", 3.0)
    assert (config.rollout.backend, config.engine.activation_checkpointing) == ("native", True)
    assert (config.checkpoint.every, config.model.lora.rank) == (25, 8)
    assert [(one.target, one.weight) for one in config.rewards] == [
        ("reward_models.rules.accuracy", 1.0),
        ("json.dumps", 0.5),
    ]
    words = re.compile(r"TRL: [^:]+: (.*?)(?: → | changes nothing)")
    named = {name for line in told for name in re.findall(r"(\w+): ", words.match(line).group(1))}
    assert set(FLAT) == named  # every key was told of


@pytest.mark.parametrize(
    ("stage", "flat", "keys"),
    [
        ("sft", {"per_device_train_batch_size": 4, "max_length": 77}, {"training.batch_size": 4, "max_length": 77}),
        ("reward", {"center_rewards_coefficient": 0.01}, {"centring": 0.01}),
        (
            *("reward", {"method": "dpo", "beta": 0.2, "label_smoothing": 0.1, "loss_type": ["robust"]}),
            {"objective.alpha": 0.2, "objective.label_smoothing": 0.1, "objective.loss": "robust", "kind": "implicit"},
        ),
        ("agrpo", {"loss_type": "grpo"}, {"objective.aggregation": "sequence"}),
        ("agrpo", {"importance_sampling_level": "sequence"}, {"objective.ratio": "sequence"}),
        ("agrpo", {"delta": 3.0}, {"objective.dual_clip": 3.0}),
        ("agrpo", {"vllm_importance_sampling_correction": False}, {"objective.sampler_correction": "none"}),
        ("agrpo", {"vllm_importance_sampling_mode": "token_mask"}, {"objective.sampler_correction": "mask"}),
        ("agrpo", {"generation_batch_size": 64, "num_generations": 16}, {"sampling.prompts_per_step": 4}),
        ("agrpo", {"use_peft": True, "load_in_4bit": True}, {"model.quantization": "nf4", "model.lora.rank": 16}),
        ("agrpo", {"top_k": -1, "min_p": None}, {"sampling.top_k": 0, "sampling.min_p": 0.0}),
        ("agrpo", {"eval_strategy": "no", "eval_steps": 9}, {"evaluation.every": 0}),
    ],
)
def test_trls_keys_by_stage(write, stage, flat, keys):
    config = load_config(stage, write("file.yaml", **({**POLICY} if stage == "agrpo" else {**REWARD}), **flat))
    for key, value in keys.items():
        here = config
        for part in key.split("."):
            here = getattr(here, part)
        assert here == value, key


@pytest.mark.parametrize(
    ("flat", "says"),
    [
        ({"beta": 0.1, "objective": {"beta": 0.2}}, r"beta: objective\.beta is set in the same file; keep one of them"),
        ({"num_train_epochs": 3}, r"num_train_epochs: 3: TRL's, without a counterpart here: set max_steps"),
        ({"repetition_penalty": 1.1}, r"repetition_penalty: 1.1: TRL's, without a counterpart here: leave it out"),
        ({"vllm_mode": "server"}, r"vllm_mode: server"),
        ({"mask_truncated_completions": True}, r"agrpo has only this: a completion cut at its limit counts"),
        ({"loss_type": "sapo"}, r"loss_type: sapo has no counterpart here; there are grpo, dapo, bnpo, dr_grpo"),
        ({"load_in_4bit": True}, r"load_in_4bit: true: TRL's, .* set use_peft: true beside it"),
        ({"warmup_steps": "few"}, r"warmup_steps: few is not a number of 0 or more"),
        ({"per_device_train_batch_size": [8]}, r"per_device_train_batch_size: \[8\] is not a number"),
        ({"loss_type": ["grpo", "dapo"]}, r"loss_type: \['grpo', 'dapo'\] has no counterpart"),
        ({"lora_r": 8}, r"lora_r: has no effect without use_peft: true"),
        ({"per_device_train_batch_size": 3}, r"3 completions a step on 1 processes are no whole groups of 8"),
        ({"gradient_accumulation_steps": 3}, r"needs per_device_train_batch_size beside it"),
        ({"warmup_steps": 10, "training": {"learning_rate": 1e-5}}, r"max_steps is not given; set warmup_ratio"),
        ({"run_name": "x", "run": {"name": "y"}}, r"run_name: run\.name is set in the same file"),
        ({"max_steps": 3, "training": 7}, r"training: holds 7 where training.max_steps belongs"),
        ({"reward_funcs": ["mine"]}, r"mine: there are accuracy_reward, think_format_reward, and import paths"),
        ({"num_generation": 8}, r"num_generation: unknown key"),
    ],
)
def test_what_cannot_be_mapped_is_refused(write, flat, says):
    policy = {key: value for key, value in POLICY.items() if key != "rewards" or "reward_funcs" not in flat}
    with pytest.raises(ConfigError, match=says):
        load_config("agrpo", write("file.yaml", **{**policy, **flat}))


def test_trls_keys_over_an_extended_file_and_on_the_command_line(write):
    write("base.yaml", **POLICY, objective={"beta": 0.1, "kl": "reverse"}, sampling={"num_generations": 4})
    path = write("agrpo.yaml", extends="base.yaml", beta=0.2, per_device_train_batch_size=8)
    config = load_config("agrpo", path)
    assert (config.objective.beta, config.objective.kl, config.sampling.prompts_per_step) == (0.2, "reverse", 2)
    config = load_config("agrpo", path, ["beta=0.3", "max_steps=9", "method=grpo"])
    assert (config.objective.beta, config.training.max_steps, config.objective.kl) == (0.3, 9, "forward")


def test_every_field_of_trls_configurations_is_known():
    trl = pytest.importorskip("trl")
    of_stage = {"agrpo": trl.GRPOConfig, "sft": trl.SFTConfig, "reward": trl.RewardConfig}
    kinds = [*of_stage.items(), ("reward", trl.DPOConfig)]
    kinds += [(stage, shared) for stage in of_stage for shared in (trl.ModelConfig, trl.ScriptArguments)]
    for stage, kind in kinds:
        for field in dataclasses.fields(kind):
            ours = field.name in ("seed", "max_length", "method")
            assert ours or is_flat(field.name, stage), f"{stage}: {field.name}"


def test_the_mapping_is_printed(write):
    done = launch("agrpo", "--config", write("agrpo.yaml", **POLICY, beta=0.2), "--print-config")
    assert done.returncode == 0, done.stderr
    assert "agrpo.yaml: beta: 0.2 → objective.beta: 0.2" in done.stderr
    assert yaml.safe_load(done.stdout)["objective"]["beta"] == 0.2
