"""Records the bytes of all tensors that are alive while a step of the real network runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moespan.checkpoint.loader import load_weights
from moespan.checkpoint.placement import place
from moespan.checkpoint.random import RandomSource
from moespan.config import EngineConfig, ModelConfig
from moespan.engine.step import SampleRow, StepPlan, StepPlans
from moespan.engine.worker import Worker
from moespan.ops import ops_for
from moespan.parallel.mesh import Mesh

CPU = torch.device("cpu")


class LiveTensors(TorchDispatchMode):
    """Counts the storages that operations make, while they are referred to.

    `uint8` tensors are left out: they are the scratch memory that operations keep.

    Attributes:
        peak_bytes: most bytes alive at once.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._alive: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        gone = [key for key, (storage, _) in self._alive.items() if storage.expired()]
        for key in gone:
            del self._alive[key]
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor) or tensor.dtype == torch.uint8:
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._known and storage._cdata not in self._alive:
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self._alive.values()))
        return out


@contextmanager
def ranks_that_do_nothing(config: EngineConfig, rank: int) -> Iterator[Mesh]:
    """The mesh of one rank whose collectives return at once: sizes are real, values are not."""
    with pytest.MonkeyPatch.context() as patch:
        if config.layout.world_size > 1:
            size = config.layout.world_size
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
            for name in ("new_group", "new_subgroups_by_enumeration"):
                make = getattr(dist, name)

                def fake(*args: Any, make: Any = make, **kwargs: Any) -> Any:
                    kwargs = {key: one for key, one in kwargs.items() if key != "pg_options"}
                    return make(*args, **{**kwargs, "backend": "fake"})

                patch.setattr(dist, name, fake)
        try:
            yield Mesh.create(config.layout, CPU, config.moe_dispatch)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def run_step(
    config: EngineConfig, model: ModelConfig, rank: int, sampling: Mapping[str, float]
) -> tuple[int, int]:
    """One step at the limits of `config`, as four prompts.

    Returns:
        Most bytes of tensors alive at once, and bytes of the operations' scratch memory.
    """
    tokens, rows, block = config.max_num_batched_tokens, config.max_num_seqs, config.block_size
    dtype = getattr(torch, config.dtype)
    with ranks_that_do_nothing(config, rank) as mesh:
        ops = ops_for("cpu", config)
        placement = place(model, config.layout, rank, quantization=config.quantization)
        source = RandomSource(model, dtype, 0)
        weights, _ = load_weights(placement, source, dtype, CPU, new_builder=ops.builder)
        lengths = [tokens // 4] * 3 + [tokens - 3 * (tokens // 4)]
        needed = [-(-length // block) for length in lengths]
        worker = Worker(config, model, mesh, ops, weights, sum(needed))
        worker._link.receive = lambda num_tokens: torch.zeros(  # type: ignore[method-assign]
            num_tokens, model.hidden_size, dtype=dtype
        )
        starts = [sum(needed[:at]) for at in range(4)]
        neutral = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 1}
        row: dict[str, Any] = {**neutral, **sampling}
        plan = StepPlan(
            step=0,
            token_ids=[1 + at % 50 for at in range(tokens)],
            query_lens=lengths,
            context_lens=[0] * 4,
            block_tables=[
                list(range(start, start + count))
                for start, count in zip(starts, needed, strict=True)
            ],
            sampled=[at % 4 for at in range(rows)],
            positions=[0] * rows,
            samples=[SampleRow(**row)] * rows,
        )
        plans = StepPlans.of([plan] * config.layout.dp)
        known = [tensor for weight in weights.values() for tensor in _tensors(weight)]
        known += [tensor for cache in worker.caches for tensor in cache.tensors]
        rope = worker.model.rope
        with LiveTensors([*known, rope.cos, rope.sin]) as live:
            for _ in range(config.layout.pp + 1):  # plans that other stages still work on
                pending = worker.execute(plans, plan)
                del pending
        buffers = getattr(ops, "_buffers", {}).values()
        return live.peak_bytes, sum(num_bytes for _, num_bytes, _ in buffers)


def _tensors(weight: Any) -> list[Tensor]:
    parts = [weight] if isinstance(weight, Tensor) else list(vars(weight).values())
    return [part for part in parts if isinstance(part, Tensor)]
