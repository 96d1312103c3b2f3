"""Checkpoints: bit-exact, safe from kills and damage, and honest about what was lost."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fedjax_llm.errors import UserError
from fedjax_llm.runs.checkpoints import Checkpoints


class State(NamedTuple):
    round: int
    adapters: dict
    key: jax.Array


def state_at(step, size=2000):
    rng = np.random.default_rng(step)
    adapters = {"layers/0/q_proj": {"a": jnp.asarray(rng.normal(size=(3, size)), jnp.float32), "b": jnp.zeros((0, 4))}}
    return State(step, adapters, jax.random.key(step))


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for mine, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert type(mine) is type(theirs)
        if isinstance(mine, jax.Array) and jax.dtypes.issubdtype(mine.dtype, jax.dtypes.prng_key):
            assert mine.dtype == theirs.dtype
            mine, theirs = jax.random.key_data(mine), jax.random.key_data(theirs)
        mine, theirs = np.asarray(mine), np.asarray(theirs)
        assert (mine.dtype, mine.shape, mine.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes())


@pytest.fixture
def three(tmp_path):
    with Checkpoints(tmp_path, keep_last=3, keep_best=0) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state_at(step), {"position": step / 3})
    return tmp_path


def test_every_kind_of_leaf_comes_back_bit_for_bit(tmp_path):
    state = {
        "f32": jnp.asarray([0.1, -0.0, jnp.nan, jnp.inf, 1e-42], jnp.float32),
        "bf16": jnp.asarray([[1.1, 2.2]], jnp.bfloat16),
        "numpy": [np.float64(np.pi).reshape(()), np.arange(6, dtype=np.int8).reshape(2, 3), np.array([True, False])],
        "half": np.array([3.5], ml_dtypes.bfloat16),
        "scalar": jnp.int32(7),
        "empty": jnp.zeros((2, 0), jnp.int32),
        "keys": (jax.random.split(jax.random.key(3), 4), jax.random.key(1, impl="rbg")),
        "odd/name.with\"'[0]": np.float32(2).reshape(1),
        "numbers": (3, 0.1, True),
    }
    extra = {"seed": 1, "unicode": "Ω", "list": [1, [2.5, None]], "loss": 0.1 + 0.2}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(12, state, extra)
    step, restored, found = Checkpoints(tmp_path).restore_latest(jax.tree.map(lambda leaf: leaf, state))
    assert step == 12
    assert found == extra
    assert_same(restored, state)


def test_a_state_without_any_element_can_be_saved(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": jnp.zeros((0, 3)), "none": ()}, {})
        _, restored, _ = checkpoints.restore_latest({"a": jnp.ones((0, 3)), "none": ()})
    assert restored["a"].shape == (0, 3)


def test_saved_is_what_was_passed_even_if_it_is_donated_or_changed_at_once(tmp_path):
    shape = (400, 1000)
    array, jax_array = np.full(shape, 1.0, np.float32), jnp.full(shape, 2.0)
    consume = jax.jit(lambda value: value * 0 - 1, donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, (array, jax_array), {})
        array[:] = -1
        consume(jax_array)
    _, (first, second), _ = Checkpoints(tmp_path).restore_latest((array, jnp.zeros(shape)))
    assert np.all(first == 1)
    assert np.all(second == 2)


def test_the_newest_and_the_best_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep_last=2, keep_best=1) as checkpoints:
        for step, metric in enumerate([5.0, 1.0, None, 3.0, float("nan"), 4.0, 2.0], 1):
            checkpoints.save(step, state_at(step), {}, metric)
    again = Checkpoints(tmp_path)
    assert again.steps() == [2, 6, 7]
    assert again.restore_best(state_at(0))[0] == 2
    assert_same(again.restore_latest(state_at(0))[1], state_at(7))


def test_without_checkpoints_there_is_nothing_to_restore(tmp_path):
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.restore_latest(state_at(0)) is None
        assert checkpoints.restore_best(state_at(0)) is None
        checkpoints.save(1, state_at(1), {})
        assert checkpoints.restore_best(state_at(0)) is None, "no metric was given"


def test_a_checkpoint_of_the_same_step_is_replaced(three):
    with Checkpoints(three) as checkpoints:
        checkpoints.save(3, state_at(33), {"position": "new"})
        step, state, extra = checkpoints.restore_latest(state_at(0))
    assert (step, extra) == (3, {"position": "new"})
    assert_same(state, state_at(33))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def data(folder):
    return [path for path in (folder / "state").rglob("*") if path.parent.name == "d"]


def forge(folder):
    path = folder / "manifest" / "metadata"
    manifest = json.loads(path.read_text())
    manifest["extra"]["position"] = 2
    path.write_text(json.dumps(manifest))


DAMAGE = {
    "data flipped": lambda folder: [flip(path) for path in data(folder)],
    "data cut": lambda folder: [os.truncate(path, 20) for path in data(folder)],
    "data missing": lambda folder: [path.unlink() for path in data(folder)],
    "index flipped": lambda folder: flip(folder / "state" / "manifest.ocdbt"),
    "state missing": lambda folder: shutil.rmtree(folder / "state"),
    "manifest missing": lambda folder: (folder / "manifest" / "metadata").unlink(),
    "manifest cut": lambda folder: os.truncate(folder / "manifest" / "metadata", 30),
    "manifest changed": forge,
    "all empty": lambda folder: [os.truncate(path, 0) for path in folder.rglob("*") if path.is_file()],
    "nothing left": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_newest_falls_back_to_the_one_before_and_says_so(three, damage):
    damage(three / "3")
    said = []
    with Checkpoints(three, keep_last=2, keep_best=0, warn=said.append) as checkpoints:
        step, state, extra = checkpoints.restore_latest(state_at(0))
        assert (step, extra) == (2, {"position": 2 / 3})
        assert_same(state, state_at(2))
        assert len(said) == 1
        assert "checkpoint 3" in said[0]
        assert "damaged" in said[0]
        checkpoints.save(3, state_at(3), {})
    assert Checkpoints(three).steps() == [2, 3], "the damaged one does not count among the newest"


def test_what_a_killed_save_left_is_removed(three):
    left = three / "4.orbax-checkpoint-tmp"
    shutil.copytree(three / "3", left)
    shutil.rmtree(left / "state" / "d")
    said = []
    with Checkpoints(three, warn=said.append) as checkpoints:
        assert checkpoints.restore_latest(state_at(0))[0] == 3
    assert not left.exists()
    assert said == [], "a save that was cut off is nothing lost"


def test_none_intact_is_an_error_now_and_later(three):
    for step in (1, 2, 3):
        DAMAGE["data flipped"](three / str(step))
    said = []
    for _ in range(2):
        with pytest.raises(UserError, match="none of the checkpoints"):
            Checkpoints(three, warn=said.append).restore_latest(state_at(0))
    assert len(said) == 3


def test_a_damaged_best_falls_back_to_the_next_best(tmp_path):
    said = []
    with Checkpoints(tmp_path, keep_best=2, warn=said.append) as checkpoints:
        for step, metric in enumerate([1.0, 2.0, 3.0, 4.0], 1):
            checkpoints.save(step, state_at(step), {}, metric)
        assert checkpoints.restore_best(state_at(0))[0] == 1
        DAMAGE["data cut"](tmp_path / "1")
        assert checkpoints.restore_best(state_at(0))[0] == 2
    assert len(said) == 1


def test_another_structure_is_refused_and_nothing_is_moved(three):
    other = state_at(0)._replace(adapters={"layers/0/q_proj": {"a": jnp.zeros((3, 8)), "c": jnp.zeros(2)}})
    with pytest.raises(UserError) as caught:
        Checkpoints(three).restore_latest(other)
    message = str(caught.value)
    assert ".adapters['layers/0/q_proj']['a']: saved float32[3, 2000], expected float32[3, 8]" in message
    assert "['c']: saved nothing, expected float32[2]" in message
    assert Checkpoints(three).steps() == [1, 2, 3]


def test_a_full_disk_is_told_and_earlier_checkpoints_stay(three):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = Checkpoints(three)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # writing past it fails as a full disk does
    try:
        checkpoints.save(4, state_at(4, size=400_000), {})
        with pytest.raises(UserError, match=r"cannot save checkpoint 4 .*free some space"):
            checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpoints.close()
    assert Checkpoints(three).restore_latest(state_at(0))[0] == 3


def test_impossible_counts_are_refused(tmp_path):
    with pytest.raises(UserError, match="keep_last=0"):
        Checkpoints(tmp_path, keep_last=0)


KILLED = """
import sys
import numpy as np
from fedjax_llm.runs.checkpoints import Checkpoints
with Checkpoints(sys.argv[1], keep_last=1, keep_best=0) as checkpoints:
    for step in range(1, 1000):
        print(step, flush=True)
        checkpoints.save(step, {"x": np.full((8, 250_000), step, np.float32)}, {"step": step})
"""


def test_a_kill_at_any_instant_leaves_an_intact_checkpoint(tmp_path):
    like = {"x": np.zeros((8, 250_000), np.float32)}
    for milliseconds in (0, 30, 90):
        command = [sys.executable, "-c", KILLED, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            while int(process.stdout.readline()) < 3:  # the saves 1 and, at least, the write of 2 were begun
                pass
            time.sleep(milliseconds / 1000)
            process.send_signal(signal.SIGKILL)
            left = process.stdout.read().split()
        begun = int(left[-1]) if left else 3
        said = []
        step, state, extra = Checkpoints(tmp_path, warn=said.append).restore_latest(like)
        assert begun - 2 <= step <= begun, "saving step n waits for step n - 1"
        assert extra == {"step": step}
        assert np.all(state["x"] == step)
        assert said == []
        assert not list(tmp_path.glob("*tmp*"))
        shutil.rmtree(tmp_path)
