"""Divergence of the policy from the reference: what is reported, and what is differentiated. They are not the same.

With d = log π − log π_ref at a token sampled from π:

    kind       divergence                                  reported               differentiated
    reverse    KL(π‖π_ref)                                 k3 = e^{−d} − 1 + d    k2 = d²/2
    forward    KL(π_ref‖π)                                 1 − e^{−d}·(1 + d)     k3
    symmetric  ½[KL(π‖π_ref) + KL(π_ref‖π)]                ½·d·(1 − e^{−d})       ½(k2 + k3)
    none       —                                           0                      0

Every reported value is unbiased and never negative. The forward one is −d·e^{−d}, the importance-weighted KL, plus the
control variate 1 − e^{−d}, whose mean is 0; with u = e^{−d} it is u·log u − u + 1 ≥ 0. Differentiating a reported value
is wrong, because the gradient does not see that the samples came from π: autograd of k3 gives (1 − e^{−d})·∇log π, that
of KL(π_ref‖π), and autograd of k2 gives d·∇log π, that of KL(π‖π_ref).

When the samples came from an older policy, both are weighted by ρ = π/π_old, always detached: with gradient through ρ,
ρ·k3 has the gradient of KL(π‖π_ref), the other direction.

Source: estimators, Schulman 2020, "Approximating KL divergence"; GRPO's penalty is `forward` under these names (Shao et
al. 2024, eq. 4); the symmetric divergence is the A-GRPO paper's; its estimator and surrogate are ours.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def _zero(log_ratio: Tensor) -> Tensor:
    return torch.zeros_like(log_ratio)


def _k2(log_ratio: Tensor) -> Tensor:
    return log_ratio.square() / 2


def _k3(log_ratio: Tensor) -> Tensor:
    return torch.expm1(-log_ratio) + log_ratio


def _reverse_value(log_ratio: Tensor) -> Tensor:
    return _k3(log_ratio).clamp(min=0)  # CUDA's expm1 may be an ulp off


def _forward_value(log_ratio: Tensor) -> Tensor:
    # This order of terms keeps its digits near d = 0 and goes to +∞, not NaN, where e^{−d} overflows.
    return (-(torch.expm1(-log_ratio) * (1 + log_ratio) + log_ratio)).clamp(min=0)


def _symmetric_value(log_ratio: Tensor) -> Tensor:
    return -log_ratio * torch.expm1(-log_ratio) / 2


def _symmetric_surrogate(log_ratio: Tensor) -> Tensor:
    return (_k2(log_ratio) + _k3(log_ratio)) / 2


# kind → (reported value, differentiated surrogate, in words)
_KINDS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], str]] = {
    "none": (_zero, _zero, "no divergence: the policy is not held to the reference"),
    "reverse": (_reverse_value, _k2, "KL(policy‖reference), mode-seeking, differentiated through k2"),
    "forward": (_forward_value, _k3, "KL(reference‖policy), mass-covering, differentiated through k3 (GRPO's penalty)"),
    "symmetric": (
        _symmetric_value,
        _symmetric_surrogate,
        "half KL(policy‖reference) plus half KL(reference‖policy), differentiated through ½(k2 + k3) (A-GRPO)",
    ),
}


def _kind(kind: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], str]:
    if kind == "k1":
        raise ValueError(
            "k1 = log π − log π_ref cannot be a loss: its gradient ∇log π has expectation 0 under π, so it adds "
            "noise and holds nothing back; use kl: reverse for KL(policy‖reference)"
        )
    if kind not in _KINDS:
        raise ValueError(f"kl must be one of {', '.join(_KINDS)}, got {kind!r}")
    return _KINDS[kind]


def estimate(kind: str) -> Callable[[Tensor], Tensor]:
    """The reported value of a divergence, (C,) d → (C,) nats ≥ 0; unbiased when the tokens were sampled from π.

    KL(π_old‖π) on tokens sampled from π_old, the quantity that moves the clip range, is
    `estimate("reverse")(old_logp - logp)`.

    Raises:
        ValueError: the kind is k1 or unknown.
    """
    return _kind(kind)[0]


def surrogate(kind: str) -> Callable[[Tensor, Tensor | float], Tensor]:
    """What to differentiate so that the expected gradient is that of the divergence.

    Returns:
        f(log_ratio (C,), importance) → (C,). `importance` is the token's ρ = π/π_old, (C,), or 1.0 when π itself
        sampled; it is detached here, so passing one that carries a gradient is safe.

    Raises:
        ValueError: the kind is k1 or unknown.
    """
    differentiated = _kind(kind)[1]

    def weighted(log_ratio: Tensor, importance: Tensor | float) -> Tensor:
        return torch.as_tensor(importance).detach() * differentiated(log_ratio)

    return weighted


def describe(kind: str) -> str:
    """Which divergence is optimised, in words."""
    return _kind(kind)[2]
