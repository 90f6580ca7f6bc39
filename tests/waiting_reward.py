"""Rewards that wait for the verifier pool, and the same ones as they are without `while_sampling`."""

from reward_models.verifier import shared_pool


def after(prompts, completions, completion_ids, **columns):
    """The last digits of the tokens' sum, by a worker; some abstain, some are no number."""
    sums = shared_pool().map("math:fsum", [(list(ids),) for ids in completion_ids])
    return [None if s % 10 == 3 else float("nan") if s % 10 == 7 else s % 10 for s in sums]


def meanwhile(prompts, completions, completion_ids, **columns):
    return after(prompts, completions, completion_ids, **columns)


meanwhile.while_sampling = "prompt"
