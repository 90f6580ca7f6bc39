"""A softmax policy over seven tokens is enumerated: expectations are sums, and no sampling noise hides an error."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agrpo.algorithms.divergences import describe, estimate, surrogate

KINDS = ("reverse", "forward", "symmetric")
torch.manual_seed(0)
LOGITS, REF_LOGITS, OLD_LOGITS = torch.randn(3, 7, dtype=torch.float64)


def kl(p, q):
    return (p * (p / q).log()).sum()


def exact(kind, p, ref):
    return {"reverse": kl(p, ref), "forward": kl(ref, p), "symmetric": (kl(p, ref) + kl(ref, p)) / 2}[kind]


def analytic_gradient(kind, p, ref):
    """With respect to the logits, by hand: ∂KL(p‖r) = p·(log p/r − KL), ∂KL(r‖p) = p − r."""
    reverse = p * ((p / ref).log() - kl(p, ref))
    forward = p - ref
    return {"reverse": reverse, "forward": forward, "symmetric": (reverse + forward) / 2}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_reported_value_is_unbiased(kind):
    p, ref = LOGITS.softmax(0), REF_LOGITS.softmax(0)
    assert (p * estimate(kind)((p / ref).log())).sum().item() == pytest.approx(exact(kind, p, ref).item(), abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("on_policy", [True, False])
def test_expected_autograd_gradient_is_the_analytic_one(kind, on_policy):
    logits = LOGITS.clone().requires_grad_()
    logp, ref_logp, old_logp = logits.log_softmax(0), REF_LOGITS.log_softmax(0), OLD_LOGITS.log_softmax(0)
    if on_policy:
        sampled, importance = logp.detach().exp(), 1.0
    else:
        sampled, importance = old_logp.exp(), (logp - old_logp).exp()  # carries a gradient that must be cut inside
    (sampled * surrogate(kind)(logp - ref_logp, importance)).sum().backward()
    expected = analytic_gradient(kind, LOGITS.softmax(0), REF_LOGITS.softmax(0))
    torch.testing.assert_close(logits.grad, expected, atol=1e-6, rtol=0)
    assert expected.abs().max() > 0.05


def test_the_three_gradients_differ_so_that_the_test_above_can_fail():
    gradients = [analytic_gradient(kind, LOGITS.softmax(0), REF_LOGITS.softmax(0)) for kind in KINDS]
    assert min((a - b).abs().max() for a, b in zip(gradients, gradients[1:] + gradients[:1], strict=True)) > 0.05


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(log_ratio=st.floats(-500, 500, width=32))
@example(log_ratio=5.5816e-08)  # where the forward one rounds below 0
def test_reported_value_is_never_negative_nor_nan_in_float32(kind, log_ratio):
    value = estimate(kind)(torch.tensor([log_ratio], dtype=torch.float32))
    assert (value >= 0).all()  # false for NaN; +∞ where e^{−d} overflows is honest


@pytest.mark.parametrize("kind", KINDS)
def test_reported_value_keeps_its_digits_near_the_reference(kind):
    d = torch.tensor([1e-3, -1e-3])
    torch.testing.assert_close(estimate(kind)(d), estimate(kind)(d.double()).float(), rtol=1e-3, atol=0)
    torch.testing.assert_close(estimate(kind)(d.double()), torch.full((2,), 5e-7).double(), rtol=1e-2, atol=0)


def test_none_is_zero_and_its_gradient_too():
    assert estimate("none")(torch.ones(3)).tolist() == surrogate("none")(torch.ones(3), 1.0).tolist() == [0.0] * 3


def test_k1_is_refused_with_its_reason_and_its_expected_gradient_is_indeed_zero():
    for refuse in (estimate, surrogate, describe):
        with pytest.raises(ValueError, match="expectation 0"):
            refuse("k1")
    logits = LOGITS.clone().requires_grad_()
    logp = logits.log_softmax(0)
    (logp.detach().exp() * (logp - REF_LOGITS.log_softmax(0))).sum().backward()
    assert logits.grad.abs().max() < 1e-12


def test_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="symmetric"):
        estimate("k4")


def test_descriptions_name_the_direction():
    assert describe("reverse").startswith("KL(policy‖reference)")
    assert describe("forward").startswith("KL(reference‖policy)")
    assert "half" in describe("symmetric")
