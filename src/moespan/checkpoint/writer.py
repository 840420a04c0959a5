"""The writer of checkpoints in Hugging Face form, one shard at a time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moespan.checkpoint.source import INDEX_FILE
from moespan.errors import MoespanError

_SHARD_BYTES = 2 << 30


def write_shards(
    folder: Path,
    sizes: Mapping[str, int],
    make: Callable[[str], dict[str, Tensor]],
    progress: Callable[[int], object] = lambda written_bytes: None,
) -> None:
    """Write shards and their index into `folder`, with at most one shard in memory.

    Args:
        sizes: name → bytes of the tensors that `make` returns for it, in the order of the files.
        make: returns, for a name of `sizes`, tensors by their names in the checkpoint.
        progress: called with the bytes of each shard written.
    """
    shards: list[list[str]] = []
    left_bytes = 0
    for name, num_bytes in sizes.items():
        if left_bytes < num_bytes:
            shards.append([])
            left_bytes = _SHARD_BYTES
        shards[-1].append(name)
        left_bytes -= num_bytes
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {key: value for name in names for key, value in make(name).items()}
        with naming(folder / file):
            save_file(tensors, str(folder / file), metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        written_bytes = sum(tensor.nbytes for tensor in tensors.values())
        total_bytes += written_bytes
        progress(written_bytes)
        del tensors
    write_json(
        folder / INDEX_FILE, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` to `path` with the indentation that Hugging Face uses."""
    text = json.dumps(dict(value), indent=2, ensure_ascii=False) + "\n"
    with naming(path):
        path.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name `path` in errors of writing it; those of a full disk name no file.

    Raises:
        MoespanError: the file cannot be written, and why.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise MoespanError(f"{path} cannot be written: {reason}") from error
