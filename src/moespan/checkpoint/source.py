"""Sources of weights: the protocol of all sources, and the source that reads safetensors files.

A source tells how large a slice is, which slices are best read together, and their values, so that
the loader knows no files. The other source is `RandomSource` (`random.py`). Pickle checkpoints are
refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from moespan.checkpoint.placement import Piece, checkpoint_tensors, tolerated_tensors
from moespan.config import PACKED_SUFFIX, SCALE_SUFFIX, SCHEMES, ModelConfig, read_json
from moespan.errors import CheckpointError, ConfigError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_FLOATS = ("F32", "BF16", "F16")
_ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I32": 4, "I8": 1, "F8_E4M3": 1}
# Dtypes of tensors with scales: torch's name → safetensors' name.
_QUANTIZED = {"int8": "I8", "float8_e4m3fn": "F8_E4M3", "int32": "I32"}
_BATCH_BYTES = 32 << 20
# The rows of one read are a multiple of this, so that builders which pack tiles get whole tiles.
_ROWS_TOGETHER = 64


class Source(Protocol):
    """The weights of one model, read in slices."""

    def num_bytes(self, piece: Piece) -> int:
        """Number of bytes that are read for `piece`."""

    def batches(self, pieces: Iterable[Piece]) -> list[list[Piece]]:
        """Cut `pieces` into lists that may be read in parallel, each list in its best order."""

    def read(self, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, torch.Tensor]]:
        """Yield each piece with its values, a tensor that is valid until the next is yielded."""


class SafetensorsSource:
    """A checkpoint folder: one `model.safetensors`, or shards with an index.

    Opening a checkpoint reads only the headers and checks everything that headers can show.

    Raises:
        CheckpointError: lists all missing and unexpected tensors, wrong shapes and dtypes, and
            files that cannot be read.
    """

    def __init__(self, path: str | Path, config: ModelConfig) -> None:
        self.path = Path(path)
        self._file_of: dict[str, str] = {}
        self._order: dict[str, int] = {}
        self._begin: dict[str, int] = {}  # offset of the tensor in its file
        self._row_bytes: dict[str, int] = {}
        self._item_bytes: dict[str, int] = {}
        problems: list[str] = []
        expected = checkpoint_tensors(config)
        stored = config.quantization
        self._quantized = (_QUANTIZED[SCHEMES[stored.scheme].storage],) if stored else ()
        for file, names in self._files(problems).items():
            self._read_header(file, names, expected, problems)
        tolerated = set(tolerated_tensors(config))
        problems += [
            f"{self._file_of[name]}: unexpected tensor {name}"
            for name in self._file_of
            if name not in expected and name not in tolerated
        ]
        problems += [f"missing tensor {name}" for name in expected if name not in self._file_of]
        if problems:
            raise CheckpointError(
                f"{path} is not a whole checkpoint of the model in its config.json "
                f"({len(problems)} problem{'s' * (len(problems) > 1)}); copy it again, or fix "
                "config.json",
                _abridged(problems),
            )

    def _files(self, problems: list[str]) -> dict[str, set[str] | None]:
        """File name -> the tensors that the index promises in it (None: no index)."""
        if (self.path / INDEX_FILE).exists():
            try:
                weight_map = read_json(self.path / INDEX_FILE).get("weight_map")
            except ConfigError as error:
                raise CheckpointError(str(error)) from None
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{self.path / INDEX_FILE} has no weight_map")
            files: dict[str, set[str] | None] = defaultdict(set)
            for name, file in weight_map.items():
                if not isinstance(file, str) or Path(file).name != file:
                    problems.append(f"{INDEX_FILE}: {name} is in {file!r}, not a plain file name")
                else:
                    files[file].add(name)  # type: ignore[union-attr]
            return dict(files)
        if (self.path / SINGLE_FILE).exists():
            return {SINGLE_FILE: None}
        pickles = sorted(
            file.name for file in self.path.glob("*") if file.suffix in (".bin", ".pt", ".pth")
        )
        if pickles:
            raise CheckpointError(
                f"{self.path} holds only pickle checkpoints ({', '.join(pickles[:3])}), which can "
                "run code when they are loaded and are never opened here; convert them to "
                "safetensors (safetensors.torch.save_file) in a place that you trust"
            )
        raise CheckpointError(f"{self.path} has neither {INDEX_FILE} nor {SINGLE_FILE}")

    def _read_header(
        self,
        file: str,
        promised: set[str] | None,
        expected: dict[str, tuple[int, ...]],
        problems: list[str],
    ) -> None:
        try:
            with self._open(file) as handle:
                names = handle.offset_keys()
                # Eight bytes hold the length of the header. The data follow it without gaps.
                with (self.path / file).open("rb") as opened:
                    begin = 8 + int.from_bytes(opened.read(8), "little")
                for at, name in enumerate(names):
                    if name in self._file_of:
                        problems.append(f"{file}: {name} is also in {self._file_of[name]}")
                    self._file_of[name], self._order[name] = file, at
                    tensor = handle.get_slice(name)
                    shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
                    self._item_bytes[name] = _ITEM_BYTES.get(dtype, 0)
                    self._row_bytes[name] = self._item_bytes[name] * math.prod(shape[1:])
                    self._begin[name] = begin
                    begin += shape[0] * self._row_bytes[name] if shape else 0
                    if name not in expected:
                        continue
                    # Scales of rows have the shape (out) or (out, 1).
                    if shape != expected[name] and not (
                        name.endswith(SCALE_SUFFIX) and shape == (*expected[name], 1)
                    ):
                        problems.append(
                            f"{file}: {name} has shape {list(shape)}, not {list(expected[name])}"
                        )
                    has_scales = name.removesuffix(PACKED_SUFFIX) + SCALE_SUFFIX in expected
                    dtypes = self._quantized if has_scales else _FLOATS
                    if dtype not in dtypes:
                        problems.append(
                            f"{file}: {name} has dtype {dtype}, not one of {', '.join(dtypes)}"
                        )
        except (OSError, SafetensorError) as error:
            problems.append(
                f"{file}: cannot be read ({error}); it is missing, cut short or corrupt"
            )
            # A bad file is one problem, not one for each of its tensors.
            for name in expected if promised is None else promised:
                self._file_of.setdefault(name, file)
            return
        problems += [
            f"{file}: {name} is not in it, though {INDEX_FILE} says so"
            for name in sorted((promised or set()) - set(names))
        ]

    def _open(self, file: str) -> Any:
        return safe_open(str(self.path / file), framework="pt", device="cpu")

    def _read_ahead(self, file: str, pieces: Sequence[Piece]) -> None:
        """Ask the system to read the pieces' rows in large reads; a mapping reads page by page."""
        with (self.path / file).open("rb") as opened:
            for piece in pieces:
                begin, row_bytes = self._begin[piece.tensor], self._row_bytes[piece.tensor]
                rows = piece.tensor_index[0]
                start, length = begin + rows.start * row_bytes, piece.num_rows * row_bytes
                with contextlib.suppress(OSError):  # some file systems refuse the advice
                    os.posix_fadvise(opened.fileno(), start, length, os.POSIX_FADV_WILLNEED)

    def num_bytes(self, piece: Piece) -> int:
        """Number of bytes that are read for `piece`."""
        return piece.num_elements * self._item_bytes[piece.tensor]

    def batches(self, pieces: Iterable[Piece]) -> list[list[Piece]]:
        """Lists of pieces of one file each, in the order of its bytes: a disk reads sequentially.

        Pages that were read count as memory of this process while the file is mapped. The size of
        a batch limits how many there are.
        """
        by_file: dict[str, list[Piece]] = defaultdict(list)
        for piece in pieces:
            by_file[self._file_of[piece.tensor]].append(piece)
        batches: list[list[Piece]] = []
        for file in sorted(by_file):
            left_bytes = 0
            for piece in sorted(by_file[file], key=lambda piece: self._order[piece.tensor]):
                for part in _split_rows(piece, _BATCH_BYTES // self._row_bytes[piece.tensor]):
                    if left_bytes <= 0:
                        batches.append([])
                        left_bytes = _BATCH_BYTES
                    batches[-1].append(part)
                    left_bytes -= part.num_rows * self._row_bytes[piece.tensor]
        return batches

    def read(self, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, torch.Tensor]]:
        """Yield each piece of one batch as a view of the mapped file."""
        file = self._file_of[pieces[0].tensor]
        self._read_ahead(file, pieces)
        with self._open(file) as handle:
            for piece in pieces:
                values = handle.get_slice(piece.tensor)[piece.tensor_index]
                is_vector = len(piece.tensor_index) == 1
                yield piece, values.flatten() if is_vector else values


def _split_rows(piece: Piece, most_rows: int) -> Iterator[Piece]:
    """Cut `piece` into pieces of at most `most_rows` rows (at least one)."""
    if most_rows > _ROWS_TOGETHER:
        most_rows -= most_rows % _ROWS_TOGETHER
    most_rows = max(most_rows, 1)
    axis = len(piece.index) - len(piece.tensor_index)  # an expert's number may come first
    source_rows, rows = piece.tensor_index[0], piece.index[axis]
    for at in range(0, piece.num_rows, most_rows):
        stop = min(at + most_rows, piece.num_rows)
        yield dataclasses.replace(
            piece,
            tensor_index=(
                slice(source_rows.start + at, source_rows.start + stop),
                *piece.tensor_index[1:],
            ),
            index=(
                *piece.index[:axis],
                slice(rows.start + at, rows.start + stop),
                *piece.index[axis + 1 :],
            ),
        )


def _abridged(problems: list[str], most: int = 50) -> list[str]:
    left = len(problems) - most
    return problems if left <= 0 else [*problems[:most], f"and {left} more"]
