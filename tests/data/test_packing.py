import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.data.packing import Bins, Microbatch, Shape, choose_shapes, pack, target_count
from fedjax_llm.data.records import EncodedExample

LONGEST = 45


@st.composite
def examples(draw):
    """An example with at least one target; the tokens are none of them zero, as padding is."""
    length = draw(st.integers(2, LONGEST))
    prompt = draw(st.integers(0, length - 1))
    tokens = np.random.default_rng(draw(st.integers(0, 2**16))).integers(1, 1000, length)
    return EncodedExample("r", tokens.astype(np.int32), prompt)


works = st.lists(st.lists(st.lists(examples(), min_size=1, max_size=4), max_size=4), min_size=1, max_size=5)


def random_example(rng, low=40, high=120) -> EncodedExample:
    length = int(rng.integers(low, high + 1))
    return EncodedExample("r", rng.integers(1, 1000, length).astype(np.int32), int(rng.integers(10, length // 2)))


def flat(work):
    return [example for steps in work for step in steps for example in step]


@settings(max_examples=80)
@given(
    work=works, tokens=st.integers(20, 400), buckets=st.integers(1, 4), per_token=st.booleans(), spare=st.integers(0, 2)
)
def test_packing(work, tokens, buckets, per_token, spare):
    """Every row once, whole, in its client's order, with its targets; steps are closed when they are complete."""
    every = flat(work) or [EncodedExample("r", np.ones(2, np.int32), 1)]
    shapes = choose_shapes(every, tokens_per_microbatch=tokens, buckets=buckets)
    clients = len(work) + spare
    current = [0] * clients
    packed = [set() for _ in range(clients)]
    for batch in pack(work, shapes, clients=clients, per_token=per_token):
        assert Shape(*batch.tokens.shape, len(batch.target_row)) in shapes
        assert all(array.shape == batch.tokens.shape[:1] for array in (batch.client, batch.step, batch.index))
        real = sorted(set(batch.target_row[batch.target_weight > 0].tolist()))
        assert len(real) > 0
        for m in real:
            client, step, index = (int(array[m]) for array in (batch.client, batch.step, batch.index))
            assert step == current[client]  # the step before was closed by an earlier microbatch
            assert index not in packed[client]
            packed[client].add(index)
            check_row(batch, m, work[client][step][index], per_token)
        padding = np.setdiff1d(np.arange(len(batch.tokens)), real)
        assert not batch.tokens[padding].any()
        assert not batch.client[padding].any()
        lengths = [len(work[batch.client[m]][batch.step[m]][batch.index[m]].tokens) for m in real]
        assert batch.real_tokens == sum(lengths)
        for client in range(clients):
            check_closing(batch, client, work, current, packed, per_token)
    assert current == [*map(len, work), *[0] * spare]
    assert not any(packed)


def check_row(batch, m, example, per_token):
    length, first = len(example.tokens), max(example.prompt_length, 1)
    np.testing.assert_array_equal(batch.tokens[m, :length], example.tokens)
    assert not batch.tokens[m, length:].any()
    slots = (batch.target_row == m) & (batch.target_weight > 0)
    np.testing.assert_array_equal(batch.target_position[slots], np.arange(first - 1, length - 1))
    np.testing.assert_array_equal(batch.target_token[slots], example.tokens[first:])
    weight = 1.0 if per_token else 1.0 / target_count(example)
    np.testing.assert_array_equal(batch.target_weight[slots], np.float32(weight))


def check_closing(batch, client, work, current, packed, per_token):
    """Compares with the test's own books, and closes the step there."""
    step = work[client][current[client]] if client < len(work) and current[client] < len(work[client]) else []
    complete = len(step) > 0 and len(packed[client]) == len(step)
    assert batch.finished[client] == complete
    assert batch.finished_step[client] == (current[client] if complete else 0)
    divisor = sum(map(target_count, step)) if per_token else len(step)
    assert batch.denominator[client] == (divisor if complete else 1)
    if complete:
        current[client] += 1
        packed[client].clear()


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(2, 70), min_size=1, max_size=12), buckets=st.integers(1, 4))
def test_bucket_edges_pad_as_little_as_can_be(lengths, buckets):
    made = [EncodedExample("r", np.ones(length, np.int32), 1) for length in lengths]
    edges = [shape.length for shape in choose_shapes(made, tokens_per_microbatch=256, buckets=buckets)]
    rounded = [-(-length // 8) * 8 for length in lengths]

    def padding(edges):
        return sum(min(edge for edge in edges if edge >= length) - length for length in rounded)

    distinct = sorted(set(rounded))
    choices = [
        (*some, distinct[-1]) for count in range(buckets) for some in itertools.combinations(distinct[:-1], count)
    ]
    assert len(edges) <= buckets
    assert edges == sorted(set(edges))
    assert padding(edges) == min(map(padding, choices))


@settings(max_examples=60)
@given(made=st.lists(examples(), min_size=1, max_size=20), tokens=st.integers(1, 500), buckets=st.integers(1, 4))
def test_every_example_fits_a_shape_alone(made, tokens, buckets):
    shapes = choose_shapes(made, tokens_per_microbatch=tokens, buckets=buckets)
    for shape in shapes:
        assert shape.rows >= 1
        assert shape.length % 8 == 0
        assert shape.targets <= shape.rows * shape.length
        assert shape.rows == 1 or abs(shape.rows * shape.length - tokens) <= shape.length
    for example in made:
        fitting = [s for s in shapes if len(example.tokens) <= s.length]
        assert fitting
        assert all(target_count(example) <= shape.targets for shape in fitting)


@pytest.mark.parametrize(("prompt", "count"), [(0, 4), (1, 4), (3, 2), (5, 0)])
def test_the_first_token_of_all_is_never_a_target(prompt, count):
    assert target_count(EncodedExample("r", np.arange(1, 6, dtype=np.int32), prompt)) == count


@pytest.mark.parametrize("per_token", [False, True])
def test_an_example_without_targets_is_packed_and_counted(per_token):
    silent = EncodedExample("r", np.arange(1, 6, dtype=np.int32), 5)
    spoken = EncodedExample("r", np.arange(1, 9, dtype=np.int32), 6)
    shapes = choose_shapes([silent, spoken], tokens_per_microbatch=16, buckets=1)
    (batch,) = pack([[[silent, spoken]]], shapes, clients=1, per_token=per_token)
    assert batch.finished.tolist() == [True]
    assert batch.denominator.tolist() == [2.0]
    assert batch.target_weight.sum() == (2.0 if per_token else 1.0)


units = st.lists(examples(), min_size=1, max_size=3).map(tuple)
private_works = st.lists(st.lists(st.lists(units, max_size=4), max_size=3), min_size=1, max_size=4)


@settings(max_examples=60)
@given(work=private_works, tokens=st.integers(20, 200), buckets=st.integers(1, 3))
def test_units_stay_together_and_denominators_are_the_public_ones(work, tokens, buckets):
    """Whatever was sampled, down to nothing: every step is finished, in order, with its client's own constant."""
    every = [one for unit in flat(work) for one in unit] or [EncodedExample("r", np.ones(2, np.int32), 1)]
    shapes = choose_shapes(every, tokens_per_microbatch=tokens, buckets=buckets, rows_of_unit=3)
    public = [1.5 + c for c in range(len(work))]
    seen, finished = [], []
    for batch in pack(work, shapes, clients=len(work), denominators=public):
        real = len(batch.examples)
        assert 1 <= real <= len(batch.unit)
        for number in sorted(set(batch.unit[:real].tolist())):
            mine = np.flatnonzero(batch.unit[:real] == number)
            seen.append(check_unit(batch, mine, work))
        assert set(batch.unit[real:].tolist()) <= {len(batch.unit) - 1} - set(batch.unit[:real].tolist())
        for client in np.flatnonzero(batch.finished):
            finished.append((client, int(batch.finished_step[client])))
            assert batch.denominator[client] == np.float32(public[client])
    expected = [
        (c, s, u) for c, steps in enumerate(work) for s, step in enumerate(steps) for u in range(len(step) or 1)
    ]
    assert sorted(seen) == expected
    assert sorted(finished) == [(c, s) for c, steps in enumerate(work) for s in range(len(steps))]
    assert [one for one in finished if one[0] == 0] == [(0, step) for step in range(len(work[0]))]


def check_unit(batch, rows, work):
    """The rows [R] of a unit against the unit: gives its (client, step, place)."""
    client, step = int(batch.client[rows[0]]), int(batch.step[rows[0]])
    group = work[client][step]
    if not group:  # one row without a target stands for nothing
        assert len(rows) == 1
        assert not batch.target_weight[batch.target_row == rows[0]].any()
        return client, step, 0
    first = [sum(map(len, group[:place])) for place in range(len(group))]
    place = first.index(batch.index[rows[0]])
    assert len(rows) == len(group[place])
    for m, example, index in zip(rows, group[place], range(first[place], 99), strict=False):
        assert batch.examples[m] is example
        assert (batch.client[m], batch.step[m], batch.index[m]) == (client, step, index)
        weights = batch.target_weight[(batch.target_row == m) & (batch.target_weight > 0)]
        assert len(weights) == target_count(example)
        np.testing.assert_allclose(weights, 1 / (target_count(example) * len(rows)), rtol=1e-6)
    return client, step, place


def test_a_unit_of_more_rows_than_memory_allows_gets_a_shape_that_holds_it():
    rng = np.random.default_rng(1)
    unit = tuple(random_example(rng, 60, 64) for _ in range(5))
    shapes = choose_shapes(unit, tokens_per_microbatch=64, buckets=2, rows_of_unit=5)
    (batch,) = pack([[[unit]]], shapes, clients=1)
    assert set(batch.unit[:5].tolist()) == {0}
    assert batch.denominator.tolist() == [1.0]  # a unit weighs as much as one example


def test_packing_is_a_function_of_the_work():
    rng = np.random.default_rng(0)
    work = [[[random_example(rng) for _ in range(3)] for _ in range(2)] for _ in range(5)]
    shapes = choose_shapes(flat(work), tokens_per_microbatch=512, buckets=3)
    one, two = ([batch.tokens.tobytes() for batch in pack(work, shapes, clients=5)] for _ in range(2))
    assert one == two


@pytest.mark.parametrize(("clients", "steps", "most"), [(64, 3, 0.03), (64, 1, 0.07), (16, 5, 0.07)])
def test_padding_is_little_more_than_the_bucket_edges_cost(clients, steps, most):
    rng = np.random.default_rng(0)
    work = [[[random_example(rng) for _ in range(4)] for _ in range(steps)] for _ in range(clients)]
    shapes = choose_shapes(flat(work), tokens_per_microbatch=1024, buckets=4)
    microbatches = list(pack(work, shapes, clients=clients))
    lengths = [len(example.tokens) for example in flat(work)]
    bound = sum(min(shape.length for shape in shapes if shape.length >= length) for length in lengths)
    padded = sum(batch.tokens.size for batch in microbatches)
    print(f"{1 - sum(lengths) / padded:.1%} padding; {1 - sum(lengths) / bound:.1%} if no row were empty")
    assert sum(batch.real_tokens for batch in microbatches) == sum(lengths)
    assert (padded - bound) / padded < most
    assert 1 - sum(lengths) / bound < 0.12


# Bins.


def arrays(batch: Microbatch) -> dict[str, np.ndarray]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, np.ndarray)}


def binned(work, tokens, buckets, bins, **options):
    """Shapes, the number of slots and the microbatches of units of at most three rows."""
    every = [one for unit in flat(work) for one in unit] or [EncodedExample("r", np.ones(2, np.int32), 1)]
    sizes = {"tokens_per_microbatch": tokens, "buckets": buckets, "rows_of_unit": 3}
    shapes = choose_shapes(every, **sizes, bins=bins.count)
    slots = -(-len(work) // bins.groups) * bins.groups
    return shapes, slots, list(pack(work, shapes, clients=slots, bins=bins, **options))


@settings(max_examples=60)
@given(
    work=private_works,
    tokens=st.integers(20, 200),
    buckets=st.integers(1, 3),
    bins=st.builds(Bins, st.integers(1, 3), st.integers(1, 3)),
)
def test_every_unit_is_in_one_bin_of_its_clients_group(work, tokens, buckets, bins):
    """Every row once, in order of the steps; what a bin counts it counts within itself; the rest is padding."""
    shapes, slots, batches = binned(work, tokens, buckets, bins)
    seen, finished = [], []
    for batch in batches:
        assert Shape(*batch.tokens.shape, len(batch.target_row)) in shapes
        rows, targets = len(batch.tokens) // bins.count, len(batch.target_row) // bins.count
        assert rows * bins.count == len(batch.tokens)
        for place in range(bins.count):
            part = slice(place * rows, (place + 1) * rows)
            own = replace(
                batch,
                rows=batch.rows[part],
                **{name: getattr(batch, name)[part] for name in ("tokens", "client", "step", "index", "unit")},
                **{
                    name: value[place * targets : (place + 1) * targets]
                    for name, value in arrays(batch).items()
                    if name.startswith("target")
                },
            )
            units_of_bin = check_bin(own, work)
            seen += units_of_bin
            group = place // bins.each
            assert {client * bins.groups // slots for client, _, _ in units_of_bin} <= {group}
        finished += [(int(c), int(batch.finished_step[c])) for c in np.flatnonzero(batch.finished)]
    expected = [(c, s, u) for c, steps in enumerate(work) for s, step in enumerate(steps) for u in range(len(step))]
    assert sorted(seen) == expected
    for c in range(len(work)):
        assert [s for client, s in finished if client == c] == list(range(len(work[c])))


def check_bin(own, work):
    """The units of a bin, as (client, step, place); the rows without examples have no target, and no unit's number."""
    rows = len(own.tokens)
    assert ((own.target_row >= 0) & (own.target_row < rows)).all()
    assert ((own.unit >= 0) & (own.unit < rows)).all()
    real = np.array([m for m, example in enumerate(own.examples) if len(example.tokens) > 1], int)
    rest = np.setdiff1d(np.arange(rows), real)
    assert not own.tokens[rest].any()
    assert not own.target_weight[np.isin(own.target_row, rest)].any()
    assert not set(own.unit[rest].tolist()) & set(own.unit[real].tolist())
    return [check_unit(own, real[own.unit[real] == number], work) for number in np.unique(own.unit[real])]


@settings(max_examples=30)
@given(work=private_works, tokens=st.integers(20, 200), each=st.integers(1, 4), per_token=st.booleans())
def test_steps_end_with_the_same_denominators_in_any_number_of_bins(work, tokens, each, per_token):
    def ends(bins):
        _, _, batches = binned(work, tokens, 2, bins, per_token=per_token)
        done = [
            (int(c), int(batch.finished_step[c]), float(batch.denominator[c]))
            for batch in batches
            for c in np.flatnonzero(batch.finished)
        ]
        return sorted(done), sum(batch.real_tokens for batch in batches)

    assert ends(Bins(2, each)) == ends(Bins())


@settings(max_examples=30)
@given(work=private_works, tokens=st.integers(20, 200), bins=st.builds(Bins, st.integers(1, 3), st.integers(1, 3)))
def test_shapes_of_bins_are_multiples_of_those_of_one(work, tokens, bins):
    every = [one for unit in flat(work) for one in unit] or [EncodedExample("r", np.ones(2, np.int32), 1)]
    one = choose_shapes(every, tokens_per_microbatch=tokens, buckets=2, rows_of_unit=3)
    many = choose_shapes(every, tokens_per_microbatch=tokens, buckets=2, rows_of_unit=3, bins=bins.count)
    assert many == tuple(Shape(s.rows * bins.count, s.length, s.targets * bins.count) for s in one)


def test_every_group_is_filled_side_by_side():
    """Bins of one group do not wait for those of another: with equal work all are filled alike."""
    rng = np.random.default_rng(3)
    work = [[[random_example(rng, 32, 32) for _ in range(4)]] for _ in range(4)]
    shapes = choose_shapes(flat(work), tokens_per_microbatch=128, buckets=1, bins=4)
    (batch,) = pack(work, shapes, clients=4, bins=Bins(2, 2))
    assert batch.client.reshape(4, 4).tolist() == [[0] * 4, [1] * 4, [2] * 4, [3] * 4]
    assert batch.unit.reshape(4, 4).tolist() == [[0, 1, 2, 3]] * 4
    assert batch.finished.all()
