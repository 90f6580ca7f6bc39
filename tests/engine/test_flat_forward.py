"""The flat, prefix-shared forward against the padded forward of unmodified transformers."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FALLBACKS, FAMILIES, ragged

from agrpo.engine.fused import fuse_layers
from agrpo.engine.layout import build_layout
from agrpo.engine.modules import Policy, Scorer


def padded_oracle(lm, prompts, group, lengths, tokens, temperature):
    """Log-probabilities and entropies by transformers alone, one completion at a time."""
    logps, entropies = [], []
    for p, completion in zip(group.tolist(), tokens.split(lengths.tolist()), strict=True):
        ids = torch.cat([torch.tensor(prompts[p]), completion])
        z = lm(input_ids=ids[None]).logits[0, len(prompts[p]) - 1 : -1].double() / temperature
        logp = z.log_softmax(-1)
        logps.append(logp.gather(1, completion[:, None])[:, 0])
        entropies.append(-(logp.exp() * logp).sum(-1))
    return torch.cat(logps), torch.cat(entropies)


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def same_with_gradients(policy, ours, plain, theirs):
    """Log-probabilities, entropies, and the gradients of a sum of both under random weights."""
    for mine, expected in zip(ours, theirs, strict=True):
        assert (mine - expected).abs().max() < 1e-5
    weights = torch.randn(2, len(ours[0]), generator=torch.Generator().manual_seed(2))
    for logp, entropy in (ours, theirs):
        (weights[0] * logp + weights[1] * entropy).sum().backward()
    of_policy, of_plain = gradients(policy.lm), gradients(plain)
    assert of_policy.keys() == of_plain.keys()
    for name, expected in of_plain.items():
        assert (of_policy[name] - expected).norm() <= 1e-4 * expected.norm().clamp_min(1e-6), name


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", [*FAMILIES, *FALLBACKS])
def test_logprobs_entropy_and_gradients_equal_plain_transformers(family, temperature, fast):
    torch.manual_seed(0)
    plain = {**FAMILIES, **FALLBACKS}[family]().eval()
    policy = Policy(copy.deepcopy(plain)).eval()
    policy.fast = fast
    if fast and family in FAMILIES:
        assert fuse_layers(policy.lm) == sum(
            "norm" in name or name.endswith("mlp") for name, _ in plain.named_modules()
        )
    assert (policy.fallback_reason is None) == (family in FAMILIES)
    batch = ragged(1)
    same_with_gradients(
        policy, policy(build_layout(*batch), temperature), plain, padded_oracle(plain, *batch, temperature)
    )


def heard_between(seed, lengths):
    """Random tokens of others before some completion tokens, first ones too: heard and gaps."""
    generator = torch.Generator().manual_seed(seed)
    count = int(lengths.sum())
    gaps = torch.randint(0, 9, (count,), generator=generator) * (torch.rand(count, generator=generator) < 0.3)
    return torch.randint(0, 97, (int(gaps.sum()),), generator=generator), gaps


def masked_oracle(lm, prompts, group, lengths, tokens, heard, gaps):
    """Rows padded on the right through plain transformers, and a mask of what is learnt."""
    rows, learnt, said, other = [], [], iter(tokens.tolist()), iter(heard.tolist())
    for p, of_row in zip(group.tolist(), gaps.split(lengths.tolist()), strict=True):
        row, mask = list(prompts[p]), [False] * len(prompts[p])
        for gap in of_row.tolist():
            row += [*(next(other) for _ in range(gap)), next(said)]
            mask += [*[False] * gap, True]
        rows.append(row)
        learnt.append(mask)
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([row + [False] * (width - len(row)) for row in learnt])
    logp = lm(input_ids=ids, attention_mask=real).logits[:, :-1].log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(2, ids[:, 1:, None])[:, :, 0][mask[:, 1:]], entropy[mask[:, 1:]]


@pytest.mark.parametrize("family", ["llama-tied", "qwen2-tied", "gpt2"])
def test_what_others_say_between_turns_is_read_and_not_learnt(family):
    torch.manual_seed(0)
    plain = {**FAMILIES, **FALLBACKS}[family]().eval()
    policy = Policy(copy.deepcopy(plain)).eval()
    batch = ragged(1)
    batch = (*batch, *heard_between(4, batch[2]))
    ours = policy(build_layout(*batch))
    assert len(ours[0]) == len(batch[3]) < len(batch[3]) + len(batch[4])
    same_with_gradients(policy, ours, plain, masked_oracle(plain, *batch))


def test_gaps_that_are_not_what_was_heard_are_refused():
    batch = ragged(1)
    heard, gaps = heard_between(4, batch[2])
    for wrong in ((heard[1:], gaps), (heard, gaps[1:]), (heard, gaps.roll(1) - 1)):
        with pytest.raises(ValueError, match="heard between them"):
            build_layout(*batch, *wrong)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.lists(st.integers(1, 40), min_size=1, max_size=5)), min_size=1, max_size=6
    ),
    st.integers(0, 99),
)
def test_any_ragged_groups_equal_plain_rows(groups, seed):
    torch.manual_seed(0)
    lm = FAMILIES["qwen2-tied"]().eval()
    batch = ragged(seed, [p for p, _ in groups], [g for _, g in groups])
    layout = build_layout(*batch)
    with torch.no_grad():
        expected = Policy(copy.deepcopy(lm), flat=False)(layout)
        got = Policy(lm)(layout)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2"])
def test_scores_read_the_last_token_and_spoken_logprobs_are_the_policys(family):
    torch.manual_seed(0)
    policy = Policy({**FAMILIES, **FALLBACKS}[family]().eval())
    scorer = Scorer(policy)
    prompts, group, lengths, tokens = batch = ragged(3)
    layout = build_layout(*batch)
    scores, logp = scorer(layout, torch.tensor([1, 4]))
    assert layout.last.tolist() == (layout.start + layout.spans - 1).tolist()
    all_logp = torch.split(policy(layout)[0], lengths.tolist())
    torch.testing.assert_close(logp, torch.cat([all_logp[1], all_logp[4]]))
    plain = Policy(copy.deepcopy(policy.lm), flat=False).lm
    plain.config._attn_implementation = "eager"
    for n, completion in enumerate(tokens.split(lengths.tolist())):
        ids = torch.cat([torch.tensor(prompts[group[n]]), completion])
        state = plain.get_decoder()(input_ids=ids[None]).last_hidden_state[0, -1]
        assert (scores[n] - scorer.score(state)).abs() < 1e-5


@pytest.mark.parametrize("broken", ["empty prompt", "empty completion", "disorder"])
def test_layout_refuses_what_it_cannot_hold(broken):
    prompts, group, lengths, tokens = ragged(0)
    if broken == "empty prompt":
        prompts[0] = []
    elif broken == "empty completion":
        lengths[0] = 0
    else:
        group = group.flip(0)
    with pytest.raises(ValueError, match=r"empty|decrease"):
        build_layout(prompts, group, lengths, tokens)
