"""Executes step plans on one rank's shard of the model and of the KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from moespan.checkpoint.placement import head_shares
from moespan.config import EngineConfig, ModelConfig
from moespan.engine.plan import PromptRow, PromptScores, StepPlan, StepResult
from moespan.engine.sampler import sample, token_logprobs
from moespan.memory import zeros
from moespan.model.network import Model, Weights
from moespan.ops import AttentionBatch, Ops
from moespan.parallel.mesh import Mesh


class Worker:
    """One rank's model, cache and way through a plan. It keeps no state of requests.

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
        self.block_size = config.block_size
        self.model = Model(model_config, ops, mesh, weights, config.max_model_len)
        _, keys = head_shares(model_config, mesh.tp.size, mesh.tp.rank)
        head_dim = model_config.head_dim
        shape = (num_blocks, config.block_size, keys.length // head_dim, head_dim)
        dtype = getattr(torch, config.dtype)
        self.caches = [
            (zeros(shape, dtype, mesh.device), zeros(shape, dtype, mesh.device))
            for _ in range(model_config.num_hidden_layers)
        ]

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def execute(self, plan: StepPlan) -> StepResult | None:
        """Run one step. The leader gets the result, the other ranks None."""
        device = self.mesh.device
        batch = AttentionBatch.build(
            plan.query_lens, plan.context_lens, plan.block_tables, self.block_size, device
        )
        token_ids = torch.tensor(plan.token_ids, device=device)
        # There may be none; an empty list alone would make an index of floats.
        rows = torch.tensor(_logit_rows(plan), dtype=torch.int64, device=device)
        logits = self.model(token_ids, self.caches, batch, rows)
        if not self.mesh.is_leader:
            return None
        first_prompt_row = len(plan.samples)
        samples = sample(logits[:first_prompt_row], plan.samples)
        prompts = []
        at = first_prompt_row
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
