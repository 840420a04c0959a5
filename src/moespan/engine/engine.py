"""The engine on the leader, and its counterpart on all other ranks.

The leader owns the requests: it schedules, has every rank execute the plan, and turns what was
sampled into text. The others only execute plans.
"""

from __future__ import annotations

import random
import time
from dataclasses import asdict, dataclass

import msgspec
import torch
from tqdm import tqdm

from moespan.checkpoint.loader import LoadReport, load_weights
from moespan.checkpoint.placement import head_shares, place
from moespan.checkpoint.source import RandomSource, SafetensorsSource, Source
from moespan.config import DTYPE_BYTES, EngineConfig, ModelConfig
from moespan.engine.info import EngineInfo, EngineStats
from moespan.engine.plan import StepPlan
from moespan.engine.request import OutputDelta, Request
from moespan.engine.scheduler import Scheduler, SequenceUpdate
from moespan.engine.sequence import Sequence
from moespan.engine.text import TextStream
from moespan.engine.worker import Worker
from moespan.errors import ConfigError, RequestError
from moespan.memory import available_bytes
from moespan.ops import ops_for
from moespan.parallel import control
from moespan.parallel.mesh import Mesh
from moespan.tokenizer import Tokenizer

# Share of the free memory that the KV cache may take; the rest is for activations.
_CACHE_SHARE = {"cpu": 0.5, "cuda": 0.85, "npu": 0.85}


@dataclass
class _Continuation:
    """A live sequence and its text; a model without a tokenizer has none."""

    sequence: Sequence
    text: TextStream | None


class Engine:
    """Serves requests, one step at a time. Build it with `build_leader`."""

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        worker: Worker,
        tokenizer: Tokenizer | None,
        info: EngineInfo,
    ) -> None:
        self.info = info
        self._worker = worker
        self._tokenizer = tokenizer
        eos = {*model_config.eos_token_ids, *(tokenizer.eos_token_ids if tokenizer else ())}
        self._scheduler = Scheduler(config, info.num_blocks, model_config.vocab_size, eos)
        self._seeds = random.Random(config.seed)
        self._live: dict[tuple[str, int], _Continuation] = {}
        self._has_followers = config.layout.world_size > 1
        self._is_closed = False

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do."""
        return self._scheduler.has_unfinished

    @property
    def stats(self) -> EngineStats:
        """A snapshot of queues and counters."""
        scheduler = self._scheduler
        return EngineStats(
            num_waiting=scheduler.num_waiting,
            num_running=scheduler.num_running,
            kv_usage=scheduler.kv_usage,
            num_preemptions=scheduler.num_preemptions,
            num_prefix_queried_tokens=scheduler.num_prefix_queried_tokens,
            num_prefix_hit_tokens=scheduler.num_prefix_hit_tokens,
        )

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: it cannot be served as asked; nothing has changed.
        """
        if request.params.stop and self._tokenizer is None:
            raise RequestError(
                "stop strings need a tokenizer, and this checkpoint has none; use stop_token_ids"
            )
        for sequence in self._scheduler.add(request, self._seeds.getrandbits(62)):
            text = (
                TextStream(self._tokenizer, request.params, request.prompt_token_ids)
                if self._tokenizer is not None
                else None
            )
            self._live[sequence.id, sequence.index] = _Continuation(sequence, text)

    def abort(self, request_id: str) -> None:
        """Drop what is left of a request; nothing more comes of it. Unknown ids are ignored."""
        for sequence in self._scheduler.abort(request_id):
            del self._live[sequence.id, sequence.index]

    def step(self) -> list[OutputDelta]:
        """Run one step on all ranks and return what it brought; nothing if there is no work."""
        plan = self._scheduler.schedule()
        if plan is None:
            return []
        if self._has_followers:
            control.broadcast(msgspec.msgpack.encode(plan))
        result = self._worker.execute(plan)
        assert result is not None
        return [self._delta(update) for update in self._scheduler.update(plan, result)]

    def heartbeat(self) -> None:
        """Let idle followers know that the leader is alive; call it within the group's timeout."""
        if self._has_followers:
            control.broadcast(_HEARTBEAT)

    def close(self) -> None:
        """Release the followers. Idempotent."""
        if self._has_followers and not self._is_closed:
            control.broadcast(_CLOSE)
        self._is_closed = True

    def _delta(self, update: SequenceUpdate) -> OutputDelta:
        sequence = update.sequence
        key = sequence.id, sequence.index
        live = self._live[key]
        finish_reason, stop_reason = update.finish_reason, update.stop_reason
        text = ""
        if live.text is not None:
            may_stop = sequence.num_output_tokens >= sequence.params.min_tokens
            text = live.text.push(update.token_ids, may_stop, is_last=finish_reason is not None)
            if live.text.stopped_by is not None:
                finish_reason, stop_reason = "stop", live.text.stopped_by  # type: ignore[assignment]
                self._scheduler.finish(sequence)
        if finish_reason is not None:
            del self._live[key]
        return OutputDelta(
            id=sequence.id,
            index=sequence.index,
            text=text,
            token_ids=update.token_ids,
            logprobs=update.logprobs,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            error=update.error,
            prompt_logprobs=update.prompt.logprobs if update.prompt else [],
            prompt_logits=update.prompt.logits if update.prompt else b"",
            num_cached_tokens=sequence.num_cached_tokens,
        )


# What the leader broadcasts: a plan, or one of these.
_HEARTBEAT = msgspec.msgpack.encode(True)
_CLOSE = msgspec.msgpack.encode(None)


def build_leader(config: EngineConfig, mesh: Mesh) -> Engine:
    """Load rank 0's share and return the engine; every other rank must call `follow` meanwhile.

    On a terminal, a bar on stderr shows how far it is.

    Raises:
        ConfigError, LayoutError, CheckpointError, TokenizerError: it cannot start, and why.
    """
    model_config = ModelConfig.from_pretrained(config.model)
    tokenizer = Tokenizer.from_pretrained(config.model)
    worker, num_blocks, report = _build_worker(config, model_config, mesh)
    info = EngineInfo(
        model=config.model,
        layout=asdict(config.layout),
        device=config.device,
        dtype=config.dtype,
        max_model_len=config.max_model_len,
        num_blocks=num_blocks,
        block_size=config.block_size,
        load_s=report.seconds,
        read_bytes=report.read_bytes,
        weight_bytes=report.held_bytes,
    )
    return Engine(config, model_config, worker, tokenizer, info)


def follow(config: EngineConfig, mesh: Mesh) -> None:
    """Load this rank's share and execute the leader's plans until it closes.

    Raises:
        ConfigError, LayoutError, CheckpointError: it cannot start, and why.
    """
    model_config = ModelConfig.from_pretrained(config.model)
    worker, _, _ = _build_worker(config, model_config, mesh)
    decoder = msgspec.msgpack.Decoder(StepPlan | bool | None)
    while (message := decoder.decode(control.broadcast(None))) is not None:
        if isinstance(message, StepPlan):
            worker.execute(message)


def _build_worker(
    config: EngineConfig, model_config: ModelConfig, mesh: Mesh
) -> tuple[Worker, int, LoadReport]:
    config.layout.check(model_config)
    if config.max_model_len > model_config.max_position_embeddings:
        raise ConfigError(
            f"max_model_len={config.max_model_len} exceeds the model's "
            f"max_position_embeddings={model_config.max_position_embeddings}"
        )
    dtype = getattr(torch, config.dtype)
    source: Source = (
        RandomSource(model_config, dtype, config.seed)
        if config.load_format == "dummy"
        else SafetensorsSource(config.model, model_config)
    )
    placement = place(model_config, config.layout, mesh.rank)
    # tqdm's own rule for `disable=None`: only a terminal gets a bar.
    with tqdm(
        desc="loading",
        total=placement.num_bytes(config.dtype),
        unit="B",
        unit_scale=True,
        disable=None if mesh.is_leader else True,
        leave=False,
    ) as bar:
        weights, report = load_weights(
            placement,
            source,
            dtype,
            mesh.device,
            check_finite=config.check_finite,
            progress=bar.update,
        )
    started = time.perf_counter()
    num_blocks = config.num_blocks or _fitting_blocks(config, model_config, mesh)
    if config.layout.world_size > 1:
        num_blocks = control.smallest(num_blocks)
    # Waiting for the slowest rank is part of loading.
    waited = time.perf_counter() - started
    report = LoadReport(report.read_bytes, report.held_bytes, report.seconds + waited)
    if num_blocks < config.blocks_per_sequence:
        raise ConfigError(
            f"the memory left for the KV cache holds {num_blocks} blocks of {config.block_size} "
            f"tokens, but one sequence of max_model_len={config.max_model_len} takes "
            f"{config.blocks_per_sequence}; lower max_model_len, or use more ranks"
        )
    worker = Worker(config, model_config, mesh, ops_for(config.device), weights, num_blocks)
    return worker, num_blocks, report


def _fitting_blocks(config: EngineConfig, model_config: ModelConfig, mesh: Mesh) -> int:
    """Blocks that this rank has room for, and not more than all sequences can use."""
    _, keys = head_shares(model_config, mesh.tp.size, mesh.tp.rank)
    token_bytes = 2 * model_config.num_hidden_layers * keys.length * DTYPE_BYTES[config.dtype]
    ranks_that_share = config.layout.world_size if config.device == "cpu" else 1
    room = available_bytes(mesh.device) * _CACHE_SHARE[config.device] / ranks_that_share
    wanted = config.max_num_seqs * config.blocks_per_sequence
    return min(wanted, int(room // (token_bytes * config.block_size)))
