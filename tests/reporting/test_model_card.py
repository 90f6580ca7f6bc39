"""A model's card says what the run's configuration and results say."""

import yaml

from agrpo.config import load_config
from agrpo.reporting.model_card import licence_of, model_card


def parts(card):
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card_of_a_policy_tells_method_data_and_numbers(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlibrary_name: transformers\nlicense: apache-2.0\n---\n# Base\nlicense: mit\n")
    config = load_config("agrpo", overrides=[f"model.name_or_path={base}", "model.lora={rank: 8}", "seed=3"])
    front, body = parts(model_card(config, "agrpo", {"test_pass1": 0.98765, "mean_length": 37}))
    assert (
        front["license"] == "apache-2.0" and front["tags"] == ["agrpo"] and front["pipeline_tag"] == "text-generation"
    )
    assert "base_model" not in front and "datasets" not in front
    for told in (
        f"from `{base}` for 60 steps, seed 3",
        "method `agrpo`",
        "`reward_models.rules.accuracy` (weight 1)",
        "LoRA of rank 8",
        "training: `python:agrpo.data.tasks.chains:problems`, split train (count 2000",
        "test: `python:agrpo.data.tasks.chains:problems`, split test",
        "- test_pass1: 0.9877\n- mean_length: 37",
        "`apache-2.0`, as the base model's card says",
    ):
        assert told in body, told
    written = body.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(written)["training"]["max_steps"] == 60


def test_an_unknown_licence_is_not_made_up():
    config = load_config("sft")
    front, body = parts(model_card(config, "sft", {}))
    assert "license" not in front and "Not known" in body and "initialised at random" in body


def test_a_hub_model_and_data_set_are_linked(tmp_path):
    data = ["model={name_or_path: owner/base}", "data={source: owner/data}", "run.name=mine"]
    front, _ = parts(model_card(load_config("sft", overrides=data), "sft", {}))
    assert front["base_model"] == "owner/base" and front["datasets"] == ["owner/data"]
    assert front["tags"] == ["agrpo", "sft"]


def test_a_reward_model_classifies():
    front, body = parts(model_card(load_config("reward", overrides=["model.name_or_path=owner/base"]), "reward", {}))
    assert front["pipeline_tag"] == "text-classification" and "ranked completions" in body


def test_a_licence_is_read_from_the_front_matter_alone(tmp_path):
    assert licence_of(None) is None and licence_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("# No front matter\nlicense: mit\n")
    assert licence_of(str(tmp_path)) is None
