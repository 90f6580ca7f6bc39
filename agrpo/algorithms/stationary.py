"""What training converges to: the stationary policy of one question, and how far its pass rate can move.

Legend: K answers of one question; q the reference's pass rate and p the policy's; G the group size, `math.inf` for the
limit; β the coefficient of the divergence, named as in `divergences`. Floats and the standard library's math, all in
float64 without a tensor, so that `agrpo theory` answers before torch could be imported.

A stationary policy is a fixed point of gradient ascent on E[A] − β·D, A being the advantage `group` with population
standard deviation and δ = 0. It is therefore the policy `tilted` by its own expected advantage. When rewards are 0 or 1
the advantage of an answer depends on its reward alone: all correct answers gain the same factor over the reference, and
so do all wrong ones. Only the pass rate is left to solve for,

    F(p) = Δ(p)/β      F: forward (p − q)/(p(1 − p)), reverse logit p − logit q, symmetric half the sum of the two

with Δ(p) the expected advantage of a correct answer less that of a wrong one, and F the derivative of D.

There may be several solutions: for G → ∞, Δ(p) = 1/√(p(1 − p)) grows faster than the reverse F as p → 1. Training
that starts at the reference raises p to the *smallest* solution above q and stays there, so that is the one returned;
where there is none, p = 1.

Assumptions: an answer is one token, or the divergence is between distributions over whole answers; the policy can
represent any distribution and questions do not interfere; no clipping, no entropy bonus; training has converged. The
penalty of the objective holds each token to the reference, so for answers of many tokens the figure is a guide.

Source: the fixed points for GRPO's penalty and for KL(π‖π_ref), groups of two and G → ∞, Vojnovic and Yun 2025 (arXiv
2502.18548). The symmetric divergence's, any G, and the choice among solutions are ours.
"""

import math
from collections.abc import Callable, Sequence

DIVERGENCES = ("forward", "reverse", "symmetric")

_CERTAIN = 40.0  # log-odds, where 1 − p is below a float's resolution
_NEVER = 1e-200  # a pass rate that counts as 0; the slope of 1/√p overflows soon after


def expected_advantage(pass_rate: float, group_size: float) -> tuple[float, float]:
    """𝒫 of a correct and of a wrong answer when the other G − 1 of its group are drawn from the policy.

    Args:
        pass_rate: p in [0, 1], the policy's.
        group_size: G, whole and at least 2, or `math.inf`.

    Returns:
        (𝒫(correct), 𝒫(wrong)) = ((1 − p)·Δ, −p·Δ), exactly: the policy's own mean advantage is 0 in any group. With k
        the number of correct answers among the others, 𝒫(correct) = E √((G − 1 − k)/(k + 1)) and
        𝒫(wrong) = −E √(k/(G − k)). p = 0 gives (√(G − 1), 0), p = 1 gives (0, −√(G − 1)). In the limit
        (√((1 − p)/p), −√(p/(1 − p))).

    Raises:
        ValueError: an argument out of its range.
    """
    _check(pass_rate, 1.0, group_size)
    gap = _gap(_log_odds(pass_rate), group_size)
    return (1 - pass_rate) * gap if pass_rate < 1 else 0.0, -pass_rate * gap if pass_rate > 0 else 0.0


def reachable_pass_rate(pass_rate: float, beta: float, group_size: float, divergence: str) -> float:
    """Where training ends that starts at the reference: p of the stationary policy.

    Args:
        pass_rate: q in [0, 1], the reference's.
        beta: β ≥ 0.
        group_size: G, whole and at least 2, or `math.inf`.
        divergence: `forward` (KL(π_ref‖π), GRPO's), `reverse` or `symmetric`.

    Returns:
        p in [q, 1], to about 1e-12; it rises with q and falls with β. β = ∞ gives q; β = 0, or no solution below 1,
        gives 1. q = 0 (or below 1e-200) gives q, since an answer that is never sampled is never learned. That is the
        limit of q → 0, except for `forward` with β < √(G − 1), which lets the rarest answer become a common one.

    Raises:
        ValueError: an argument out of its range.
    """
    _check(pass_rate, beta, group_size)
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    if pass_rate < _NEVER or pass_rate == 1 or beta == math.inf:
        return float(pass_rate)
    if beta == 0:
        return 1.0
    # Let f = F − Δ/β, as a function of the gain in log-odds: negative from the reference to the first solution. Δ is
    # convex in p, so its tangent at the present p lies below it, and F less that tangent above f. That bound has one
    # zero ahead, since it only grows where the tangent falls (p < ½), and is convex and negative here where it rises
    # (p ≥ ½, F convex). The zero is never beyond the first solution: stepping from zero to zero is Newton's method that
    # cannot jump over a solution, however close it is to the next one.
    start, gain = _log_odds(pass_rate), 0.0
    ceiling = _CERTAIN - start
    while True:
        bound = _bound(start, gain, pass_rate, beta, group_size, divergence)
        if bound(ceiling) < 0:
            return 1.0
        reached = _bisect(bound, gain, ceiling)
        if reached - gain <= 1e-13 * max(1.0, gain):
            return _pass_rate(start + reached)
        gain = reached


def _bound(
    start: float, gain: float, pass_rate: float, beta: float, group_size: float, divergence: str
) -> Callable[[float], float]:
    """F − (tangent of Δ at p)/β as a function of the gain, p being where the gain is the given one."""
    gap, slope = _gap(start + gain, group_size), _gap_slope(start + gain, group_size)
    wrong = _pass_rate(-start - gain)

    def bound(further: float) -> float:
        rise = -_pass_rate(start + further) * wrong * math.expm1(gain - further)  # in p, to the last digit at both ends
        return _pull(divergence, further, pass_rate) - (gap + slope * rise) / beta

    return bound


def stationary_policy(
    reference: Sequence[float], correct: Sequence[bool], beta: float, group_size: float, divergence: str
) -> list[float]:
    """The stationary policy over the answers of a question, reached from the reference.

    Args:
        reference: (K,) probabilities that sum to 1.
        correct: (K,) whether the answer's reward is 1; it is 0 otherwise.
        beta, group_size, divergence: as in `reachable_pass_rate`.

    Returns:
        (K,) probabilities: the reference, rescaled to the reachable pass rate among the correct answers and to its
        complement among the wrong ones. All correct or none: the reference.

    Raises:
        ValueError: an argument out of its range.
    """
    _check_reference(reference, correct)
    right = math.fsum(prob for prob, is_right in zip(reference, correct, strict=True) if is_right)
    wrong = math.fsum(prob for prob, is_right in zip(reference, correct, strict=True) if not is_right)
    reached = reachable_pass_rate(right / (right + wrong), beta, group_size, divergence)
    if not right or not wrong:
        return list(reference)
    factors = {True: reached / right, False: (1 - reached) / wrong}
    return [prob * factors[bool(is_right)] for prob, is_right in zip(reference, correct, strict=True)]


def tilted(reference: Sequence[float], advantage: Sequence[float], beta: float, divergence: str) -> list[float]:
    """The policy that maximises Σ π·𝒫 − β·D(π, π_ref) for advantages that do not depend on it.

    Args:
        reference: (K,) probabilities that sum to 1; an answer of probability 0 keeps it.
        advantage: (K,) 𝒫, of any kind of reward.
        beta: β, positive and finite.
        divergence: `forward`, `reverse` or `symmetric`.

    Returns:
        (K,) probabilities, with the constant c fixed by Σπ = 1:

            forward    π_ref / (1 − (𝒫 − c)/β), where c is E_π 𝒫
            reverse    ∝ π_ref·exp(𝒫/β)
            symmetric  π_ref / W(e^{−2(𝒫 − c)/β}), W the Lambert function

    Raises:
        ValueError: an argument out of its range.
    """
    _check_reference(reference, advantage)
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, got {beta}")
    if divergence not in _TILTS:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    tilt = _TILTS[divergence]
    answers = [(prob, value) for prob, value in zip(reference, advantage, strict=True) if prob > 0]

    def weight(prob: float, value: float, constant: float) -> float:
        return prob * math.exp(min(700.0, tilt((value - constant) / beta)))  # e^700 stands for ∞

    def missing(constant: float) -> float:
        return 1 - math.fsum(weight(prob, value, constant) for prob, value in answers)

    values = [value for _, value in answers]
    constant = _bisect(missing, min(values), max(values))
    weights = [weight(prob, value, constant) if prob else 0.0 for prob, value in zip(reference, advantage, strict=True)]
    total = math.fsum(weights)
    return [one / total for one in weights]


def pair_pass_rate(pass_rate: float, beta: float, margin: float = 1.0) -> float:
    """Closed form for groups of two and GRPO's penalty: π(a) = ½(1 − β/γ + √((1 − β/γ)² + 4(β/γ)·q)).

    Args:
        pass_rate: q = π_ref(a) in [0, 1], of two answers a and b.
        beta: β ≥ 0 and finite.
        margin: γ in (0, 1], how much more often a is preferred to b than b to a; 1 for a reward that always tells.

    Returns:
        π(a). q = 0 gives max(0, 1 − β/γ), the limit of q → 0.

    Source: Vojnovic and Yun 2025.
    """
    _check(pass_rate, beta, 2)
    if not 0 < margin <= 1:
        raise ValueError(f"margin must be in (0, 1], got {margin}")
    ratio = beta / margin
    root = math.sqrt((1 - ratio) ** 2 + 4 * ratio * pass_rate)
    return (1 - ratio + root) / 2 if ratio < 1 else 2 * ratio * pass_rate / (ratio - 1 + root or 1.0)


def limit_pass_rate(pass_rate: float, beta: float) -> float:
    """Closed form for G → ∞ and GRPO's penalty: p = (2β²q + 1 + √(1 + 4β²q(1 − q))) / (2(1 + β²)).

    Args:
        pass_rate: q in [0, 1].
        beta: β ≥ 0 and finite.

    Returns:
        p. q = 0 gives 1/(1 + β²), the limit of q → 0.

    Source: Vojnovic and Yun 2025.
    """
    _check(pass_rate, beta, math.inf)
    square = beta * beta
    root = math.sqrt(1 + 4 * square * pass_rate * (1 - pass_rate))
    return (2 * square * pass_rate + 1 + root) / (2 * (1 + square))


def _check(pass_rate: float, beta: float, group_size: float) -> None:
    if not 0 <= pass_rate <= 1:
        raise ValueError(f"the pass rate must be in [0, 1], got {pass_rate}")
    if not beta >= 0:
        raise ValueError(f"beta must be 0 or more, got {beta}")
    if not (group_size == math.inf or (group_size >= 2 and group_size == int(group_size))):
        raise ValueError(
            f"the group size must be a whole number from 2, or inf, got {group_size}: in a group of one there is "
            "nothing to compare with, and its advantage is 0"
        )


def _check_reference(reference: Sequence[float], other: Sequence[float]) -> None:
    if len(reference) != len(other):
        raise ValueError(f"{len(reference)} reference probabilities do not go with {len(other)} answers")
    if not all(prob >= 0 for prob in reference) or not math.isclose(math.fsum(reference), 1, abs_tol=1e-6):
        raise ValueError(f"reference probabilities must be 0 or more and sum to 1, got {list(reference)}")


def _log_odds(pass_rate: float) -> float:
    if pass_rate in (0, 1):
        return math.inf if pass_rate else -math.inf
    return math.log(pass_rate) - math.log1p(-pass_rate)


def _pass_rate(log_odds: float) -> float:
    small = math.exp(-abs(log_odds))
    return (1.0 if log_odds > 0 else small) / (1 + small)


def _bisect(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function turns from negative to not negative, from the lower side: to the last bit."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return low


def _pull(divergence: str, gain: float, pass_rate: float) -> float:
    """F, how hard the divergence pulls back once the log-odds have grown by `gain` ≥ 0 from the reference's.

    It is the derivative of D by p. Forward, (1 − q)/(1 − p) − q/p = q·(e^gain − 1) + (1 − q)·(1 − e^−gain).
    """
    if divergence == "reverse":
        return gain
    forward = pass_rate * math.expm1(gain) - (1 - pass_rate) * math.expm1(-gain)
    return forward if divergence == "forward" else (forward + gain) / 2


def _gap(log_odds: float, group_size: float) -> float:
    """Δ = 𝒫(correct) − 𝒫(wrong) = E σ/(p(1 − p)), σ the deviation of a group's rewards.

    As E σ = Σ C(G, m)·p^m·(1 − p)^(G − m)·√(m(G − m))/G has neither an m = 0 nor an m = G term, p(1 − p) divides out:
    Δ is the mean of (G − 1)/√((J + 1)(G − 1 − J)) over J ~ Binomial(G − 2, p). A sum of positive terms, convex and
    symmetric about p = ½, and √(G − 1) at both ends.
    """
    if math.isinf(log_odds):
        return math.sqrt(group_size - 1)
    if math.isinf(group_size):
        return 2 * math.cosh(log_odds / 2)  # 1/√(p(1 − p))
    return _binomial_mean(lambda j: _share(j, group_size), int(group_size) - 2, log_odds)


def _gap_slope(log_odds: float, group_size: float) -> float:
    """dΔ/dp."""
    if math.isinf(group_size):
        return 4 * math.sinh(log_odds / 2) * math.cosh(log_odds / 2) ** 2
    if group_size == 2:
        return 0.0
    n = int(group_size) - 2
    return n * _binomial_mean(lambda j: _share(j + 1, group_size) - _share(j, group_size), n - 1, log_odds)


def _share(j: int, group_size: float) -> float:
    return (group_size - 1) / math.sqrt((j + 1) * (group_size - 1 - j))


def _binomial_mean(function: Callable[[int], float], n: int, log_odds: float) -> float:
    """E f(J), J ~ Binomial(n, p), over the terms that a float64 can tell from 0."""
    p, wrong = _pass_rate(log_odds), _pass_rate(-log_odds)
    log_p, log_wrong = -_softplus(-log_odds), -_softplus(log_odds)
    reach = 12 * math.sqrt(n * p * wrong) + 40
    log_factorial = math.lgamma(n + 1)
    return math.fsum(
        function(j)
        * math.exp(log_factorial - math.lgamma(j + 1) - math.lgamma(n - j + 1) + j * log_p + (n - j) * log_wrong)
        for j in range(max(0, math.floor(n * p - reach)), min(n, math.ceil(n * p + reach)) + 1)
    )


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _log_lambert(z: float) -> float:
    """log W(e^z), the root of u + e^u = z.

    e^z would overflow at z = 710, which a small β reaches at once. Newton from the right of the root of a convex,
    increasing function: it only goes down, until rounding stops it.
    """
    u = min(z, math.log(max(1.0, z)))
    while (lower := u - (u + math.exp(u) - z) / (1 + math.exp(u))) < u:
        u = lower
    return u


# (𝒫 − c)/β → log π/π_ref. Each c is shifted so that 0 goes to 0: it then lies between the least and the largest 𝒫.
_TILTS: dict[str, Callable[[float], float]] = {
    "forward": lambda a: -math.log1p(-a) if a < 1 else math.inf,
    "reverse": lambda a: a,
    "symmetric": lambda a: -_log_lambert(1 - 2 * a),
}
