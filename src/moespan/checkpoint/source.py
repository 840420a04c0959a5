"""Sources of weights: the protocol of all sources, and the source that reads safetensors files.

A source tells how large a slice is, which slices are best read together, and their values, so that
the loader knows no files. The other source is `RandomSource` (`random.py`). Pickle checkpoints are
refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from moespan.checkpoint.placement import Piece, checkpoint_tensors, tolerated_tensors
from moespan.config import PACKED_SUFFIX, SCALE_SUFFIX, SCHEMES, ModelConfig, read_json
from moespan.errors import CheckpointError, ConfigError, shortened, shown
from moespan.files import open_regular, parse_json
from moespan.memory import zeros

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_MOST_INDEX_BYTES, _MOST_FILES = 32 << 20, 4096
_MOST_HEADER_BYTES, _MOST_HEADER_VALUES = 32 << 20, 4 << 20
_FLOATS = ("F32", "BF16", "F16")
_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I32": torch.int32,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
}
# Dtypes of tensors with scales: torch's name → safetensors' name.
_QUANTIZED = {"int8": "I8", "float8_e4m3fn": "F8_E4M3", "int32": "I32"}
_BATCH_BYTES = 32 << 20
# The rows of one read are a multiple of this, so that builders which pack tiles get whole tiles.
_ROWS_TOGETHER = 64


class Source(Protocol):
    """The weights of one model, read in slices.

    Attributes:
        identity: text that changes when the weights change.
    """

    @property
    def identity(self) -> str: ...

    def num_bytes(self, piece: Piece) -> int:
        """Number of bytes that are read for `piece`."""

    def batches(self, pieces: Iterable[Piece]) -> list[list[Piece]]:
        """Cut `pieces` into lists that may be read in parallel, each list in its best order."""

    def read(self, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, torch.Tensor]]:
        """Yield each piece with its values, a tensor that is valid until the next is yielded."""


@dataclasses.dataclass(frozen=True)
class _Stored:
    """The form of a tensor, and its place: `begin` is the offset of its first byte in `file`."""

    file: str
    begin: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def item_bytes(self) -> int:
        return int(_DTYPES[self.dtype].itemsize)

    @functools.cached_property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.item_bytes


class SafetensorsSource:
    """A checkpoint folder: one `model.safetensors`, or shards with an index.

    Opening a checkpoint reads only the headers and checks everything that headers can show. If
    several shards hold a tensor of one name, the index decides which of them counts.

    Slices are read into memory, not mapped: a file that loses its end while it is mapped kills the
    process.

    Raises:
        CheckpointError: lists all missing and unexpected tensors, wrong shapes and dtypes, and
            files that cannot be read.
    """

    def __init__(self, path: str | Path, config: ModelConfig) -> None:
        self.path = Path(path)
        self._stored: dict[str, _Stored] = {}
        self._state_of: dict[str, tuple[int, ...]] = {}  # of a file when its header was read
        problems: list[str] = []
        expected = checkpoint_tensors(config)
        quantization = config.quantization
        self._quantized = (
            (_QUANTIZED[SCHEMES[quantization.scheme].storage],) if quantization else ()
        )
        files = self._files(problems)
        file_of = {name: file for file, names in files.items() for name in names or ()}
        unread: dict[str, str] = {}  # tensors of files that cannot be read
        for file, names in files.items():
            try:
                held = self._read_header(file)
            except (OSError, ValueError, SafetensorError) as error:
                problems.append(
                    f"{shortened(file)}: cannot be read ({shortened(error, 200)}); it is missing, "
                    "cut short or corrupt"
                )
                unread |= dict.fromkeys(expected if names is None else names, file)
                continue
            problems += self._take(file, held, file_of, expected)
            problems += [
                f"{shortened(file)}: {shortened(name)} is not in it, though {INDEX_FILE} says so"
                for name in sorted(names or ())
                if name not in held
            ]
        tolerated = set(tolerated_tensors(config))
        problems += [
            f"{shortened(file)}: unexpected tensor {shortened(name)}"
            for name, file in (
                unread | {name: stored.file for name, stored in self._stored.items()}
            ).items()
            if name not in expected and name not in tolerated
        ]
        problems += [
            f"missing tensor {name}"
            for name in expected
            if name not in self._stored and name not in unread and name not in file_of
        ]
        if problems:
            raise CheckpointError(
                f"{path} is not a whole checkpoint of the model in its config.json "
                f"({len(problems)} problem{'s' * (len(problems) > 1)}); copy it again, or fix "
                "config.json",
                _abridged(problems),
            )

    @property
    def identity(self) -> str:
        """The names of the files, with their numbers, sizes and times of change."""
        return repr(sorted(self._state_of.items()))

    def _files(self, problems: list[str]) -> dict[str, set[str] | None]:
        """File name -> the tensors that the index promises in it (None: no index)."""
        if (self.path / INDEX_FILE).exists():
            try:
                weight_map = read_json(self.path / INDEX_FILE, _MOST_INDEX_BYTES).get("weight_map")
            except ConfigError as error:
                raise CheckpointError(str(error)) from None
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{self.path / INDEX_FILE} has no weight_map")
            files: dict[str, set[str] | None] = defaultdict(set)
            for name, file in weight_map.items():
                if not isinstance(file, str) or Path(file).name != file:
                    problems.append(
                        f"{INDEX_FILE}: {shortened(name)} is in {shown(file)}, "
                        "not a plain file name"
                    )
                else:
                    files[file].add(name)  # type: ignore[union-attr]
            if len(files) > _MOST_FILES:
                raise CheckpointError(
                    f"{self.path / INDEX_FILE} names {len(files)} files; at most {_MOST_FILES} "
                    "are read"
                )
            return dict(files)
        if (self.path / SINGLE_FILE).exists():
            return {SINGLE_FILE: None}
        pickles = sorted(
            file.name for file in self.path.glob("*") if file.suffix in (".bin", ".pt", ".pth")
        )
        if pickles:
            names = shortened(", ".join(pickles[:3]))
            raise CheckpointError(
                f"{self.path} holds only pickle checkpoints ({names}), which can "
                "run code when they are loaded and are never opened here; convert them to "
                "safetensors (safetensors.torch.save_file) in a place that you trust"
            )
        raise CheckpointError(f"{self.path} has neither {INDEX_FILE} nor {SINGLE_FILE}")

    def _read_header(self, file: str) -> dict[str, _Stored]:
        """The tensors of `file` by their names.

        Raises:
            OSError, ValueError, SafetensorError: the file cannot be read, or is no safetensors.
        """
        with open_regular(self.path / file) as opened:
            self._state_of[file] = _state(opened)
            # Eight bytes hold the length of the header, and the data follow it.
            header_bytes = int.from_bytes(os.pread(opened.fileno(), 8, 0), "little")
            if header_bytes > _MOST_HEADER_BYTES:
                raise ValueError(f"its header has {header_bytes} bytes")
            # The library checks the header: its form, and that the tensors cover the file exactly.
            with safe_open(f"/proc/self/fd/{opened.fileno()}", framework="numpy"):
                header = parse_json(os.pread(opened.fileno(), header_bytes, 8), _MOST_HEADER_VALUES)
        header.pop("__metadata__", None)
        return {
            name: _Stored(
                file,
                8 + header_bytes + entry["data_offsets"][0],
                tuple(entry["shape"]),
                entry["dtype"],
            )
            for name, entry in header.items()
        }

    def _take(
        self,
        file: str,
        held: Mapping[str, _Stored],
        file_of: Mapping[str, str],
        expected: Mapping[str, tuple[int, ...]],
    ) -> Iterator[str]:
        """Note the tensors of `file`; yields what is wrong with them.

        Args:
            file_of: name of a tensor → its file, as the index says; what another file holds under
                this name is passed over.
        """
        for name, stored in held.items():
            if file_of.get(name, file) != file:
                continue
            where = f"{shortened(file)}: {shortened(name)}"
            if name in self._stored:
                yield (
                    f"{where} is also in {shortened(self._stored[name].file)}, and {INDEX_FILE} "
                    "does not say which counts"
                )
            self._stored[name] = stored
            if name not in expected:
                continue
            shape = expected[name]
            # Scales of rows have the shape (out) or (out, 1).
            shapes = (shape, (*shape, 1)) if name.endswith(SCALE_SUFFIX) else (shape,)
            if stored.shape not in shapes:
                yield f"{where} has shape {shown(list(stored.shape))}, not {list(shape)}"
            has_scales = name.removesuffix(PACKED_SUFFIX) + SCALE_SUFFIX in expected
            dtypes = self._quantized if has_scales else _FLOATS
            if stored.dtype not in dtypes:
                yield f"{where} has dtype {stored.dtype}, not one of {', '.join(dtypes)}"

    def num_bytes(self, piece: Piece) -> int:
        """Number of bytes that are read for `piece`."""
        return piece.num_elements * self._stored[piece.tensor].item_bytes

    def batches(self, pieces: Iterable[Piece]) -> list[list[Piece]]:
        """Lists of pieces of one file each, in the order of its bytes: a disk reads sequentially.

        The size of a batch limits the memory of a reader, and what it asks the system to read
        ahead.
        """
        by_file: dict[str, list[Piece]] = defaultdict(list)
        for piece in pieces:
            by_file[self._stored[piece.tensor].file].append(piece)
        batches: list[list[Piece]] = []
        for file in sorted(by_file):
            left_bytes = 0
            for piece in sorted(by_file[file], key=lambda piece: self._stored[piece.tensor].begin):
                row_bytes = self._stored[piece.tensor].row_bytes
                for part in _split_rows(piece, _BATCH_BYTES // row_bytes):
                    if left_bytes <= 0:
                        batches.append([])
                        left_bytes = _BATCH_BYTES
                    batches[-1].append(part)
                    left_bytes -= part.num_rows * row_bytes
        return batches

    def read(self, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, torch.Tensor]]:
        """Yield each piece of one batch, in memory that the next piece overwrites.

        Raises:
            CheckpointError: the file cannot be read, or has changed since its header was read.
        """
        ranges = [self._range(piece) for piece in pieces]
        with self._opened(self._stored[pieces[0].tensor].file) as opened:
            for begin, num_bytes in ranges:
                with contextlib.suppress(OSError):  # some file systems refuse the advice
                    os.posix_fadvise(opened.fileno(), begin, num_bytes, os.POSIX_FADV_WILLNEED)
            largest = max(num_bytes for _, num_bytes in ranges)
            # Fresh pages go back to the system; the C library would keep those of this thread.
            buffer = zeros((largest,), torch.uint8, torch.device("cpu"))
            for piece, (begin, num_bytes) in zip(pieces, ranges, strict=True):
                rows = buffer[:num_bytes]
                self._fill(rows, opened, begin, piece)
                stored = self._stored[piece.tensor]
                values = rows.view(_DTYPES[stored.dtype]).view(piece.num_rows, *stored.shape[1:])
                is_vector = len(piece.tensor_index) == 1
                yield piece, values.flatten() if is_vector else values[:, piece.tensor_index[1]]

    def _range(self, piece: Piece) -> tuple[int, int]:
        """Offset and length of the rows of `piece` in its file: whole rows, columns included that
        are not read."""
        stored = self._stored[piece.tensor]
        begin = stored.begin + piece.tensor_index[0].start * stored.row_bytes
        return begin, piece.num_rows * stored.row_bytes

    @contextlib.contextmanager
    def _opened(self, file: str) -> Iterator[io.FileIO]:
        path = self.path / file
        try:
            opened = open_regular(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error}); copy it again") from None
        with opened:
            if _state(opened) != self._state_of[file]:
                raise CheckpointError(
                    f"{path} has changed since its header was read; start again when nothing "
                    "writes to it any more"
                )
            yield opened

    def _fill(self, rows: torch.Tensor, opened: io.FileIO, begin: int, piece: Piece) -> None:
        """Fill `rows` with the bytes of the file from `begin` on."""
        path = self.path / self._stored[piece.tensor].file
        memory, filled = memoryview(rows.numpy()), 0
        while filled < len(memory):
            try:
                count = os.preadv(opened.fileno(), [memory[filled:]], begin + filled)
            except OSError as error:
                raise CheckpointError(
                    f"{path} cannot be read ({error}) in {piece.tensor}; copy it again"
                ) from None
            if not count:
                raise CheckpointError(
                    f"{path} ends at byte {begin + filled}, inside {piece.tensor}: it has become "
                    "shorter since its header was read; copy it again"
                )
            filled += count


def _state(file: io.FileIO) -> tuple[int, ...]:
    """Numbers that change when a file is replaced or written."""
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns


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
