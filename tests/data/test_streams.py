import pytest
from hypothesis import given
from hypothesis import strategies as st

from agrpo.data.streams import Stream


@st.composite
def shapes(draw):
    size = draw(st.integers(1, 60))
    batch = draw(st.integers(1, size))
    return {"size": size, "batch": batch, "seed": draw(st.integers(0, 2**32 - 1)), "shuffle": draw(st.booleans())}


@given(shapes(), st.integers(0, 12), st.integers(1, 12))
def test_a_resumed_stream_equals_the_uninterrupted_one(shape, before, after):
    whole = Stream(**shape)
    expected = [next(whole) for _ in range(before + after)]
    first = Stream(**shape)
    for _ in range(before):
        next(first)
    resumed = Stream(**shape)
    resumed.load_state_dict(first.state_dict())
    assert [next(resumed) for _ in range(after)] == expected[before:]


@given(shapes(), st.data())
def test_the_union_over_ranks_is_the_single_rank_batch_also_when_resumed_on_another_world(shape, data):
    world = data.draw(st.integers(1, shape["batch"]))
    alone, ranks = Stream(**shape), [Stream(**shape, rank=rank, world=world) for rank in range(world)]
    next(alone)
    for rank in ranks:
        rank.load_state_dict(alone.state_dict())
    for _ in range(3):
        shards = [next(rank) for rank in ranks]
        assert sorted(pair for shard in shards for pair in shard) == next(alone)
        assert all(slot % world == rank for rank, shard in enumerate(shards) for slot, _ in shard)


@given(shapes())
def test_each_epoch_is_a_permutation_whatever_the_batch(shape):
    stream, seen = Stream(**shape), []
    while len(seen) < 3 * shape["size"]:
        batch = next(stream)
        assert [slot for slot, _ in batch] == list(range(shape["batch"]))
        seen += [index for _, index in batch]
    for epoch in range(3):
        assert sorted(seen[epoch * shape["size"] :][: shape["size"]]) == list(range(shape["size"]))


def test_epochs_and_seeds_have_orders_of_their_own():
    def orders(seed):
        stream = Stream(50, 50, seed)
        return [tuple(index for _, index in next(stream)) for _ in range(2)]

    assert len({*orders(0), *orders(1)}) == 4
    assert [index for _, index in next(Stream(50, 50, 0, shuffle=False))] == list(range(50))


def test_every_row_comes_first_equally_often():
    firsts = [next(Stream(4, 1, seed))[0][1] for seed in range(2000)]
    assert all(abs(firsts.count(row) - 500) < 100 for row in range(4))  # five standard deviations


def test_the_order_is_the_same_on_every_machine_and_version():
    assert [index for _, index in next(Stream(10, 10, 7))] == [8, 4, 3, 6, 2, 1, 0, 5, 9, 7]


@pytest.mark.parametrize("key, value", [("size", 21), ("batch", 5), ("seed", 1), ("shuffle", False)])
def test_a_state_of_another_stream_is_refused_by_name(key, value):
    shape = {"size": 20, "batch": 4, "seed": 0, "shuffle": True}
    stream = Stream(**{**shape, key: value})
    with pytest.raises(ValueError, match=f"has {key} {shape[key]}, this run's has {value}; restore"):
        stream.load_state_dict(Stream(**shape).state_dict())


@pytest.mark.parametrize("size, batch, rank, world", [(3, 4, 0, 1), (3, 0, 0, 1), (8, 2, 0, 3), (8, 4, 2, 2)])
def test_impossible_shapes_are_refused(size, batch, rank, world):
    with pytest.raises(ValueError, match="a batch of"):
        Stream(size, batch, 0, rank, world)
