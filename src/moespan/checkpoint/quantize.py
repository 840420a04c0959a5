"""The conversion of a checkpoint of floats into one of 8 or 4 bits, which needs no rounding when
it is loaded."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from moespan.checkpoint.loader import not_finite_error
from moespan.checkpoint.placement import place
from moespan.checkpoint.rounding import NotFiniteError, quantize
from moespan.checkpoint.source import INDEX_FILE, SafetensorsSource
from moespan.checkpoint.writer import write_json, write_shards
from moespan.config import (
    PACKED_SUFFIX,
    SCALE_SUFFIX,
    SCHEMES,
    SHAPE_SUFFIX,
    Layout,
    ModelConfig,
    QuantizationConfig,
    read_json,
)
from moespan.errors import CheckpointError, ConfigError
from moespan.files import read_bytes

_MOST_COPIED_BYTES = 256 << 20
# Files that are copied as they are: no code, and no weights in other forms.
_COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*")
_WRITTEN = ("config.json", INDEX_FILE)


def quantize_checkpoint(
    folder: Path,
    target: Path,
    scheme: str,
    progress: Callable[[int], object] = lambda written_bytes: None,
) -> None:
    """Quantise the checkpoint in `folder`, as loading it with `scheme` would, and write `target`.

    Tokenizer and generation settings are copied. The new folder gets its name only when it is
    complete. Until then it is a hidden folder beside it, which is removed if anything fails.

    Args:
        scheme: one of `QUANTIZATIONS`.
        progress: called with the bytes of each shard written.

    Raises:
        ConfigError: `target` exists or cannot be made, the checkpoint is quantised already, or its
            rows are not whole groups of the scheme.
        CheckpointError: the checkpoint is not complete, or holds NaN or Inf.
    """
    config = ModelConfig.from_pretrained(folder)
    if config.quantization is not None:
        raise ConfigError(
            f"{folder} is quantised already ({config.quantization.scheme}); quantise the "
            "checkpoint that it was made from"
        )
    if target.exists():
        raise ConfigError(f"{target} exists; choose another folder")
    if not target.parent.is_dir():
        raise ConfigError(f"there is no folder {target.parent}; make it first")
    parts = _Rounded(folder, config, scheme)
    try:
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise ConfigError(
            f"{target.parent} cannot be written: {error.strerror}; choose another folder"
        ) from None
    try:
        write_shards(partial, parts.sizes, parts.make, progress)
        _copy_others(folder, partial)
        raw = read_json(folder / "config.json")
        write_json(partial / "config.json", {**raw, "quantization_config": parts.stored.to_dict()})
        partial.chmod(0o755)  # mkdtemp lets only the owner in
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


class _Rounded:
    """The tensors of a quantised checkpoint, each made from one of the given checkpoint.

    Attributes:
        stored: what `config.json` says of them.
        sizes: bytes of what `make` returns for each tensor of the given checkpoint.
    """

    def __init__(self, folder: Path, config: ModelConfig, scheme: str) -> None:
        self._source = SafetensorsSource(folder, config)
        self._scheme = SCHEMES[scheme]
        self.stored = QuantizationConfig.of(scheme)
        if config.tie_word_embeddings:
            self.stored = self.stored.with_ignored_head()
        placement = place(config, Layout(), 0, quantization=scheme)
        self._pieces = {piece.tensor: piece for piece in placement.pieces}
        self._is_quantized = {
            name: placement.parameters[piece.parameter].is_quantized
            and self.stored.holds(name.removesuffix(".weight"))
            for name, piece in self._pieces.items()
        }
        self.sizes = {name: self._num_bytes(name) for name in self._pieces}

    def make(self, name: str) -> dict[str, Tensor]:
        """The tensors that stand for one tensor of the given checkpoint."""
        ((_, values),) = self._source.read([self._pieces[name]])
        if not self._is_quantized[name]:
            if not values.isfinite().all():
                raise not_finite_error([name])
            return {name: values}
        group_size = self._scheme.group_size
        dtype = getattr(torch, self._scheme.storage)
        try:
            rounded, scales = quantize(values, dtype=dtype, group_size=group_size)
        except NotFiniteError:
            raise not_finite_error([name]) from None
        if group_size is None:
            return {name: rounded, name + SCALE_SUFFIX: scales[:, None]}
        return {
            name + PACKED_SUFFIX: rounded,
            name + SCALE_SUFFIX: scales,
            name + SHAPE_SUFFIX: torch.tensor(values.shape),
        }

    def _num_bytes(self, name: str) -> int:
        piece = self._pieces[name]
        if not self._is_quantized[name]:
            return self._source.num_bytes(piece)
        return piece.num_rows * self._scheme.row_bytes(piece.num_elements // piece.num_rows)


def _copy_others(folder: Path, target: Path) -> None:
    """Copy tokenizer, generation settings and licence."""
    for pattern in _COPIED:
        for file in folder.glob(pattern):
            if file.name in _WRITTEN:
                continue
            try:
                (target / file.name).write_bytes(read_bytes(file, _MOST_COPIED_BYTES))
            except OSError as error:
                raise CheckpointError(f"{file} cannot be copied: {error}") from None
