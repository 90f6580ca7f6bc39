"""How a step is cut into micro-batches, against every way to cut it."""

from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from agrpo.training.batches import micro_batches


def cuts(costs):
    """Every way to cut a sequence into runs, as the runs' costs."""
    places = range(1, len(costs))
    for count in range(len(costs)):
        for inner in combinations(places, count):
            ends = [0, *inner, len(costs)]
            yield [sum(costs[a:b]) for a, b in pairwise(ends)]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(9, 40))
def test_there_are_as_few_as_can_be_and_the_largest_is_the_least(costs, budget):
    batches = micro_batches(costs, budget)
    assert [item for batch in batches for item in batch] == list(range(len(costs)))
    allowed = [cut for cut in cuts(costs) if max(cut) <= budget]
    fewest = min(map(len, allowed))
    assert len(batches) == fewest
    largest = max(sum(costs[item] for item in batch) for batch in batches)
    assert largest == min(max(cut) for cut in allowed if len(cut) == fewest)


@given(st.lists(st.integers(1, 30), max_size=8), st.integers(1, 20))
def test_an_item_above_the_budget_stands_alone(costs, budget):
    batches = micro_batches(costs, budget)
    assert [item for batch in batches for item in batch] == list(range(len(costs)))
    for batch in batches:
        assert len(batch) == 1 or sum(costs[item] for item in batch) <= budget
