"""Stage 2's optimiser step through a real engine, against each method's loss written out on plain transformers."""

import math
from statistics import fmean

import pytest
import torch
from tiny import FAMILIES, engine_of, ragged
from torch.nn.functional import logsigmoid

from agrpo.config import PREFERENCE_METHODS, RewardConfig
from agrpo.training.batches import Sequences
from agrpo.training.preference import fit_preferences, score_groups
from agrpo.types import PreferenceGroup
from agrpo.yaml_input import merge

LEVELS, SURE = ((2, 0, 1), (0, 1)), ((1.0, 0.5, 0.8), (0.9, 0.7))
PAIRS = {(0, 1): 0.5, (0, 2): 0.8, (2, 1): 0.5, (4, 3): 0.7}  # better and worse of five completions: confidence
BEST = (0, 4)
IMPLICIT = [name for name, settings in PREFERENCE_METHODS.items() if settings.get("kind") == "implicit"]


def model():
    torch.manual_seed(0)
    return FAMILIES["llama-untied"]()


def data():
    groups = [
        PreferenceGroup("", tuple("abc"[: len(levels)]), levels, sure, None, {})
        for levels, sure in zip(LEVELS, SURE, strict=True)
    ]
    return Sequences(*ragged(7, prompts=(4, 9), groups=((6, 11, 3), (8, 5)))), groups


def engine(**how):
    """Whose weights have left the reference."""
    made = engine_of(model(), **how)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return made


def plain_copy(lm):
    plain = model()
    plain.load_state_dict(lm.state_dict())
    return plain


def by_transformers(lm):
    """(log-probabilities, last hidden state) of each completion."""
    ids, group, lengths, tokens = ragged(7, prompts=(4, 9), groups=((6, 11, 3), (8, 5)))
    found = []
    for p, completion in zip(group.tolist(), tokens.split(lengths.tolist()), strict=True):
        output = lm(torch.tensor([[*ids[p], *completion.tolist()]]), output_hidden_states=True)
        log_p = output.logits[0, -len(completion) - 1 : -1].log_softmax(-1)
        found.append((log_p.gather(1, completion[:, None])[:, 0], output.hidden_states[-1][0, -1]))
    return found


def fit(one, name, lambda_=1.0, micro=10**6, **more):
    values = {
        "data": {"source": "python:agrpo.data.tasks.chains:preference_groups"},
        "training": {"max_steps": 1, "micro_batch_tokens": micro},
    }
    config = RewardConfig.model_validate(merge(PREFERENCE_METHODS[name], {**values, **more}))
    return fit_preferences(one, *data(), config, lambda_, 1.0, 0.0), score_groups(one, data()[0], config)


# The log-ratios of a pair's better and worse completion (sums, or means for IPO) → the loss, as the papers write it.
LOSSES = {
    "dpo": lambda lead: -logsigmoid(0.1 * lead),
    "ipo": lambda lead: (lead - 1 / (2 * 0.1)) ** 2,
    "cdpo": lambda lead: -0.9 * logsigmoid(0.1 * lead) - 0.1 * logsigmoid(-0.1 * lead),
    "robust_dpo": lambda lead: (-0.9 * logsigmoid(0.1 * lead) + 0.1 * logsigmoid(-0.1 * lead)) / 0.8,
}


@pytest.mark.parametrize("micro", [10**6, 1])
@pytest.mark.parametrize("name", IMPLICIT)
def test_an_implicit_methods_loss_is_its_papers(name, micro):
    one = engine(with_reference=True)
    policy = plain_copy(one.module.lm)
    pairs = zip(by_transformers(policy), by_transformers(model()), strict=True)
    ratios = [logp - reference.detach() for (logp, _), (reference, _) in pairs]
    ratios = [ratio.mean() if name == "ipo" else ratio.sum() for ratio in ratios]
    leads = [ratios[i] - ratios[j] for i, j in PAIRS]
    loss = torch.stack([LOSSES[name](lead) for lead in leads]).mean()
    norm = torch.nn.utils.get_total_norm(torch.autograd.grad(loss, list(policy.parameters())))
    metrics, scores = fit(one, name, micro=micro)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert metrics["accuracy"] == fmean(float(lead > 0) for lead in leads)
    chances = [1 / (1 + math.exp(-0.1 * lead.item())) for lead in leads]
    entropies = [-p * math.log2(p) - (1 - p) * math.log2(1 - p) for p in chances]
    assert metrics["agrpo/uncertainty"] == pytest.approx(fmean(entropies), rel=1e-5)
    assert scores.tolist() == pytest.approx([0.1 * ratio.item() for ratio in ratios], abs=1e-5)


@pytest.mark.parametrize("micro", [10**6, 1])
def test_a_score_heads_loss_is_bradley_terrys_and_the_likelihood_of_the_best(micro):
    one = engine(scorer=True)
    policy, head = plain_copy(one.module.policy.lm), one.module.score.weight[0].detach().clone().requires_grad_()
    found = by_transformers(policy)
    scores = [state @ head for _, state in found]
    sure = sum(PAIRS.values())
    lead = sum(-w * logsigmoid(scores[i] - scores[j] - 0.3) for (i, j), w in PAIRS.items()) / sure
    centre = sum(w * (scores[i] + scores[j]) ** 2 for (i, j), w in PAIRS.items()) / sure
    likelihood = torch.cat([found[n][0] for n in BEST]).mean()
    loss = 0.6 * (lead + 0.05 * centre) - 0.4 * likelihood
    norm = torch.nn.utils.get_total_norm(torch.autograd.grad(loss, [*policy.parameters(), head]))
    metrics, found = fit(one, "agrpo", lambda_=0.6, micro=micro, margin=0.3, centring=0.05)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert metrics["agrpo/regulariser"] == pytest.approx(-likelihood.item(), rel=1e-5)
    assert found.tolist() == pytest.approx([score.item() for score in scores], abs=1e-5)
