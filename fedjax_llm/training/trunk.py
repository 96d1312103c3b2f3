"""Hidden states below the lowest adapted layer, computed once an example and kept in host memory.

Where adapters sit in upper layers alone, the layers below them, the trunk, are a frozen function of the tokens. What
they give for an example serves every later step and every evaluation, which then run the upper layers only
(``CausalLM.hidden``, argument ``below``).
"""

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.data.packing import Microbatch, Shape
from fedjax_llm.data.records import EncodedExample
from fedjax_llm.data.shared_rows import SharedRow
from fedjax_llm.models.causal_lm import CausalLM
from fedjax_llm.types import Params


@dataclass(eq=False)
class TrunkCache:
    """Trunk states by an example's tokens: equal texts share theirs. The least recently used are dropped first.

    An example is always computed in the shortest shape that holds it, so its states depend on its tokens and on the
    shapes alone, never on what was asked for before or on what memory could hold.

    Attributes:
      model: the frozen model.
      params: its weights.
      layers: how many layers the trunk has (``causal_lm.lowest_adapted``).
      shapes: microbatches to compute in, of which rows and length count; the longest must hold the longest example.
        The caller's own shapes need not be among them.
      capacity: bytes of states that are kept at most. With too few, states are computed whenever they are asked for.
      used: bytes of states that are kept.
    """

    model: CausalLM
    params: Params
    layers: int
    shapes: Sequence[Shape]
    capacity: int
    used: int = field(default=0, init=False)
    _kept: OrderedDict[bytes, np.ndarray] = field(default_factory=OrderedDict, init=False, repr=False)
    _token: jax.ShapeDtypeStruct = field(init=False, repr=False)
    """The states [1, 1, D] of a single token."""

    def __post_init__(self) -> None:
        """Finds width and type of the states."""
        self._token = jax.eval_shape(self._compute, np.zeros((1, 1), np.int32))

    def fill(self, examples: Sequence[EncodedExample], *, advance: Callable[[int], None]) -> None:
        """Computes ahead what is missing of N examples: as many of the first of them as the capacity holds.

        Args:
          examples: any number.
          advance: called with how many more examples are done, N in all; those that do not fit count as done.
        """
        times = Counter(_key(example) for example in examples)
        tokens = {_key(example): example.tokens for example in examples}
        room = np.cumsum([self._nbytes(row) for row in tokens.values()]) <= self.capacity
        fitting = {key: row for (key, row), fits in zip(tokens.items(), room, strict=True) if fits}
        missing = self._missing(fitting)
        advance(len(examples) - sum(times[key] for key in missing))
        for states in self._computed(missing):
            self._keep(states)
            advance(sum(times[key] for key in states))

    def rows(self, rows: Sequence[SharedRow], shape: tuple[int, int]) -> np.ndarray:
        """The states of a microbatch's rows, for the argument ``below`` of ``CausalLM.hidden``.

        Args:
          rows: the first ones. What is not kept of their examples is computed now.
          shape: (M, L) of the microbatch; M is at least the number of rows, L their length.

        Returns:
          [M, L, D] in the type of the model's hidden states; zeros in padding, which no real position sees.
        """
        missing = self._missing({_key(example): example.tokens for row in rows for example in row.examples})
        computed = {key: value for states in self._computed(missing) for key, value in states.items()}
        block = np.zeros((*shape, self._token.shape[-1]), self._token.dtype)
        for place, row in enumerate(rows):
            for example, right in reversed(list(row.placed())):  # the first has the shared ones
                key = _key(example)
                states = computed[key] if key in computed else self._kept[key]
                block[place, right : right + len(states)] = states
        self._keep(computed)
        return block

    def block(self, tokens: np.ndarray, positions: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """The states of a whole microbatch whose rows are no plain text, such as trees of answers.

        Args:
          tokens: int32 [M, L].
          positions: int32 [M, L].
          mask: bool [M, L, L], who sees whom.

        Returns:
          [M, L, D]; kept under all three.
        """
        key = hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in (tokens, positions, mask)))
        if key.digest() in self._kept:
            self._kept.move_to_end(key.digest())
            return self._kept[key.digest()]
        arrays = [jnp.asarray(part) for part in (tokens, positions, mask)]
        states = np.asarray(self.model.trunk(self.params, arrays[0], self.layers, *arrays[1:]))
        self._keep({key.digest(): states})
        return states

    def _missing(self, tokens: Mapping[bytes, np.ndarray]) -> dict[bytes, np.ndarray]:
        """Those that are not kept. Those that are count as used just now."""
        for key in tokens:
            if key in self._kept:
                self._kept.move_to_end(key)
        return {key: row for key, row in tokens.items() if key not in self._kept}

    def _computed(self, tokens: Mapping[bytes, np.ndarray]) -> Iterator[dict[bytes, np.ndarray]]:
        """States [len, D] by key, a microbatch at a time."""
        held: dict[Shape, list[bytes]] = {shape: [] for shape in self.shapes}
        for key, row in tokens.items():
            fitting = [shape for shape in self.shapes if shape.length >= len(row)]
            assert fitting, "the longest shape holds every example"
            held[min(fitting, key=lambda shape: shape.length)].append(key)
        for shape, keys in held.items():
            for first in range(0, len(keys), shape.rows):
                chosen = keys[first : first + shape.rows]
                batch = np.zeros((shape.rows, shape.length), np.int32)
                for place, key in zip(batch, chosen, strict=False):
                    place[: len(tokens[key])] = tokens[key]
                states = np.asarray(self._compute(batch))
                # Copies, so that no entry holds the padding of its whole microbatch.
                yield {key: states[m, : len(tokens[key])].copy() for m, key in enumerate(chosen)}

    def _compute(self, tokens: np.ndarray) -> jax.Array:
        """[M, L] -> [M, L, D]."""
        return self.model.trunk(self.params, jnp.asarray(tokens), self.layers)

    def _keep(self, states: Mapping[bytes, np.ndarray]) -> None:
        """Takes in new states, then drops the longest unused ones until the rest fit."""
        self._kept.update(states)
        self.used += sum(array.nbytes for array in states.values())
        while self.used > self.capacity:
            _, dropped = self._kept.popitem(last=False)
            self.used -= dropped.nbytes

    def _nbytes(self, tokens: np.ndarray) -> int:
        """What the states of [len] tokens take."""
        return len(tokens) * self._token.shape[-1] * self._token.dtype.itemsize


def below_of(trunk: TrunkCache | None, batch: Microbatch) -> jax.Array | None:
    """What enters the lowest adapted layer in a packed microbatch, [M, L, D]; ``None`` without a trunk."""
    return None if trunk is None else jnp.asarray(trunk.rows(batch.rows, batch.tokens.shape))


def _key(example: EncodedExample) -> bytes:
    """An example's tokens, of one type whatever they came in."""
    return np.asarray(example.tokens, np.int32).tobytes()
