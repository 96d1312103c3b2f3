"""Messages: what is sent is what arrives, and what is no message is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_llm.deployment.messages import VERSION, Said, check_arrays, digest, from_bytes, to_bytes
from fedjax_llm.errors import UserError
from fedjax_llm.federation.hosts import packed

VALUES = st.dictionaries(
    st.text(max_size=8), st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.binary(max_size=9)
)


@given(word=st.text(max_size=9), values=VALUES, seed=st.integers(0, 99))
def test_what_is_sent_arrives(word, values, seed):
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=(2, 3)).astype(np.float32), np.float32(seed), np.arange(4), np.zeros((0, 2), np.int32)]
    found = from_bytes(to_bytes(Said(word, values, arrays)))
    assert found.word == word
    assert repr(dict(found.values)) == repr(values)
    for array, sent in zip(found.arrays, arrays, strict=True):
        assert array.dtype == np.asarray(sent).dtype
        assert array.shape == np.shape(sent)
        assert array.tobytes() == np.asarray(sent).tobytes()


@given(st.binary(max_size=64))
def test_bytes_that_are_no_message_are_refused(data):
    with pytest.raises(UserError):
        from_bytes(data)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([VERSION + 1, "train", {}, []], "install the same"),
        ([VERSION, 3, {}, []], "other kinds"),
        ([VERSION, "train", [], []], "other kinds"),
        ([VERSION, "train", {}, [1.0]], "other kinds"),
        ([VERSION, "train", {}], "no message"),
    ],
)
def test_messages_of_another_form_are_refused(value, words):
    with pytest.raises(UserError, match=words):
        from_bytes(packed(value))


def test_a_digest_tells_values_arrays_and_dtypes_apart():
    one = np.arange(3, dtype=np.float32)
    assert digest("a", [one]) == digest("a", [one.copy()])
    others = [("b", [one]), ("a", [one + 1]), ("a", [one.astype(np.float64)]), ("a", [one[None]])]
    assert len({digest(*other) for other in [("a", [one]), *others]}) == 5


def test_arrays_that_are_expected_pass_and_others_are_named():
    like = [np.zeros((2, 2), np.float32), np.float32(0)]
    check_arrays([np.ones((2, 2), np.float32), np.ones((), np.float32)], like, "the update")
    with pytest.raises(UserError, match=r"array 1 of the update has the shape \(1,\)"):
        check_arrays([np.ones((2, 2), np.float32), np.ones(1, np.float32)], like, "the update")
    with pytest.raises(UserError, match="array 0 of the update holds numbers that are not finite"):
        check_arrays([np.full((2, 2), np.inf, np.float32), np.ones((), np.float32)], like, "the update")
