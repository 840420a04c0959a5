"""Executes step plans on one rank's shard of the model and of the KV cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moespan.checkpoint.experts import ExpertPlacement
from moespan.checkpoint.placement import cache_heads
from moespan.config import EngineConfig, ModelConfig
from moespan.engine.graphs import DecodeGraphs, scratch_blocks
from moespan.engine.results import Pending, logit_rows
from moespan.engine.sampler import fill_in
from moespan.engine.step import StepPlan, StepPlans
from moespan.engine.trace import Observation
from moespan.memory import to_device
from moespan.model.expert_counts import ExpertCounter
from moespan.model.network import Model, Observer, Weights
from moespan.ops import AttentionBatch, Ops
from moespan.parallel.dispatch import Dispatch
from moespan.parallel.mesh import Mesh
from moespan.parallel.pipeline import StageLink
from moespan.parallel.tokens import split_evenly, tp_group_tokens
from moespan.planner.memory import RankMemory

_EMPTY_PLAN = StepPlan(step=0)


class Worker:
    """One rank's part of the model and its cache. The only state of requests is the last sampled
    tokens, which the next plan may name before the leader knows them.

    Attributes:
        trace: values inside the network in the last step, if its plan asked for them.
        memory: what this rank takes (`moespan.engine.memory`).

    Args:
        num_blocks: blocks of the KV cache, the same on every rank.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        mesh: Mesh,
        ops: Ops,
        weights: Weights,
        num_blocks: int,
    ) -> None:
        self.mesh = mesh
        self.trace: list[Observation] = []
        self.memory: Callable[[], RankMemory] = RankMemory
        self.block_size = config.block_size
        dtype = getattr(torch, config.dtype)
        self._dispatch = Dispatch(model_config, mesh, config.moe_dispatch, dtype.itemsize)
        experts = ExpertPlacement.make(config.expert_placement, model_config, config.layout)
        counter = ExpertCounter.make(config, model_config, mesh, num_blocks)
        self.model = Model(
            model_config, ops, mesh, weights, config.max_model_len, self._dispatch, experts, counter
        )
        self._link = StageLink(mesh, model_config.hidden_size, dtype)
        heads = cache_heads(model_config, config.layout, mesh.rank)
        total_blocks = num_blocks + scratch_blocks(config, ops)
        shape = (total_blocks, config.block_size, heads, model_config.head_dim)
        cache_dtype = getattr(torch, config.cache_dtype)
        self.caches = [ops.new_cache(shape, cache_dtype, mesh.device) for _ in self.model.layers]
        self._num_sampled = 0
        self._sampled: Tensor | None = None  # by the last plan; on the speaker only
        self.graphs: DecodeGraphs | None = None
        if total_blocks > num_blocks:
            self.graphs = DecodeGraphs(
                ops,
                lambda inputs, batch, rows: self.model(inputs, self.caches, batch, rows),
                config,
                mesh,
                model_config.hidden_size,
                first_scratch_block=num_blocks,
            )

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def execute(self, plans: StepPlans, plan: StepPlan | None = None) -> Pending | None:
        """Start one step. The speaker of a replica with a plan gets its result, others None.

        Args:
            plan: this replica's plan, if at hand; None decodes it from `plans`.
        """
        self.trace.clear()
        self.mesh.beat.start_step((plans.is_decode, sum(plans.num_tokens).bit_length()))
        at, layout = self.mesh.at, self.mesh.layout
        if not plans.num_tokens[at.dp] and layout.ep_tp_groups == 1:
            return None  # no other replica shares its experts
        plan = plan or plans.plan(at.dp) or _EMPTY_PLAN
        size = self._padded_size(plans)
        tokens = [size] * layout.dp if size else plans.num_tokens
        self._dispatch.begin_step(tp_group_tokens(layout, self.mesh.rank, tokens))
        received = (
            None
            if self.mesh.is_first_stage
            else self._link.receive(self._tokens_here(tokens[at.dp]))
        )
        expected = self._share_sampled() if plan.is_ahead else None
        if size:
            assert self.graphs is not None
            out = self.graphs(plan, size, received, expected)
        else:
            out = self._run(plan, received, expected, self._record if plans.trace else None)
        if not self.mesh.is_last_stage:
            self._link.send(out)
        if plan is _EMPTY_PLAN:
            return None
        self._num_sampled = len(plan.samples)
        if not self.mesh.is_speaker:
            return None
        if size:
            out = self._rows(out, plan.sampled)
        pending = Pending(out, plan, self.mesh.beat)
        self._sampled = pending.sampling.token_ids
        return pending

    def _share_sampled(self) -> Tensor:
        """The speaker's last tokens, int32 [R], on all ranks of the replica's only stage. Not each
        rank draws for itself: kernels may give two devices different sums."""
        sampled = self._sampled
        if sampled is None:
            sampled = torch.empty(self._num_sampled, dtype=torch.int32, device=self.mesh.device)
        if self.mesh.at.sp == 0:
            self.mesh.tp.broadcast(sampled, "sampled")
        return self.mesh.sp.broadcast(sampled, "sampled")

    def _run(
        self,
        plan: StepPlan,
        received: Tensor | None,
        expected: Tensor | None,
        observe: Observer | None,
    ) -> Tensor:
        """The model's output for the plan, without padding."""
        device = self.mesh.device
        batch = AttentionBatch.build(
            plan.query_lens, plan.context_lens, plan.block_tables, self.block_size, device
        )
        sent = [
            torch.tensor(values, dtype=torch.int32) for values in (plan.token_ids, logit_rows(plan))
        ]
        token_ids, rows = to_device(sent, device)
        if expected is not None:
            token_ids = fill_in(token_ids, expected)
        inputs = token_ids if received is None else received
        return self.model(inputs, self.caches, batch, rows, observe)

    def _padded_size(self, plans: StepPlans) -> int | None:
        """Size of a decode step that runs as a graph, the same on all ranks of its collectives."""
        if self.graphs is None or not plans.is_decode or plans.trace:
            return None
        layout, at = self.mesh.layout, self.mesh.at
        meeting = plans.num_tokens if layout.ep_tp_groups > 1 else [plans.num_tokens[at.dp]]
        size = self.graphs.size_for(max(meeting))
        if size is None:
            return None
        tokens = tp_group_tokens(layout, self.mesh.rank, [size] * layout.dp)
        if self._dispatch.mode_of(tokens) != "all_to_all":
            return size
        self.graphs.say("all_to_all waits for the device to know how much goes where")
        return None

    def _rows(self, out: Tensor, rows: list[int]) -> Tensor:
        if rows == list(range(len(rows))):
            return out[: len(rows)]
        return out.index_select(0, to_device([torch.tensor(rows)], out.device)[0])

    def _record(self, layer: int, module: str, values: Tensor) -> None:
        if module == "router.experts":
            values = values.sort(-1).values  # the order of equal scores is arbitrary
        data = values.float().cpu().numpy()
        self.trace.append(Observation(layer, module, data.shape[1], data.tobytes()))

    def _tokens_here(self, num_tokens: int) -> int:
        return split_evenly(num_tokens, self.mesh.sp.size)[self.mesh.sp.rank]
