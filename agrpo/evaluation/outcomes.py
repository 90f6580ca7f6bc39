"""What n graded samples of one prompt say: pass@k, and whether the majority is right."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import comb


def pass_at_k(samples: int, passes: int, k: int) -> float:
    """The probability that at least one of k samples passes, estimated without bias from n ≥ k of them.

    1 − C(n − c, k) / C(n, k): the share of the k-subsets of n samples that hold one of the c that pass. Exact: the
    binomials are integers.

    Raises:
        ValueError: not 1 ≤ k ≤ n, or not 0 ≤ c ≤ n.

    Source: Chen et al. 2021 (arXiv 2107.03374), eq. 1.
    """
    if not 1 <= k <= samples or not 0 <= passes <= samples:
        raise ValueError(f"pass@{k} of {samples} samples, {passes} of which pass: needs 1 ≤ k ≤ n and 0 ≤ c ≤ n")
    return 1 - comb(samples - passes, k) / comb(samples, k)


def majority(votes: Sequence[str | None], passes: Sequence[bool]) -> float:
    """Is the most frequent answer of a prompt's samples right? maj@k of k samples, in [0, 1].

    A sample without an answer does not vote; where none votes the majority is wrong. Answers that lead with equally
    many votes count their mean, as if the tie were broken at random. An answer is as right as the share of its samples
    that pass: 0 or 1 where the grader looks at the answer alone.

    Source: Wang et al. 2022 (arXiv 2203.11171), self-consistency.
    """
    of_answer: dict[str, list[bool]] = defaultdict(list)
    for vote, right in zip(votes, passes, strict=True):
        if vote is not None:
            of_answer[vote].append(right)
    most = max(map(len, of_answer.values()), default=0)
    leaders = [sum(rights) / len(rights) for rights in of_answer.values() if len(rights) == most]
    return sum(leaders) / len(leaders) if leaders else 0.0
