"""What `accuracy` runs in the verifier pool's workers: math-verify on a solution and an answer.

Imported there only. math-verify's own limits are off: they rest on SIGALRM and count each comparison; the pool has a
deadline for the whole job.
"""

from __future__ import annotations

from typing import Any

from math_verify import parse, verify


def readable(solution: str) -> bool:
    """Whether the solution is mathematics that math-verify can turn into an expression."""
    return any(not isinstance(value, str) for value in _parse(solution, prose=False))


def equal(solution: str, answer: str, prose: bool) -> bool:
    """Whether the answer means the solution. In prose, math-verify finds the answer in the text by itself."""
    return bool(verify(_parse(solution, prose=False), _parse(answer, prose), timeout_seconds=None))


def _parse(text: str, prose: bool) -> list[Any]:
    bare = text.strip().strip("$")
    if not prose and "$" not in bare:
        text = f"${bare}$"  # without a delimiter math-verify would not look for LaTeX
    return parse(text, parsing_timeout=None)
