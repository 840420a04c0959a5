"""Executes step plans on one rank's shard of the model and of the KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from moespan.checkpoint.experts import ExpertPlacement
from moespan.checkpoint.placement import cache_heads
from moespan.config import EngineConfig, ModelConfig
from moespan.engine.plan import PromptRow, PromptScores, StepPlan, StepPlans, StepResult
from moespan.engine.sampler import sample, token_logprobs
from moespan.engine.trace import Observation
from moespan.memory import zeros
from moespan.model.network import Model, Weights
from moespan.ops import AttentionBatch, Ops
from moespan.parallel.dispatch import Dispatch
from moespan.parallel.mesh import Mesh
from moespan.parallel.pipeline import StageLink
from moespan.parallel.tokens import block_tokens, split_evenly

_EMPTY_PLAN = StepPlan(
    step=0, token_ids=[], query_lens=[], context_lens=[], block_tables=[], samples=[]
)


class Worker:
    """One rank's part of the model, its cache, and its way through a step. It keeps no state of
    requests.

    Attributes:
        trace: what the network computed inside in the last step, if its plan asked for it.

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
        self.block_size = config.block_size
        dtype = getattr(torch, config.dtype)
        self._dispatch = Dispatch(model_config, mesh, config.moe_dispatch, dtype.itemsize)
        experts = ExpertPlacement.make(config.expert_placement, model_config, config.layout)
        self.model = Model(
            model_config, ops, mesh, weights, config.max_model_len, self._dispatch, experts
        )
        self._link = StageLink(mesh, model_config.hidden_size, dtype)
        heads = cache_heads(model_config, config.layout, mesh.rank)
        shape = (num_blocks, config.block_size, heads, model_config.head_dim)
        self.caches = [
            (zeros(shape, dtype, mesh.device), zeros(shape, dtype, mesh.device))
            for _ in self.model.layers
        ]

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def execute(self, plans: StepPlans) -> StepResult | None:
        """Run one step. The speaker of each replica with a plan gets the result, others None."""
        self.trace.clear()
        at, layout = self.mesh.at, self.mesh.layout
        if not plans.num_tokens[at.dp] and layout.ep_blocks == 1:
            return None  # and nobody shares experts with this replica
        plan = plans.plan(at.dp) or _EMPTY_PLAN
        self._dispatch.begin_step(block_tokens(layout, self.mesh.rank, plans.num_tokens))
        device = self.mesh.device
        batch = AttentionBatch.build(
            plan.query_lens, plan.context_lens, plan.block_tables, self.block_size, device
        )
        inputs = (
            torch.tensor(plan.token_ids, dtype=torch.int64, device=device)
            if self.mesh.is_first_stage
            else self._link.receive(self._tokens_here(len(plan.token_ids)))
        )
        rows = torch.tensor(_logit_rows(plan), dtype=torch.int64, device=device)
        observe = self._record if plans.trace else None
        out = self.model(inputs, self.caches, batch, rows, observe)
        if not self.mesh.is_last_stage:
            self._link.send(out)
        if not self.mesh.is_speaker or plan is _EMPTY_PLAN:
            return None
        return _result(out, plan)

    def _record(self, layer: int, module: str, values: Tensor) -> None:
        if module == "router.experts":
            values = values.sort(-1).values  # the order of equally good ones means nothing
        data = values.float().cpu().numpy()
        self.trace.append(Observation(layer, module, data.shape[1], data.tobytes()))

    def _tokens_here(self, num_tokens: int) -> int:
        return split_evenly(num_tokens, self.mesh.sp.size)[self.mesh.sp.rank]


def _result(logits: Tensor, plan: StepPlan) -> StepResult:
    """Sample and score from the logits of `_logit_rows`."""
    at = len(plan.samples)
    samples = sample(logits[:at], plan.samples)
    prompts = []
    for prompt in plan.prompts:
        count = plan.query_lens[prompt.sequence]
        prompts.append(_score(logits[at : at + count], prompt))
        at += count
    return StepResult(samples, prompts)


def _logit_rows(plan: StepPlan) -> list[int]:
    """Tokens whose logits the plan needs: the sampling rows, then all rows of each prompt."""
    ends = torch.tensor(plan.query_lens).cumsum(0).tolist()
    rows = [ends[row.sequence] - 1 for row in plan.samples]
    for prompt in plan.prompts:
        end = ends[prompt.sequence]
        rows += range(end - plan.query_lens[prompt.sequence], end)
    return rows


def _score(logits: Tensor, prompt: PromptRow) -> PromptScores:
    """Report on one sequence's query tokens, float32 logits [Q, V]."""
    logprobs = (
        []
        if prompt.logprobs is None or not prompt.targets
        else token_logprobs(logits[: len(prompt.targets)], prompt.targets, prompt.logprobs)
    )
    raw = logits.cpu().numpy().tobytes() if prompt.logits else b""
    return PromptScores(logprobs, raw)
