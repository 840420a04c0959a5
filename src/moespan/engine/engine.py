"""The engine on the leader, and its counterpart on all other ranks.

The leader owns the requests: it schedules, has every rank execute the plan, and turns what was
sampled into text. The others only execute plans.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import torch
from tqdm import tqdm

from moespan.checkpoint.experts import ExpertPlacement
from moespan.checkpoint.loader import LoadReport, load_weights
from moespan.checkpoint.placement import cache_bytes_per_token, place
from moespan.checkpoint.random import RandomSource
from moespan.checkpoint.source import SafetensorsSource, Source
from moespan.config import Coordinates, EngineConfig, ModelConfig
from moespan.device import DEVICES
from moespan.engine.graphs import scratch_blocks
from moespan.engine.info import EngineInfo, EngineStats
from moespan.engine.questions import Question, Stats, Trace, Traffic
from moespan.engine.replicas import Replicas
from moespan.engine.request import OutputDelta, Request, SamplingParams, check_request
from moespan.engine.scheduler import SequenceUpdate
from moespan.engine.sequence import Sequence
from moespan.engine.step import StepPlan, StepPlans, StepResult
from moespan.engine.text import TextStream
from moespan.engine.trace import Observation, join_rows
from moespan.engine.worker import Pending, Worker
from moespan.errors import ConfigError, EngineDeadError, RequestError
from moespan.memory import available_bytes
from moespan.ops import Ops, ops_for
from moespan.parallel import fused
from moespan.parallel.buffers import DEFAULT_BUFFER_MB
from moespan.parallel.counters import TrafficRows
from moespan.parallel.mesh import Mesh
from moespan.text.tokenizer import Tokenizer


@dataclass
class _Continuation:
    """A live sequence and its text; a model without a tokenizer has none."""

    sequence: Sequence
    text: TextStream | None


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """Leader to followers: I am alive."""


class Report(msgspec.Struct, frozen=True, tag="report"):
    """Leader to followers: send me what you have counted."""


class Close(msgspec.Struct, frozen=True, tag="close"):
    """Leader to followers: this engine ends; `config` is that of the next one, if any."""

    config: EngineConfig | None


FromLeader = StepPlans | Heartbeat | Report | Close


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
        self._mesh = worker.mesh
        self._tokenizer = tokenizer
        eos = {*model_config.eos_token_ids, *(tokenizer.eos_token_ids if tokenizer else ())}
        self._replicas = Replicas(config, info.num_blocks, model_config.vocab_size, eos)
        self._most_in_flight = config.most_steps_in_flight
        self._seeds = random.Random(config.seed)
        self._live: dict[tuple[str, int], _Continuation] = {}
        # Results of steps in flight that this rank itself computed, if it speaks for its replica.
        self._own_results: deque[Pending | None] = deque()
        self._kept: list[OutputDelta] = []  # that the next step returns
        self._death: EngineDeadError | None = None
        self._is_closed = False

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._kept) or self._replicas.has_unfinished

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: it cannot be served as asked; nothing has changed.
            EngineDeadError: a step failed, or the engine is closed.
        """
        if self._death is not None:
            raise self._death
        if request.params.stop and self._tokenizer is None:
            raise RequestError(
                "stop strings need a tokenizer, and this checkpoint has none; use stop_token_ids"
            )
        for sequence in self._replicas.add(request, self._seeds.getrandbits(62)):
            text = (
                TextStream(self._tokenizer, request.params, request.prompt_token_ids)
                if self._tokenizer is not None
                else None
            )
            self._live[sequence.id, sequence.index] = _Continuation(sequence, text)

    def abort(self, request_id: str) -> None:
        """Drop what is left of a request; nothing more comes of it. Unknown ids are ignored."""
        self._kept = [delta for delta in self._kept if delta.id != request_id]
        for sequence in self._replicas.abort(request_id):
            del self._live[sequence.id, sequence.index]

    def step(self) -> list[OutputDelta]:
        """Keep plans in flight, one for every pipeline stage or one ahead of the device, and return
        the deltas of the oldest one; nothing if there is no work.

        An error or interrupt inside a step leaves the ranks at different places: the engine is dead
        from then on.

        Raises:
            EngineDeadError: an earlier step failed, or the engine is closed.
        """
        with self._all_or_dead():
            while self._replicas.num_in_flight < self._most_in_flight:
                plans = self._replicas.schedule()
                if plans is None:
                    break
                message = StepPlans.of(plans)
                self._broadcast(message)
                own = plans[self._mesh.at.dp]
                self._own_results.append(self._worker.execute(message, own))
            if not self._kept and self._replicas.num_in_flight:
                self._finish_oldest()
            deltas, self._kept = self._kept, []
            return deltas

    def answer(self, question: Question[Any]) -> Any:
        """Answer a question between two steps; requests may be under way.

        Raises:
            RequestError: it cannot be answered now, or as asked; nothing has changed.
            EngineDeadError: a step failed, or the engine is closed.
        """
        with self._all_or_dead():
            if not self._live:
                self._settle()
            if isinstance(question, Stats):
                return self._stats()
            if isinstance(question, Traffic):
                return self._traffic()
            if isinstance(question, Trace):
                return self._trace(question.token_ids)
        raise TypeError(f"{type(question).__name__} is no question to an engine")

    def heartbeat(self) -> None:
        """Let idle followers know that the leader is alive; call it within the group's timeout."""
        self._broadcast(Heartbeat())

    def close(self, successor: EngineConfig | None = None) -> None:
        """Release the followers, which then build `successor` if there is one. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._live.clear()
        if self._death is None:
            with self._all_or_dead():
                self._settle()
            self._death = EngineDeadError("the engine is closed")
        self._broadcast(Close(successor))
        self._mesh.close()

    @contextlib.contextmanager
    def _all_or_dead(self) -> Iterator[None]:
        """Run what ranks do together: unless it ends or is refused, the engine is dead."""
        if self._death is not None:
            raise self._death
        try:
            yield
        except RequestError:
            raise
        except BaseException as error:
            self._death = EngineDeadError(
                f"a step of the engine was cut short by {type(error).__name__}; start a new engine"
            )
            raise

    def _stats(self) -> EngineStats:
        schedulers = self._replicas.schedulers
        return EngineStats(
            num_waiting=sum(s.num_waiting for s in schedulers),
            num_running=sum(s.num_running for s in schedulers),
            kv_usage=sum(s.kv_usage for s in schedulers) / len(schedulers),
            num_preemptions=sum(s.num_preemptions for s in schedulers),
            num_prefix_queried_tokens=sum(s.num_prefix_queried_tokens for s in schedulers),
            num_prefix_hit_tokens=sum(s.num_prefix_hit_tokens for s in schedulers),
        )

    def _traffic(self) -> list[TrafficRows]:
        self._settle()
        self._broadcast(Report())
        own = self._mesh.traffic.rows()
        others = range(1, self._mesh.layout.world_size)
        return [own, *(_decode_traffic(self._mesh.control.receive(rank)) for rank in others)]

    def _trace(self, token_ids: list[int]) -> list[Observation]:
        scheduler = self._replicas.schedulers[0]
        request = Request(id="trace", prompt_token_ids=token_ids, params=SamplingParams())
        check_request(request, self.info.max_model_len, scheduler.vocab_size)
        most = scheduler.config.max_num_batched_tokens
        if len(token_ids) > most or self._live:
            raise RequestError(
                f"a trace takes an idle engine, and {len(token_ids)} tokens in one step of at most "
                f"max_num_batched_tokens={most}"
            )
        table = scheduler.allocator.take(scheduler.allocator.blocks_for(len(token_ids)))
        assert table is not None  # an idle engine has room for one sequence
        plan = StepPlan(
            step=-1,
            token_ids=token_ids,
            query_lens=[len(token_ids)],
            context_lens=[0],
            block_tables=[table],
            samples=[],
        )
        others = [None] * (self._mesh.layout.dp - 1)
        message = StepPlans.of([plan, *others], trace=True)
        self._broadcast(message)
        self._worker.execute(message)
        observations = []
        for stage in range(self._mesh.layout.pp):
            places = [Coordinates(stage, 0, sp, 0) for sp in range(self._mesh.layout.sp)]
            ranks = [self._mesh.layout.rank(place) for place in places]
            parts = [
                _decode_trace(self._mesh.control.receive(rank)) if rank else self._worker.trace
                for rank in ranks
            ]
            observations += join_rows(parts)
        if (speaker := self._mesh.speakers[0]) != self._mesh.rank:
            self._mesh.control.receive(speaker)  # its empty result
        scheduler.allocator.free(table)
        return observations

    def _settle(self) -> None:
        """Take in all results in flight, and keep their deltas for the next `step`.

        A follower answers the leader's messages in their order, so results of earlier steps come
        before anything that is asked for now.
        """
        while self._replicas.num_in_flight:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        """Take in the results of the oldest step in flight, and keep the deltas."""
        self._kept += [self._delta(update) for update in self._replicas.update(self._collect())]

    def _broadcast(self, message: FromLeader) -> None:
        kind = str(message.__struct_config__.tag)
        self._mesh.control.broadcast(msgspec.msgpack.encode(message), kind)

    def _collect(self) -> list[StepResult | None]:
        """The results of the oldest step in flight, one for each replica that had a plan."""
        own = self._own_results.popleft()
        results: list[StepResult | None] = []
        for plan, speaker in zip(self._replicas.oldest_in_flight, self._mesh.speakers, strict=True):
            if plan is None:
                results.append(None)
            elif speaker == self._mesh.rank:
                assert own is not None
                results.append(own.wait())
            else:
                results.append(_decode_result(self._mesh.control.receive(speaker)))
        return results

    def _delta(self, update: SequenceUpdate) -> OutputDelta:
        sequence = update.sequence
        key = sequence.id, sequence.index
        live = self._live[key]
        finish_reason = update.finish_reason
        stop_reason: str | int | None = update.stop_reason
        text = ""
        if live.text is not None:
            may_stop = sequence.num_output_tokens >= sequence.params.min_tokens
            text = live.text.push(update.token_ids, may_stop, is_last=finish_reason is not None)
            if live.text.stopped_by is not None:
                finish_reason, stop_reason = "stop", live.text.stopped_by
                self._replicas.finish(sequence)
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


_decode_result = msgspec.msgpack.Decoder(StepResult).decode
_decode_trace = msgspec.msgpack.Decoder(list[Observation]).decode
_decode_traffic = msgspec.msgpack.Decoder(TrafficRows).decode


def build_leader(config: EngineConfig, mesh: Mesh) -> Engine:
    """Load rank 0's share and return the engine; every other rank must call `follow` meanwhile.

    On a terminal, a bar on stderr shows how far it is.

    Raises:
        ConfigError, LayoutError, CheckpointError, TokenizerError: it cannot start, and why.
    """
    model_config = ModelConfig.from_pretrained(config.model)
    tokenizer = Tokenizer.from_pretrained(config.model)
    worker, num_blocks, report = _build_worker(config, model_config, mesh)
    stored = model_config.quantization
    info = EngineInfo(
        model=config.model,
        layout=config.layout,
        device=config.device,
        dtype=config.dtype,
        quantization=config.quantization or (stored.scheme if stored else None),
        cache_dtype=config.cache_dtype,
        max_model_len=config.max_model_len,
        num_blocks=num_blocks,
        block_size=config.block_size,
        load_s=report.seconds,
        read_bytes=report.read_bytes,
        weight_bytes=report.held_bytes,
    )
    return Engine(config, model_config, worker, tokenizer, info)


def follow(config: EngineConfig, mesh: Mesh) -> EngineConfig | None:
    """Load this rank's share and execute the leader's plans until it closes.

    Returns:
        What to build next; None when the job is over.

    Raises:
        ConfigError, LayoutError, CheckpointError: it cannot start, and why.
    """
    model_config = ModelConfig.from_pretrained(config.model)
    worker, _, _ = _build_worker(config, model_config, mesh)
    decoder = msgspec.msgpack.Decoder(FromLeader)
    while True:
        message = decoder.decode(mesh.control.receive_broadcast())
        if isinstance(message, StepPlans):
            result = worker.execute(message)
            if message.trace and mesh.at.dp == 0 and mesh.at.tp == 0:
                mesh.control.send(msgspec.msgpack.encode(worker.trace), "trace")
            if result is not None:
                mesh.control.send(msgspec.msgpack.encode(result.wait()), "result")
        elif isinstance(message, Report):
            mesh.control.send(msgspec.msgpack.encode(mesh.traffic.rows()), "report")
        elif isinstance(message, Close):
            mesh.close()
            return message.config


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
    ops = ops_for(config.device, config)
    _check_quantization(config, model_config, ops)
    quantization, source = config.quantization, _open(config, model_config, mesh.device)
    if config.load_format == "dummy" and model_config.quantization:
        # What is drawn is floats, to be rounded as the checkpoint of this config would be.
        quantization = quantization or model_config.quantization.scheme
        model_config = replace(model_config, quantization=None)
    experts = ExpertPlacement.make(config.expert_placement, model_config, config.layout)
    # What is not a number is too little for whatever asks for it, and nothing to others.
    buffer_mb = os.environ.get("HCCL_BUFFSIZE", str(DEFAULT_BUFFER_MB))
    fused.check(
        config,
        model_config,
        experts,
        ops.chip,
        mesh.ranks_here,
        int(buffer_mb) if buffer_mb.isdecimal() else 0,
    )
    placement = place(model_config, config.layout, mesh.rank, experts, quantization)
    # tqdm's own rule for `disable=None`: only a terminal gets a bar.
    with tqdm(
        desc="loading",
        total=sum(map(source.num_bytes, placement.pieces)),
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
            new_builder=ops.builder,
            check_finite=config.check_finite,
            progress=bar.update,
            maximum_over_tp=lambda maxima: mesh.tp.maximum(maxima.to(mesh.device), "load").cpu(),
        )
    started = time.perf_counter()
    num_blocks = config.num_blocks or _fitting_blocks(config, model_config, mesh, ops)
    num_blocks = mesh.control.smallest(num_blocks)
    # Waiting for the slowest rank is part of loading.
    waited = time.perf_counter() - started
    report = LoadReport(report.read_bytes, report.held_bytes, report.seconds + waited)
    if num_blocks < config.blocks_per_sequence:
        raise ConfigError(
            f"the memory left for the KV cache holds {num_blocks} blocks of {config.block_size} "
            f"tokens, but one sequence of max_model_len={config.max_model_len} takes "
            f"{config.blocks_per_sequence}; lower max_model_len, or use more ranks"
        )
    worker = Worker(config, model_config, mesh, ops, weights, num_blocks)
    return worker, num_blocks, report


def _check_quantization(config: EngineConfig, model_config: ModelConfig, ops: Ops) -> None:
    """Refuse 8 bits where the device has no operations for them, before anything is read."""
    device = f"device={config.device}" + (f" ({ops.chip})" if ops.chip else "")
    stored = model_config.quantization
    scheme = config.quantization or (stored.scheme if stored else None)
    if scheme is not None and scheme not in ops.quantizations:
        needs = " (GPUs of compute capability 8.9 and newer, and CPUs, take it)"
        others = " or ".join((*ops.quantizations, "a checkpoint of floats without --quantization"))
        raise ConfigError(
            f"quantization={scheme} is not implemented for {device}"
            f"{needs if scheme == 'fp8' else ''}; use {others}"
        )
    if config.cache_dtype == "int8" and not ops.has_int8_cache:
        raise ConfigError(f"kv_cache_dtype=int8 is not implemented for {device}; use auto")


def _open(config: EngineConfig, model_config: ModelConfig, device: torch.device) -> Source:
    if config.load_format == "dummy":
        return RandomSource(model_config, getattr(torch, config.dtype), config.seed, device)
    return SafetensorsSource(config.model, model_config)


def _fitting_blocks(config: EngineConfig, model_config: ModelConfig, mesh: Mesh, ops: Ops) -> int:
    """Blocks that this rank has room for, and not more than all sequences can use."""
    token_bytes = cache_bytes_per_token(model_config, config.layout, mesh.rank, config.cache_dtype)
    ranks_that_share = mesh.ranks_here if DEVICES[config.device].is_host else 1
    room = available_bytes(mesh.device) * DEVICES[config.device].cache_share / ranks_that_share
    wanted = config.max_num_seqs * config.layout.pp * config.blocks_per_sequence
    fitting = int(room // (token_bytes * config.block_size)) - scratch_blocks(config, ops)
    return min(wanted, max(fitting, 0))
