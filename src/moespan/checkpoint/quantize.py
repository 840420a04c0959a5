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
        ConfigError: `target` exists, the checkpoint is quantised already, or its rows are not whole
            groups of the scheme.
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
    source = SafetensorsSource(folder, config)
    own, stored = SCHEMES[scheme], QuantizationConfig.of(scheme)
    if config.tie_word_embeddings:
        stored = stored.with_ignored_head()
    dtype = getattr(torch, own.storage)
    placement = place(config, Layout(), 0, quantization=scheme)
    pieces = {piece.tensor: piece for piece in placement.pieces}
    is_quantized = {
        name: placement.parameters[piece.parameter].is_quantized
        and stored.holds(name.removesuffix(".weight"))
        for name, piece in pieces.items()
    }

    def make(name: str) -> dict[str, Tensor]:
        ((_, values),) = source.read([pieces[name]])
        if not is_quantized[name]:
            if not values.isfinite().all():
                raise not_finite_error([name])
            return {name: values}
        try:
            rounded, scales = quantize(values, dtype=dtype, group_size=own.group_size)
        except NotFiniteError:
            raise not_finite_error([name]) from None
        if own.group_size is None:
            return {name: rounded, name + SCALE_SUFFIX: scales[:, None]}
        return {
            name + PACKED_SUFFIX: rounded,
            name + SCALE_SUFFIX: scales,
            name + SHAPE_SUFFIX: torch.tensor(values.shape),
        }

    sizes = {
        name: piece.num_rows * own.row_bytes(piece.num_elements // piece.num_rows)
        if is_quantized[name]
        else source.num_bytes(piece)
        for name, piece in pieces.items()
    }
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        write_shards(partial, sizes, make, progress)
        _copy_others(folder, partial)
        raw = read_json(folder / "config.json")
        write_json(partial / "config.json", {**raw, "quantization_config": stored.to_dict()})
        partial.chmod(0o755)  # mkdtemp lets only the owner in
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


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
