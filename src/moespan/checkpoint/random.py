"""Random weights of any geometry: a source to load, and checkpoints in Hugging Face form."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import torch

from moespan.checkpoint.placement import Index, Piece, checkpoint_tensors
from moespan.checkpoint.writer import write_json, write_shards
from moespan.config import ModelConfig
from moespan.device import DEVICES
from moespan.errors import ConfigError
from moespan.memory import zeros


class RandomSource:
    """Random weights that are a pure function of the seed and the tensor's name.

    `--load-format dummy` therefore gives the values that `make-checkpoint` writes, and every layout
    has the same model. Standard deviations keep activations near one: 1/sqrt(fan-in) for matrices,
    1 for the embedding. Norms are 1.

    Args:
        device: device that the values are for. A GPU draws them itself, which takes seconds where a
            CPU takes minutes. Its values differ from those of a CPU, but are the same in every
            layout.
    """

    # Each chunk of rows has its own generator, so that a rank draws little beyond its share.
    CHUNK_ROWS = 256

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        seed: int,
        device: torch.device | None = None,
    ) -> None:
        self.shapes = checkpoint_tensors(replace(config, quantization=None))
        self.dtype = dtype
        self.seed = seed
        draws_there = device is not None and DEVICES[device.type].draws_weights
        self._options: dict[str, Any] = {"device": device if draws_there else torch.device("cpu")}

    @property
    def identity(self) -> str:
        """Seed, dtype and device, from which the weights follow."""
        return f"random {self.seed} {self.dtype} {self._options}"

    def num_bytes(self, piece: Piece) -> int:
        """Number of bytes of `piece`."""
        return piece.num_elements * int(self.dtype.itemsize)

    def batches(self, pieces: Iterable[Piece]) -> list[list[Piece]]:
        """One list for each piece; no order is faster than another."""
        return [[piece] for piece in pieces]

    def read(self, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, torch.Tensor]]:
        """Yield each piece with freshly drawn values."""
        for piece in pieces:
            yield piece, self.draw(piece.tensor, piece.tensor_index)

    def draw(self, name: str, index: Index | None = None) -> torch.Tensor:
        """Values of the tensor `name`, or of a slice of it."""
        shape = self.shapes[name]
        rows = index[0] if index else slice(0, shape[0])
        if name.endswith("norm.weight"):
            return torch.ones(rows.stop - rows.start, dtype=self.dtype, **self._options)
        columns = tuple(index[1:]) if index else ()
        std = 1.0 if name == "model.embed_tokens.weight" else math.prod(shape[1:]) ** -0.5
        first = rows.start // self.CHUNK_ROWS
        last = -(-rows.stop // self.CHUNK_ROWS)
        # Each chunk is rounded when it is drawn, so that no whole float32 tensor exists.
        lengths = _lengths(columns, shape[1:])
        every_row = (slice(None), *columns)
        # Fresh pages of a host go back to the system when they are freed; the C library would keep
        # those of the loader's threads.
        drawn = zeros((rows.stop - rows.start, *lengths), self.dtype, self._options["device"])
        at = 0
        for chunk in range(first, last):
            start = chunk * self.CHUNK_ROWS
            stop = min(start + self.CHUNK_ROWS, shape[0])
            key = crc32(f"{self.seed}/{name}/{chunk}".encode()) + (self.seed << 32)
            generator = torch.Generator(**self._options).manual_seed(key % 2**63)
            values = torch.empty((stop - start, *shape[1:]), **self._options)
            values.normal_(0.0, std, generator=generator)
            mine = slice(max(rows.start - start, 0), min(rows.stop, stop) - start)
            count = mine.stop - mine.start
            drawn[at : at + count] = values[mine][every_row]
            at += count
        return drawn


def _lengths(columns: Sequence[slice], whole: Sequence[int]) -> list[int]:
    """Elements that slices of all but the first dim leave; without slices the `whole` dims."""
    cut = zip(columns or [slice(None)] * len(whole), whole, strict=True)
    return [len(range(length)[part]) for part, length in cut]


def make_checkpoint(
    folder: Path,
    raw: Mapping[str, Any],
    seed: int = 0,
    progress: Callable[[int], object] = lambda written_bytes: None,
) -> None:
    """Write `config.json`, shards and index of a random model into `folder`.

    Args:
        raw: the `config.json` to write, as `preset` returns it.
        seed: weights are a pure function of the seed and of each tensor's name.
        progress: called with the bytes of each shard written.

    Raises:
        ConfigError: `folder` is a file, or already holds a checkpoint.
    """
    if folder.is_file():
        raise ConfigError(f"{folder} is a file; give a folder")
    if folder.exists() and any(folder.glob("*.safetensors*")):
        raise ConfigError(f"{folder} already holds a checkpoint; choose another folder")
    config = ModelConfig.from_dict(raw)
    dtype = getattr(torch, config.dtype)
    source = RandomSource(config, dtype, seed)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in source.shapes.items()}
    write_shards(folder, sizes, lambda name: {name: source.draw(name)}, progress)
    # Written last, so that a folder with a config is a complete checkpoint.
    generation = {"bos_token_id": raw["bos_token_id"], "eos_token_id": raw["eos_token_id"]}
    write_json(folder / "generation_config.json", generation)
    write_json(folder / "config.json", raw)
