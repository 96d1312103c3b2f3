"""Shared rows hold every example once, whole, and what they save is what their examples begin with."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_llm.data.packing import ONE_BIN, Bins, choose_shapes, pack
from fedjax_llm.data.records import EncodedExample
from fedjax_llm.data.shared_rows import SharedRow, likely_rows, shared_rows, target_count

BEGINNINGS = ((), (7,), (7, 8, 9, 5, 6), (7, 8, 9, 4, 4, 4, 4, 4, 4, 4))
LONGEST = 24


@st.composite
def batches(draw):
    """Examples that begin with some of a few words; prompts end anywhere."""
    found = []
    for number in range(draw(st.integers(1, 9))):
        words = [*draw(st.sampled_from(BEGINNINGS)), *draw(st.lists(st.integers(0, 9), min_size=2, max_size=14))]
        found.append(EncodedExample(f"r{number}", np.array(words, np.int32), draw(st.integers(0, len(words) - 1))))
    return found


def by_name(examples):
    return sorted(examples, key=lambda example: example.record_id)


@settings(max_examples=100)
@given(batch=batches())
def test_each_example_is_in_one_row_which_is_no_longer_than_allowed(batch):
    rows = shared_rows(batch, LONGEST)
    assert by_name(example for row in rows for example in row.examples) == by_name(batch)
    for row in rows:
        assert row.length <= max(LONGEST, len(row.examples[0].tokens))
        assert len(row.examples) == 1 or row.length <= LONGEST
        shared = {tuple(example.tokens[: row.shared].tolist()) for example in row.examples}
        assert len(shared) == 1
        assert all(row.shared < max(example.prompt_length, 1) for example in row.examples)
        assert row.targets == sum(map(target_count, row.examples))
        if len(row.examples) > 1:  # nothing more could be shared
            most = min(max(example.prompt_length, 1) - 1 for example in row.examples)
            words = {tuple(example.tokens[: row.shared + 1].tolist()) for example in row.examples}
            assert row.shared == most or len(words) > 1


def test_what_begins_alike_goes_together():
    alike = [EncodedExample(f"a{n}", np.array([1, 2, 3, 4, n, 9]), 5) for n in range(2)]
    other = [EncodedExample(f"b{n}", np.array([5, 6, 7, 8, n, 9]), 5) for n in range(2)]
    rows = shared_rows([alike[0], other[0], alike[1], other[1]], 9)
    assert [[example.record_id for example in row.examples] for row in rows] == [["a0", "a1"], ["b0", "b1"]]
    assert [(row.shared, row.length) for row in rows] == [(4, 8), (4, 8)]


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.lists(batches(), min_size=1, max_size=2), min_size=2, max_size=4), halves=st.booleans())
def test_packed_rows_give_back_every_example_where_its_targets_are(steps, halves):
    clients = len(steps) + len(steps) % 2
    bins = Bins(2, 1) if halves else ONE_BIN
    flat = [[example for batch in own for example in batch] for own in steps]
    shapes = choose_shapes(likely_rows(flat, 4, LONGEST), tokens_per_microbatch=64, buckets=2, bins=bins.count)
    left = {(c, s): {example.record_id: example for example in batch}
            for c, own in enumerate(steps) for s, batch in enumerate(own)}  # fmt: skip
    for batch in pack(steps, shapes, clients=clients, bins=bins, share=LONGEST):
        size = batch.tokens.shape[0] // bins.count
        slots = len(batch.target_row) // bins.count
        held = [(m, row) for m, row in enumerate(batch.rows) if row.examples[0].record_id]
        for m, row in held:
            own = np.arange(slots) + m // size * slots
            own = own[(batch.target_row[own] == m % size) & (batch.target_weight[own] > 0)]
            check_row(batch, m, row, own)
            waiting = left[int(batch.client[m]), int(batch.step[m])]
            for example in row.examples:
                assert waiting.pop(example.record_id) is example
        assert batch.real_tokens == sum(len(one.tokens) for one in batch.examples if one.record_id)
        assert (np.delete(batch.branch, [m for m, _ in held], axis=0) == -1).all()
    assert not any(left.values())


def check_row(batch, m, row: SharedRow, slots):
    """Branch by branch, what the row holds is the example, its positions and its targets."""
    every = np.arange(batch.branch.shape[1])
    assert (batch.branch[m, : row.shared] == -1).all()
    for number, example in enumerate(row.examples):
        held = np.flatnonzero((every < row.shared) | (batch.branch[m] == number))
        np.testing.assert_array_equal(batch.tokens[m, held], example.tokens)
        np.testing.assert_array_equal(batch.position[m, held], np.arange(len(example.tokens)))
        count = target_count(example)
        mine = slots[batch.branch[m, batch.target_position[slots]] == number]
        assert len(mine) == count
        np.testing.assert_array_equal(batch.target_token[mine], example.tokens[len(example.tokens) - len(mine) :])
        after = held[np.searchsorted(held, batch.target_position[mine]) + 1]
        np.testing.assert_array_equal(batch.tokens[m, after], batch.target_token[mine])
        assert (batch.target_weight[mine] == np.float32(1 / max(count, 1))).all()
    assert (batch.branch[m] >= 0).sum() == row.length - row.shared


def test_shapes_hold_whatever_rows_a_batch_makes():
    rng = np.random.default_rng(0)
    texts = [
        EncodedExample(f"r{n}", rng.integers(0, 9, int(rng.integers(3, 30))).astype(np.int32), 1) for n in range(40)
    ]
    shapes = choose_shapes(likely_rows([texts], 8, LONGEST), tokens_per_microbatch=64, buckets=3)
    assert shapes[-1].length >= 30 > LONGEST
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(40)[:8]
        batches = list(pack([[[texts[i] for i in order]]], shapes, clients=1, share=LONGEST))
        assert sorted(example.record_id for batch in batches for example in batch.examples) == sorted(
            texts[i].record_id for i in order
        )
