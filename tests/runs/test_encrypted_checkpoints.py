"""Checkpoints of encrypted runs: bit-exact, ciphertext for orbax, and bound to their step and manifest."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.errors import UserError
from fedjax_llm.runs import checkpoints as saving
from fedjax_llm.runs import directory, keys
from fedjax_llm.runs.checkpoints import Checkpoints
from fedjax_llm.runs.tensorboard import Scalars

NOISE = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # loops that damage has closed


@pytest.fixture
def run(tmp_path):
    """An encrypted run that is empty."""
    (tmp_path / "keys").mkdir()
    keys.make_key(tmp_path / "keys" / "key")
    how = {"class": "Encryption", "key_file": str(tmp_path / "keys" / "key"), "key_variable": None}
    return directory.create(tmp_path / "runs" / "one", {"output": {"encryption": how}})


def state_at(step):
    numbers = np.random.default_rng(step).normal(size=(3, 500))
    leaves = {"a": jnp.asarray(numbers, jnp.float32), "b": jnp.zeros((0, 4)), "c": jnp.ones(3, jnp.bfloat16)}
    return {"round": step, "leaves": leaves, "key": jax.random.key(step), "host": numbers[0]}


def same(one, other):
    """Whether two states are the same bits."""

    def bits(leaf):
        keyed = isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if keyed else leaf)
        return str(array.dtype), array.shape, array.tobytes(), type(leaf)

    return jax.tree.map(bits, one) == jax.tree.map(bits, other)


@pytest.fixture
def saved(run):
    with Checkpoints(run / "checkpoints", keep_last=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_at(step), {"head": "x"}, 0.5 * step)
    return run / "checkpoints"


def test_checkpoints_come_back_bit_for_bit_and_orbax_sees_ciphertext(saved):
    import orbax.checkpoint as ocp

    step, state, extra = Checkpoints(saved).restore_latest(state_at(0))
    assert (step, extra) == (2, {"head": "x"})
    assert same(state, state_at(2))
    assert Checkpoints(saved).restore_best(state_at(0))[0] == 1
    seen = ocp.PyTreeCheckpointer().restore(saved / "2" / "state")
    assert len(seen) == len(jax.tree.leaves(state_at(2)))
    assert all(leaf.dtype == np.uint8 and bytes(leaf[:8]) == b"FJLLMENC" for leaf in seen.values())
    values = np.asarray(state_at(2)["leaves"]["a"]).tobytes()
    files = [path for path in saved.rglob("*") if path.is_file()]
    assert files
    assert not any(values[:16] in path.read_bytes() for path in files)


@NOISE
def test_a_changed_checkpoint_is_set_aside_and_the_one_before_taken(saved):
    path = max((saved / "2" / "state").rglob("d/*"), key=lambda one: one.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    said = []
    step, state, _ = Checkpoints(saved, warn=said.append).restore_latest(state_at(0))
    assert step == 1
    assert same(state, state_at(1))
    assert len(said) == 1
    assert "checkpoint 2" in said[0]


def forged(saved, change):
    """Changes the newest manifest and makes its digest fit, as somebody can who has not the key."""
    path = saved / "2" / "manifest" / "metadata"
    manifest = json.loads(path.read_text())
    with Checkpoints(saved) as opened:
        del manifest["sha256"]
        read = saving._orbax().PyTreeCheckpointer().restore(saved / "2" / "state")
        change(manifest)
        manifest["sha256"] = saving._digest(manifest, {name: np.asarray(leaf) for name, leaf in read.items()})
        path.write_text(json.dumps(manifest))
        return opened


def test_a_manifest_cannot_be_forged_nor_a_step_renamed(saved):
    forged(saved, lambda manifest: None)
    assert Checkpoints(saved).restore_latest(state_at(0))[0] == 2, "the digest is made as the run makes it"
    forged(saved, lambda manifest: manifest["extra"].update(head="another ledger"))
    said = []
    assert Checkpoints(saved, warn=said.append).restore_latest(state_at(0))[0] == 1
    assert "checkpoints/2 was changed" in said[0]
    (saved / "1").rename(saved / "7")
    with pytest.raises(UserError, match=r"none of the checkpoints in .* is intact"):
        Checkpoints(saved, warn=said.append).restore_latest(state_at(0))
    assert "checkpoints/7 was changed" in said[-1]


def test_no_scalars_are_written_and_that_is_said_once(run):
    said = []
    with Scalars(run / "tensorboard", say=said.append) as scalars:
        scalars.round({"round": 1, "loss": 2.0})
        scalars.round({"round": 2, "loss": 1.0})
    assert said == ["The run is encrypted: no TensorBoard scalars are written."]
    assert not (run / "tensorboard").exists()
