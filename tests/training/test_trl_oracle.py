"""TRL's own trainers as the oracle: the same tiny model and the same tokens give the same loss and gradient.

Where the two define things differently, only what coincides is compared:

- With `use_bias_correction_kl`, TRL differentiates its penalty ρ·k3 through ρ too, which is the gradient of ρ·k2 with a
  detached ρ: our `reverse`, off-policy as well. Without it the penalty is not weighted: our `forward`, on-policy alone.
  With ratios of completions, TRL weights the penalty by the completion's, we by the token's own.
- Metrics of clipping: TRL counts a clipped completion once, we count its tokens.
- `scale_rewards="batch"` divides by the deviation of the rewards themselves, our `batch` by that of the centred ones.
- `delta` bounds the ratio whatever the advantage, our dual clip where the advantage is negative.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tiny import FAMILIES, ragged, tokenizer
from tokenizers import Regex, pre_tokenizers
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from agrpo.algorithms.advantages import ESTIMATORS, gdpo_advantages
from agrpo.algorithms.objective import policy_loss, token_weights
from agrpo.algorithms.preference import group_preference_loss, implicit_reward, ordered_pairs, pair_weights
from agrpo.algorithms.segments import per_token
from agrpo.engine.layout import build_layout
from agrpo.engine.modules import Policy

PLAIN = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}
AGGREGATION = {"grpo": "sequence", "bnpo": "token", "dapo": "token", "dr_grpo": "constant"}
TEMPERATURE, LONGEST, BETA = 0.8, 40, 0.7
IDS, GROUP, LENGTHS, TOKENS = ragged(4)
LAYOUT = build_layout(IDS, GROUP, LENGTHS, TOKENS)
C, N = len(TOKENS), len(LENGTHS)
ADVANTAGES = torch.tensor([1.2, -0.7, 0.3, -1.5, 0.9, -0.2, 0.0, -1.1])
SHIFT = torch.tensor([-0.4, 0.4, 0.0, 0.4, 0.3, -0.3, 0.4, 0.0])  # of a whole completion, so that its ratio is clipped


def model(family, seed=0):
    torch.manual_seed(seed)
    return FAMILIES[family]()


def gradients(loss, lm):
    names, parameters = zip(*lm.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_same_gradient(ours, theirs):
    assert ours.keys() == theirs.keys() and max(gradient.abs().max() for gradient in theirs.values()) > 0.01
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-6, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def noise(seed, scale):
    return scale * torch.randn(C, generator=torch.Generator().manual_seed(seed))


def rollout(lm, on_policy=False):
    """Log-probabilities of the policy that sampled and of the reference, near the model's own."""
    with torch.no_grad():
        logp, _ = Policy(copy.deepcopy(lm))(LAYOUT, TEMPERATURE)
    old = logp if on_policy else logp + noise(1, 0.3) + per_token(SHIFT, LENGTHS)
    return {"old_logp": old, "ref_logp": logp + noise(2, 0.5)}


def padded(flat):
    rows = torch.zeros(N, int(LENGTHS.max()), dtype=flat.dtype)
    rows[torch.arange(rows.shape[1]) < LENGTHS[:, None]] = flat
    return rows


def by_trl(path, lm, logps, **options):
    lm.save_pretrained(path / "lm")  # where the trainer finds its reference, of which nothing is read here
    lm = type(lm).from_pretrained(path / "lm").train()
    trainer = GRPOTrainer(
        model=lm,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=str(path),
            per_device_train_batch_size=N,
            num_generations=N,
            max_completion_length=LONGEST,
            temperature=TEMPERATURE,
            epsilon=0.2,
            epsilon_high=0.28,
            **options,
            **PLAIN,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["t5"]}),
        processing_class=tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = 1  # the training loop sets it
    width = max(map(len, IDS))
    inputs = {
        "prompt_ids": torch.tensor([[0] * (width - len(IDS[p])) + IDS[p] for p in GROUP.tolist()]),
        "prompt_mask": torch.tensor([[0] * (width - len(IDS[p])) + [1] * len(IDS[p]) for p in GROUP.tolist()]),
        "completion_ids": padded(TOKENS),
        "completion_mask": padded(torch.ones_like(TOKENS)),
        "advantages": ADVANTAGES,
        "old_per_token_logps": padded(logps["old_logp"]),
        "ref_per_token_logps": padded(logps["ref_logp"]),
        "num_items_in_batch": torch.tensor(C),
    }
    loss = trainer.compute_loss(trainer.model, inputs)
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    return SimpleNamespace(loss=loss.item(), gradient=gradients(loss, lm), metrics=metrics)


def by_us(lm, logps, aggregation, *, ratio="token", kl="none", beta=0.0, entropy_coef=0.0):
    lm = copy.deepcopy(lm)
    logp, entropy = Policy(lm)(LAYOUT, TEMPERATURE)
    weights = token_weights(LENGTHS, aggregation, total_tokens=C, total_sequences=N, max_length=LONGEST)
    loss, terms = policy_loss(
        logp,
        **logps,
        entropy=entropy,
        advantages=per_token(ADVANTAGES, LENGTHS),
        lengths=LENGTHS,
        weights=weights,
        epsilon_low=0.2,
        epsilon_high=0.28,
        beta=beta,
        entropy_coef=entropy_coef,
        kl=kl,
        ratio=ratio,
    )
    return SimpleNamespace(loss=loss.item(), gradient=gradients(loss, lm), terms=terms)


@pytest.mark.parametrize("loss_type", AGGREGATION)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_clipped_surrogate_is_trls(tmp_path, loss_type, ratio):
    lm = model("llama-untied")
    logps = rollout(lm)
    theirs = by_trl(tmp_path, lm, logps, loss_type=loss_type, importance_sampling_level=ratio)
    ours = by_us(lm, logps, AGGREGATION[loss_type], ratio=ratio)
    assert ours.loss == pytest.approx(theirs.loss, abs=1e-6)
    assert_same_gradient(ours.gradient, theirs.gradient)
    assert min(theirs.metrics["clip_ratio/low_mean"], theirs.metrics["clip_ratio/high_mean"]) > 0.05
    assert ours.terms.entropy / C == pytest.approx(theirs.metrics["entropy"], abs=1e-6)
    if ratio == "token":
        counts = {"low": ours.terms.clipped_low, "high": ours.terms.clipped_high, "region": ours.terms.clipped}
        for end, count in counts.items():
            assert count / C == pytest.approx(theirs.metrics[f"clip_ratio/{end}_mean"], abs=1e-6)


@pytest.mark.parametrize("loss_type", AGGREGATION)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_forward_penalty_is_trls_on_policy(tmp_path, loss_type, ratio):
    lm = model("qwen2-tied")
    logps = rollout(lm, on_policy=True)
    options = {"loss_type": loss_type, "importance_sampling_level": ratio, "beta": BETA}
    theirs = by_trl(tmp_path, lm, logps, use_bias_correction_kl=False, **options)
    ours = by_us(lm, logps, AGGREGATION[loss_type], ratio=ratio, kl="forward", beta=BETA)
    assert ours.loss == pytest.approx(theirs.loss, abs=1e-6)
    assert_same_gradient(ours.gradient, theirs.gradient)
    assert theirs.metrics["kl"] > 0.05


@pytest.mark.parametrize("loss_type", AGGREGATION)
@pytest.mark.parametrize("on_policy", [True, False])
def test_reverse_penalty_has_the_gradient_and_the_reported_value_of_trls_corrected_one(tmp_path, loss_type, on_policy):
    lm = model("qwen2-tied")
    logps = rollout(lm, on_policy)
    theirs = by_trl(tmp_path, lm, logps, loss_type=loss_type, use_bias_correction_kl=True, beta=BETA)
    ours = by_us(lm, logps, AGGREGATION[loss_type], kl="reverse", beta=BETA)
    assert_same_gradient(ours.gradient, theirs.gradient)
    assert ours.terms.kl / C == pytest.approx(theirs.metrics["kl"], abs=1e-6)


def test_entropy_bonus_is_trls(tmp_path):
    lm = model("llama-untied")
    logps = rollout(lm)
    theirs = by_trl(tmp_path, lm, logps, loss_type="bnpo", entropy_coef=0.5)
    ours = by_us(lm, logps, "token", entropy_coef=0.5)
    assert ours.loss == pytest.approx(theirs.loss, abs=1e-6)
    assert_same_gradient(ours.gradient, theirs.gradient)


NAN = float("nan")
SCORES = torch.tensor(
    [
        [[1.0, 0.2, 3.0], [0.0, 0.4, 3.0], [0.25, NAN, 3.0], [0.5, 0.9, 3.0]],
        [[NAN, NAN, NAN], [2.0, 0.0, NAN], [0.0, 1.0, NAN], [1.5, 0.5, 0.7]],
        [[0.5, 0.1, 1.0], [0.5, 0.3, 0.0], [NAN, 0.6, NAN], [0.5, 0.0, 0.5]],
    ]
).flatten(0, 1)  # (prompt · completion, reward function)
OWNER = torch.arange(3).repeat_interleave(4)


def trl_advantages(trainer_type, config_type, path, scores, **options):
    """Advantages that a trainer computes for what its model generates, the rewards given."""
    rewards = [lambda completions, column=column, **_: column for column in scores.t().tolist()]
    for k, function in enumerate(rewards):
        function.__name__ = f"reward_{k}"
    prompts = ["t5", "t6", "t7"]
    trainer = trainer_type(
        model=model("llama-untied"),
        reward_funcs=rewards,
        args=config_type(
            output_dir=str(path),
            per_device_train_batch_size=len(scores),
            num_generations=4,
            max_completion_length=2,
            **options,
            **PLAIN,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer(),
    )
    inputs = [{"prompt": prompt} for prompt in prompts for _ in range(4)]
    return trainer._generate_and_score_completions(inputs)["advantages"]


@pytest.mark.parametrize("name", ["group", "none"])
def test_advantages_are_trls_with_its_deviation(tmp_path, name):
    rewards = SCORES[:, 0]
    theirs = trl_advantages(GRPOTrainer, GRPOConfig, tmp_path, rewards[:, None], scale_rewards=name)
    ours = ESTIMATORS[name](rewards, OWNER, std_ddof=1)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert (ours != 0).sum() == 7


def test_rloo_advantages_are_trls(tmp_path):
    rewards = SCORES[:, 1]
    theirs = trl_advantages(RLOOTrainer, RLOOConfig, tmp_path, rewards[:, None], beta=0.0)
    torch.testing.assert_close(ESTIMATORS["rloo"](rewards, OWNER), theirs, atol=1e-6, rtol=0)


def test_gdpo_advantages_are_trls(tmp_path):
    weights = [1.0, 0.5, 2.0]
    how = {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": weights}
    theirs = trl_advantages(GRPOTrainer, GRPOConfig, tmp_path, SCORES, **how)
    ours = gdpo_advantages(SCORES, torch.tensor(weights), OWNER, std_ddof=1)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert (ours != 0).sum() > 7


PREFERENCES = {
    "prompt": ["t5t6t7", "t8", "t9t10t11t12t13", "t14t15"],
    "chosen": ["t20t21t22t23", "t24t25", "t26", "t27t28t29"],
    "rejected": ["t30t31", "t32t33t34t35t36", "t37t38t39", "t40"],
}


def words():
    """The shared tokenizer, which takes a text apart."""
    found = tokenizer()
    found.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"t\d+"), "isolated")
    return found


def preferences_by_trl(path, lm, reference, per_batch, **options):
    """Mean loss over the pairs in batches of `per_batch`, its gradient, and the pairs' tokens."""
    lm = copy.deepcopy(lm)
    trainer = DPOTrainer(
        model=lm,
        ref_model=copy.deepcopy(reference),
        args=DPOConfig(output_dir=str(path), beta=BETA, **options, **PLAIN),
        train_dataset=Dataset.from_dict(PREFERENCES),
        processing_class=words(),
    )
    rows = list(trainer.train_dataset)
    batches = [rows[i : i + per_batch] for i in range(0, len(rows), per_batch)]
    loss = sum(trainer.compute_loss(trainer.model, trainer.data_collator(batch)) for batch in batches) / len(batches)
    return SimpleNamespace(loss=loss.item(), gradient=gradients(loss, lm), rows=rows)


def preferences_by_us(lm, reference, rows, reduction, **options):
    lm = copy.deepcopy(lm)
    completions = [row[side] for row in rows for side in ("chosen_ids", "rejected_ids")]
    lengths = torch.tensor([len(ids) for ids in completions])
    group = torch.arange(len(rows)).repeat_interleave(2)
    tokens = torch.tensor([token for ids in completions for token in ids])
    layout = build_layout([row["prompt_ids"] for row in rows], group, lengths, tokens)
    logp, _ = Policy(lm)(layout)
    with torch.no_grad():
        ref_logp, _ = Policy(copy.deepcopy(reference))(layout)
    pairs = ordered_pairs(torch.tensor([1, 0] * len(rows)), group)
    weights = pair_weights(pairs, torch.ones(len(rows)), "confidence")
    scores = implicit_reward(logp, ref_logp, lengths, alpha=BETA, reduction=reduction)
    loss = group_preference_loss(scores, pairs, weights, alpha=BETA, **options) / weights.sum()
    return SimpleNamespace(loss=loss.item(), gradient=gradients(loss, lm))


@pytest.mark.parametrize(
    ("theirs", "per_batch", "reduction", "ours"),
    [
        ({"loss_type": ["sigmoid"]}, 4, "sum", {}),
        ({"loss_type": ["sigmoid_norm"]}, 4, "mean", {}),
        ({"loss_type": ["ipo"]}, 4, "mean", {"shape": "ipo"}),
        ({"loss_type": ["robust"], "label_smoothing": 0.2}, 4, "sum", {"shape": "robust", "flipped": 0.2}),
        # TRL's own cDPO is gone; its `aot` is the same loss once the batch is one pair, which leaves nothing to sort.
        ({"loss_type": ["aot"], "label_smoothing": 0.2}, 1, "sum", {"flipped": 0.2}),
    ],
    ids=["dpo", "length-normalised dpo", "ipo", "robust dpo", "conservative dpo"],
)
def test_lambda_one_with_pairs_is_trls_direct_preference_loss(tmp_path, theirs, per_batch, reduction, ours):
    lm, reference = model("llama-untied"), model("llama-untied", seed=1)
    expected = preferences_by_trl(tmp_path, lm, reference, per_batch, **theirs)
    assert [len(row["chosen_ids"]) for row in expected.rows] == [5, 3, 2, 4]  # each with its end
    actual = preferences_by_us(lm, reference, expected.rows, reduction, **ours)
    assert actual.loss == pytest.approx(expected.loss, abs=1e-6)
    assert_same_gradient(actual.gradient, expected.gradient)
