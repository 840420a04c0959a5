"""Builds the engine on the leader, and runs its counterpart on all other ranks.

All ranks build together: they check the config, load their own share of the weights, and agree on
the number of cache blocks.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import torch
from tqdm import tqdm

from moespan import log
from moespan.checkpoint.building import KeptWeights, Loaded
from moespan.checkpoint.experts import ExpertPlacement
from moespan.checkpoint.loader import LoadReport, load_weights
from moespan.checkpoint.placement import Placement, place
from moespan.checkpoint.random import RandomSource
from moespan.checkpoint.source import SafetensorsSource, Source
from moespan.config import EngineConfig, ModelConfig
from moespan.engine.engine import Engine
from moespan.engine.info import EngineInfo
from moespan.engine.masks import with_masks
from moespan.engine.memory import MemoryWatch, fitting_blocks
from moespan.engine.reports import collect_reports, send_report
from moespan.engine.step import Close, FromLeader, Report, StepPlans
from moespan.engine.worker import Worker
from moespan.errors import ConfigError
from moespan.model.network import Weights
from moespan.ops import Ops, ops_for
from moespan.parallel import fused
from moespan.parallel.buffers import DEFAULT_BUFFER_MB
from moespan.parallel.mesh import Mesh
from moespan.text.tokenizer import Tokenizer
from moespan.units import bytes_in_words

_LINE_S = 10.0


def build_leader(config: EngineConfig, mesh: Mesh) -> Engine:
    """Load rank 0's share and return the engine; every other rank must call `follow` meanwhile.

    On a terminal, a bar on stderr shows the progress of loading; otherwise a line every 10 s.

    Raises:
        ConfigError, LayoutError, CheckpointError, TokenizerError: it cannot start, and why.
    """
    model_config = ModelConfig.from_pretrained(config.model)
    tokenizer = Tokenizer.from_pretrained(config.model)
    worker, num_blocks, report = _build_worker(config, model_config, mesh)
    memory = collect_reports(worker, Report("memory"))
    info = EngineInfo(
        model=config.model,
        layout=config.layout,
        device=config.device,
        dtype=config.dtype,
        quantization=_scheme(config, model_config),
        cache_dtype=config.cache_dtype,
        max_model_len=config.max_model_len,
        num_blocks=num_blocks,
        block_size=config.block_size,
        load_s=report.seconds,
        read_bytes=report.read_bytes,
        weight_bytes=report.held_bytes,
        memory=memory,
    )
    return Engine(config, model_config, worker, tokenizer, info)


def follow(config: EngineConfig, mesh: Mesh) -> EngineConfig | None:
    """Load this rank's share and take the leader's messages, in their order, until it closes.

    Returns:
        The config of the next engine; None when the job is over.

    Raises:
        ConfigError, LayoutError, CheckpointError: it cannot start, and why.
    """
    model_config = ModelConfig.from_pretrained(config.model)
    worker, _, _ = _build_worker(config, model_config, mesh)
    send_report(worker, Report("memory"))
    decoder = msgspec.msgpack.Decoder(FromLeader)
    while True:
        message = decoder.decode(mesh.control.receive_broadcast())
        if isinstance(message, StepPlans):
            result = worker.execute(message, with_masks(mesh, message.plan(mesh.at.dp)))
            if message.trace and mesh.at.dp == 0 and mesh.at.tp == 0:
                mesh.control.send(msgspec.msgpack.encode(worker.trace), "trace")
            if result is not None:
                mesh.control.send(msgspec.msgpack.encode(result.wait()), "result")
        elif isinstance(message, Report):
            send_report(worker, message)
        elif isinstance(message, Close):
            mesh.close()
            return message.config


def _build_worker(
    config: EngineConfig, model_config: ModelConfig, mesh: Mesh
) -> tuple[Worker, int, LoadReport]:
    """This rank's worker, the number of its cache blocks, and a report on loading."""
    config.check(model_config)
    ops = ops_for(config.device, config)
    _check_device(config, model_config, ops)
    watch = MemoryWatch(mesh)
    weights, report = _load(config, model_config, mesh, ops)
    watch.loaded()
    started = time.perf_counter()
    num_blocks = _agree_on_blocks(config, model_config, mesh, ops, report.mapped_bytes)
    # Waiting for the slowest rank is part of loading.
    seconds = report.seconds + time.perf_counter() - started
    worker = Worker(config, model_config, mesh, ops, weights, num_blocks)
    watch.started(worker)
    worker.memory = watch.measure
    return worker, num_blocks, replace(report, seconds=seconds)


def _check_device(config: EngineConfig, model_config: ModelConfig, ops: Ops) -> None:
    """Refuse 8 bits where the device has no operations for them, before anything is read."""
    device = f"device={config.device}" + (f" ({ops.chip})" if ops.chip else "")
    scheme = _scheme(config, model_config)
    if scheme is not None and scheme not in ops.quantizations:
        needs = " (GPUs of compute capability 8.9 and newer, and CPUs, take it)"
        others = " or ".join((*ops.quantizations, "a checkpoint of floats without --quantization"))
        raise ConfigError(
            f"quantization={scheme} is not implemented for {device}"
            f"{needs if scheme == 'fp8' else ''}; use {others}"
        )
    if config.cache_dtype == "int8" and not ops.has_int8_cache:
        raise ConfigError(f"kv_cache_dtype=int8 is not implemented for {device}; use auto")


def _scheme(config: EngineConfig, model_config: ModelConfig) -> str | None:
    """The quantization that the config asks for, or else that of the checkpoint."""
    stored = model_config.quantization
    return config.quantization or (stored.scheme if stored else None)


def _load(
    config: EngineConfig, model_config: ModelConfig, mesh: Mesh, ops: Ops
) -> tuple[Weights, LoadReport]:
    """This rank's share of the weights."""
    dtype = getattr(torch, config.dtype)
    quantization, source = config.quantization, _open(config, model_config, mesh.device)
    if config.load_format == "dummy" and model_config.quantization:
        # Random weights are floats, to be rounded as the checkpoint of this config would be.
        quantization = quantization or model_config.quantization.scheme
        model_config = replace(model_config, quantization=None)
    experts = ExpertPlacement.make(config.expert_placement, model_config, config.layout)
    # A non-numeric value counts as 0.
    buffer = os.environ.get("HCCL_BUFFSIZE", str(DEFAULT_BUFFER_MB))
    buffer_mb = int(buffer) if buffer.isdecimal() else 0
    fused.check(config, model_config, experts, ops.chip, mesh.ranks_here, buffer_mb)
    placement = place(model_config, config.layout, mesh.rank, experts, quantization)
    kept = _kept(config, source, placement, ops)
    total_bytes = sum(map(source.num_bytes, placement.pieces))

    def load(keep: Callable[[str, Any], Any]) -> tuple[Loaded, LoadReport]:
        # tqdm's own rule for `disable=None`: only a terminal gets a bar.
        with tqdm(
            desc="loading",
            total=total_bytes,
            unit="B",
            unit_scale=True,
            disable=None if mesh.is_leader else True,
            leave=False,
        ) as bar:
            is_silent = bar.disable and mesh.is_leader
            return load_weights(
                placement,
                source,
                dtype,
                mesh.device,
                new_builder=ops.builder,
                check_finite=config.check_finite,
                progress=_ProgressLines(total_bytes) if is_silent else bar.update,
                maximum_over_tp=lambda x: mesh.tp.maximum(x.to(mesh.device), "load").cpu(),
                keep=keep,
            )

    if kept is None:
        return load(lambda name, weight: weight)
    held_bytes = placement.num_bytes(config.dtype)
    return _map_or_load(kept, mesh, held_bytes, load)


def _kept(
    config: EngineConfig, source: Source, placement: Placement, ops: Ops
) -> KeptWeights | None:
    """Weights of earlier starts; None if they are not wanted, or these operations keep none."""
    if not config.weight_cache_gb or config.check_finite:  # a check reads what the source holds
        return None
    dtype, limit_bytes = getattr(torch, config.dtype), int(config.weight_cache_gb * 1e9)
    kept = ops.kept_weights(placement, source.identity, dtype, limit_bytes)
    if kept is None:
        log.once(
            f"weight_cache_gb={config.weight_cache_gb:g} has no effect: weights are kept in the "
            "layout of the kernels for bfloat16, which do not run here"
        )
    return kept


def _map_or_load(
    kept: KeptWeights,
    mesh: Mesh,
    held_bytes: int,
    load: Callable[[Callable[[str, Any], Any]], tuple[Loaded, LoadReport]],
) -> tuple[Loaded, LoadReport]:
    """The kept weights, or else those that `load` loads and this keeps.

    All ranks map, or all load, because ranks exchange numbers while they load.
    """
    started = time.perf_counter()
    weights, read_bytes = kept.find(), 0
    if not mesh.control.smallest(weights is not None) or weights is None:
        weights = None  # before its memory is taken again
        with kept.keeping() as keep:
            loaded, report = load(keep)
        # When all ranks have written, those that hold the same weights as a writer map its file.
        mesh.control.smallest(0)
        weights, read_bytes = (not kept.mapped_bytes and kept.find()) or loaded, report.read_bytes
    seconds = time.perf_counter() - started
    return weights, LoadReport(read_bytes, held_bytes, seconds, kept.mapped_bytes)


class _ProgressLines:
    """Logs every `_LINE_S` how much has been read, where no terminal shows a bar."""

    def __init__(self, total_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total_bytes = total_bytes
        self._clock = clock
        self._lock = threading.Lock()  # several threads read
        self._read_bytes = 0
        self._next_at = clock() + _LINE_S

    def __call__(self, num_bytes: int) -> None:
        """So many bytes more have been read."""
        with self._lock:
            self._read_bytes += num_bytes
            if self._clock() < self._next_at:
                return
            self._next_at = self._clock() + _LINE_S
            read_bytes, total_bytes = self._read_bytes, self._total_bytes
        log.logger.info(
            "loading: %s of %s are read (%.0f%%)",
            bytes_in_words(read_bytes, 1),
            bytes_in_words(total_bytes, 1),
            100 * read_bytes / total_bytes,
            extra={"holds_for_all_ranks": True},
        )


def _open(config: EngineConfig, model_config: ModelConfig, device: torch.device) -> Source:
    if config.load_format == "dummy":
        return RandomSource(model_config, getattr(torch, config.dtype), config.seed, device)
    return SafetensorsSource(config.model, model_config)


def _agree_on_blocks(
    config: EngineConfig, model_config: ModelConfig, mesh: Mesh, ops: Ops, mapped_bytes: int
) -> int:
    """Blocks of the KV cache, as many as the rank with the least memory has room for."""
    num_blocks = config.num_blocks or fitting_blocks(config, model_config, mesh, ops, mapped_bytes)
    num_blocks = mesh.control.smallest(num_blocks)
    if num_blocks < config.blocks_per_sequence:
        raise ConfigError(
            f"the memory left for the KV cache holds {num_blocks} blocks of {config.block_size} "
            f"tokens, but one sequence of max_model_len={config.max_model_len} takes "
            f"{config.blocks_per_sequence}; lower max_model_len, or use more ranks"
        )
    return num_blocks
