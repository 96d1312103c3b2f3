"""What every source of a model becomes: a config, named weights, a tokenizer."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedjax_llm.models.tokenizer import Tokenizer

_EDGE = 1 << 20
_SAMPLE = 1 << 16
_SAMPLES = 256


@dataclass(frozen=True)
class LazyTensor:
    """One weight that is still on the disk.

    Attributes:
      shape: in Hugging Face layout, e.g. ``[out, in]``.
      read: reads and converts it; float32.
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@dataclass(frozen=True, eq=False)
class LazyTensors(Mapping[str, np.ndarray]):
    """Weights by their Hugging Face names. Each access reads one tensor, as float32, and keeps nothing."""

    entries: Mapping[str, LazyTensor]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.entries[name].read()

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self.entries[name].shape


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model from any source, in one form.

    Attributes:
      config: as in a Hugging Face ``config.json``.
      tensors: float32, in Hugging Face names and layout (``[out, in]``, rotate-half RoPE order), read on access.
      tokenizer: ``None`` where the source has none.
      source: where it came from, for people.
      fingerprint: tells whether two checkpoints have the same weights and config (:func:`fingerprint_of`, or the
        sha256 of the one file where that is known already).
    """

    config: Mapping[str, Any]
    tensors: LazyTensors
    tokenizer: Tokenizer | None
    source: str
    fingerprint: str


def fingerprint_of(files: Sequence[Path]) -> str:
    """A sha256 over the files' sizes and content, whatever their names, place and dates.

    Files of up to 18 MiB are read whole. Of larger ones the first and the last MiB are read (with the headers: names,
    shapes, types) and 256 blocks of 64 KiB, evenly spaced: a fine-tuned copy differs in nearly all of them. It tells
    honest files apart in a fraction of a second; it is no protection against a forger.
    """
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            if size <= 2 * _EDGE + _SAMPLES * _SAMPLE:
                digest.update(file.read())
                continue
            blocks = [(0, _EDGE), (size - _EDGE, _EDGE)]
            blocks += [(i * (size - _SAMPLE) // (_SAMPLES - 1), _SAMPLE) for i in range(_SAMPLES)]
            for offset, length in blocks:
                file.seek(offset)
                digest.update(file.read(length))
    return digest.hexdigest()
