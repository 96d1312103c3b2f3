"""Checkpoints on orbax: saved in the background, verified when read, the newest intact one wins.

A checkpoint is the folder ``<step>`` with two orbax items: ``state``, the leaves as a flat dictionary of NumPy arrays,
and ``manifest``, JSON with the leaves' paths, dtypes and shapes, the caller's ``extra``, the metric, and a SHA-256 over
all of it. Orbax writes into a temporary folder and renames it, so a killed save leaves no half checkpoint; the digest
finds what happens to the files afterwards.

In an encrypted run orbax gets every leaf as an envelope in a ``uint8`` array, bound to the step, the leaf's path, dtype
and shape, and the whole manifest, which is in clear; the digest is then of the envelopes.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np

from fedjax_llm.errors import UserError
from fedjax_llm.runs.encryption import Vault, vault_of

_UNFINISHED = ".orbax-checkpoint-tmp"
_KEY = "key:"  # dtype of a typed PRNG key in the manifest: "key:threefry2x32", its data is uint32


class Checkpoints:
    """The checkpoints in one folder, as a context manager: leaving it waits for the last save.

    One process at a time may open the folder (``directory.locked``): opening removes what looks like a killed save.

    Args:
      folder: made if absent.
      keep_last: how many of the newest to keep, at least 1. While a save runs there is one more.
      keep_best: how many of those with the lowest metric to keep besides.
      warn: is told about damaged checkpoints.
    """

    def __init__(
        self, folder: str | Path, keep_last: int = 2, keep_best: int = 1, warn: Callable[[str], None] = lambda _: None
    ):
        if keep_last < 1 or keep_best < 0:
            raise UserError(f"checkpoints: keep_last={keep_last} must be at least 1, keep_best={keep_best} at least 0")
        self._folder = Path(folder).absolute()
        self._keep_last, self._keep_best, self._warn = keep_last, keep_best, warn
        self._checkpointer: Any = None  # made at first use: importing orbax takes a second
        self._saving: int | None = None
        self._vault = vault_of(self._folder)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {self._folder}: {error.strerror}; choose another") from error
        for left in self._folder.glob(f"*{_UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def steps(self) -> list[int]:
        """The steps of the finished checkpoints, in rising order."""
        return finished_steps(self._folder)

    def save(self, step: int, state: Any, extra: Mapping[str, Any], best_metric: float | None = None) -> None:
        """Copies the state to the host, then writes it in the background; waits for the save before this one.

        The arrays may be donated or changed as soon as this returns.

        Args:
          step: names the checkpoint; one of the same step is replaced.
          state: a pytree of jax or NumPy arrays, typed PRNG keys and numbers.
          extra: JSON-able; comes back from ``restore_*``.
          best_metric: lower is better; ``None`` or NaN: never the best.

        Raises:
          UserError: this save or the one before failed, for instance because the disk is full.
        """
        self._wait()
        self._prune()
        arrays, leaves = _to_host(state)
        metric = None if best_metric is None or np.isnan(best_metric) else float(best_metric)
        manifest: dict[str, Any] = {"leaves": leaves, "extra": dict(extra), "best_metric": metric}
        if self._vault is not None:
            arrays = _sealed(self._vault, step, manifest, arrays)
        manifest["sha256"] = _digest(manifest, arrays)
        # Orbax refuses arrays without elements; their shapes are in the manifest.
        stored = {name: array for name, array in arrays.items() if array.size} or {"empty": np.zeros(1, np.uint8)}
        ocp = _orbax()
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(stored), manifest=ocp.args.JsonSave(manifest))
        self._saving = step
        try:
            self._open().save(self._folder / str(step), args=items, force=True)
        except Exception as error:
            raise self._failed(error) from error

    def restore_latest(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest intact checkpoint: ``(step, state, extra)``, or ``None`` where there never was one.

        Damaged ones that are newer are reported through ``warn`` and renamed to ``damaged-<step>``, so that they are
        neither counted nor met again.

        Args:
          like: a pytree of the state's structure, with its shapes and dtypes (values do not matter).

        Raises:
          UserError: there are checkpoints and none is intact, or the state has another structure than ``like``.
        """
        self._wait()
        steps = self.steps()
        for step in reversed(steps):
            found = self._read(step)
            if isinstance(found, str):
                self._set_aside(step, found)
            else:
                return step, self._rebuild(step, like, *found), found[1]["extra"]
        if steps or any(self._folder.glob("damaged-*")):
            raise UserError(f"none of the checkpoints in {self._folder} is intact; start a new run in another folder")
        return None

    def restore_best(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """The intact checkpoint with the lowest metric, as :meth:`restore_latest`; ``None`` where none has a metric.

        Raises:
          UserError: the state has another structure than ``like``.
        """
        self._wait()
        for step, _ in sorted(self._metrics().items(), key=lambda item: (item[1], item[0])):
            found = self._read(step)
            if isinstance(found, str):
                self._warn(f"the best checkpoint {self._folder / str(step)} is damaged ({found}); taking the next")
            else:
                return step, self._rebuild(step, like, *found), found[1]["extra"]
        return None

    def close(self) -> None:
        """Waits for the save in progress and removes what need not be kept.

        Raises:
          UserError: that save failed.
        """
        try:
            self._wait()
            self._prune()
        finally:
            if self._checkpointer is not None:
                self._checkpointer.close()
                self._checkpointer = None

    def _open(self) -> Any:
        """The orbax checkpointer."""
        if self._checkpointer is None:
            ocp = _orbax()
            # Of several hosts only one keeps checkpoints: orbax must not wait for the others.
            here = jax.process_index()
            alone = ocp.options.MultiprocessingOptions(
                primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"host-{here}"
            )
            composite = ocp.CompositeOptions(multiprocessing_options=alone)
            handler = ocp.CompositeCheckpointHandler(composite_options=composite)
            self._checkpointer = ocp.AsyncCheckpointer(handler, multiprocessing_options=alone)
        return self._checkpointer

    def _wait(self) -> None:
        """Waits for the save in progress."""
        try:
            if self._saving is not None:
                self._checkpointer.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error
        self._saving = None

    def _failed(self, error: Exception) -> UserError:
        """The message for a save that failed; the checkpoints before it are untouched."""
        step, self._saving = self._saving, None
        why = " ".join(str(error).split())[:300] or type(error).__name__
        return UserError(
            f"cannot save checkpoint {step} in {self._folder}: {why}. Earlier checkpoints are kept: free some space or "
            "make the folder writable, then continue with --resume"
        )

    def _metrics(self) -> dict[int, float]:
        """Metric by step, of the checkpoints that have one and whose manifest can be read."""
        metrics = {}
        for step in self.steps():
            try:
                metric = _manifest(self._folder / str(step))["best_metric"]
            except (OSError, ValueError, KeyError, TypeError):
                continue  # damaged; found and reported when it is restored
            if isinstance(metric, float | int):
                metrics[step] = float(metric)
        return metrics

    def _prune(self) -> None:
        """Removes what is neither among the newest nor among the best."""
        steps = self.steps()
        metrics = self._metrics() if len(steps) > self._keep_last else {}
        best = sorted(metrics, key=lambda step: (metrics[step], step))[: self._keep_best]
        for step in set(steps[: -self._keep_last]) - set(best):
            # Renamed first, so that a kill while its files go leaves nothing that looks like a checkpoint.
            doomed = self._folder / f"{step}{_UNFINISHED}-old"
            (self._folder / str(step)).rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def _set_aside(self, step: int, why: str) -> None:
        """Renames a damaged checkpoint and says so."""
        aside = self._folder / f"damaged-{step}"
        shutil.rmtree(aside, ignore_errors=True)
        (self._folder / str(step)).rename(aside)
        self._warn(
            f"checkpoint {step} in {self._folder} is damaged ({why}); renamed to {aside.name}, taking the one before"
        )

    def _read(self, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]] | str:
        """The verified arrays and manifest of a checkpoint, or what is wrong with it."""
        folder, ocp = self._folder / str(step), _orbax()
        try:
            manifest = _manifest(folder)
            empty = {
                f"{place:06d}": np.zeros(shape, np.uint32 if dtype.startswith(_KEY) else dtype)
                for place, (_, dtype, shape) in enumerate(manifest["leaves"])
                if 0 in shape and self._vault is None
            }
            names = [f"{place:06d}" for place in range(len(manifest["leaves"]))]
            stored = [name for name in names if name not in empty]
            how = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in stored or ["empty"]}
            item = ocp.args.Composite(state=ocp.args.PyTreeRestore(restore_args=how))
            read = self._open().restore(folder, args=item)["state"]
            arrays = {name: empty[name] if name in empty else read[name] for name in names}
            expected = manifest.pop("sha256")
            intact = _digest(manifest, arrays) == expected
            if intact and self._vault is not None:
                arrays = _unsealed(self._vault, step, manifest, arrays)
        except Exception as error:  # whatever damaged files make of orbax, tensorstore or json
            return " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return (arrays, manifest) if intact else "its content does not match its digest"

    def _rebuild(self, step: int, like: Any, arrays: dict[str, np.ndarray], manifest: dict[str, Any]) -> Any:
        """The state in the structure of ``like``.

        Raises:
          UserError: other leaves, shapes or dtypes.
        """
        want = {path: (dtype, shape) for path, dtype, shape in _signature(like)}
        have = {path: (dtype, shape) for path, dtype, shape in manifest["leaves"]}
        if want != have:
            wrong = [path for path in sorted(want.keys() | have.keys()) if want.get(path) != have.get(path)]
            lines = [f"  {path}: saved {_show(have.get(path))}, expected {_show(want.get(path))}" for path in wrong[:8]]
            more = f"\n  and {len(wrong) - 8} more" if len(wrong) > 8 else ""
            raise UserError(
                f"checkpoint {step} in {self._folder} holds another state than this experiment has:\n"
                + "\n".join(lines)
                + more
                + "\nresume with the settings and the version that the run was started with"
            )
        by_path = {path: arrays[f"{place:06d}"] for place, (path, _, _) in enumerate(manifest["leaves"])}
        paths, treedef = jax.tree_util.tree_flatten_with_path(like)
        return treedef.unflatten(_leaf(leaf, by_path[jax.tree_util.keystr(path)]) for path, leaf in paths)


def finished_steps(folder: Path) -> list[int]:
    """The steps of the finished checkpoints in a folder, in rising order; none where there is no folder."""
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(entry.name) for entry in entries if entry.name.isdecimal() and entry.is_dir())


def _orbax() -> Any:
    """Orbax, imported when it is first needed: it would add a second to every start."""
    import orbax.checkpoint

    return orbax.checkpoint


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest as orbax's JSON handler wrote it."""
    return json.loads((folder / "manifest" / "metadata").read_text("utf-8"))


def _to_host(state: Any) -> tuple[dict[str, np.ndarray], list[list[Any]]]:
    """Copies of all leaves as NumPy arrays by place, and their ``[path, dtype, shape]``."""
    arrays = {}
    for place, leaf in enumerate(jax.tree.leaves(state)):
        data = jax.random.key_data(leaf) if _is_key(leaf) else leaf
        arrays[f"{place:06d}"] = np.array(data, copy=True)  # a view of a jax array would not outlive its donation
    return arrays, _signature(state)


def _signature(tree: Any) -> list[list[Any]]:
    """``[path, dtype, shape]`` of every leaf, as JSON has it; a key's shape is that of its data."""
    rows = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if _is_key(leaf):
            data = jax.eval_shape(jax.random.key_data, leaf)
            rows.append([jax.tree_util.keystr(path), f"{_KEY}{jax.random.key_impl(leaf)}", list(data.shape)])
        else:
            dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
            rows.append([jax.tree_util.keystr(path), str(dtype), list(np.shape(leaf))])
    return rows


def _sealed(
    vault: Vault, step: int, manifest: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The leaves as envelopes."""
    sealed = {}
    for (name, array), about in zip(arrays.items(), _bound_to(manifest), strict=True):
        sealed[name] = np.frombuffer(vault.seal(array.tobytes(), f"checkpoints/{step}", about), np.uint8)
    return sealed


def _unsealed(
    vault: Vault, step: int, manifest: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The leaves that :func:`_sealed` was given."""
    opened, leaves = {}, manifest["leaves"]
    for (name, array), (_, dtype, shape), about in zip(arrays.items(), leaves, _bound_to(manifest), strict=True):
        kind = np.dtype(np.uint32 if dtype.startswith(_KEY) else dtype)
        data = vault.unseal(array.tobytes(), f"checkpoints/{step}", about)
        opened[name] = np.frombuffer(data, kind).reshape(shape).copy()
    return opened


def _bound_to(manifest: Mapping[str, Any]) -> list[str]:
    """What the envelope of each leaf is bound to besides the step: its path, dtype and shape, and the manifest."""
    whole = _digest(manifest, {})
    return [json.dumps([place, leaf, whole]) for place, leaf in enumerate(manifest["leaves"])]


def _digest(manifest: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over the manifest (paths, dtypes, shapes, extra, metric) and every array's bytes."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _leaf(like: Any, array: np.ndarray) -> Any:
    """A leaf of the same kind as ``like``: key, jax array, NumPy array or number."""
    if _is_key(like):
        return jax.random.wrap_key_data(jax.numpy.asarray(array), impl=jax.random.key_impl(like))
    if isinstance(like, bool | int | float):
        return type(like)(array.item())
    return array if isinstance(like, np.ndarray | np.generic) else jax.numpy.asarray(array)


def _is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed PRNG key (array)."""
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _show(kind: Any) -> str:
    """A leaf's dtype and shape for a message."""
    return "nothing" if kind is None else f"{kind[0]}{list(kind[1])}"
