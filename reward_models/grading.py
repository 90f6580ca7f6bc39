"""What grades an evaluation, from the names on its command line."""

from __future__ import annotations

from agrpo.config import RewardSpec
from agrpo.evaluation.measure import Grading
from reward_models.configured import reward_set
from reward_models.loader import RewardError, find_target


def grading(specs: list[RewardSpec], vote: str | None) -> Grading:
    """The rewards, and the function that reads what a completion votes for.

    Raises:
        RewardError: one of them cannot be imported or made.
    """
    read = None if vote is None else find_target(vote)
    if read is not None and not callable(read):
        raise RewardError(f"--vote {vote}: is a {type(read).__name__}, not a function of (completion, columns)")
    return Grading(reward_set(specs), read, [*(spec.model_dump(mode="json") for spec in specs), vote])
