"""The memory that a step takes beside weights and KV cache, counted tensor by tensor.

The count follows `moespan.model.network`, `moespan.parallel.dispatch` and `moespan.engine.sampler`
in their order, with every tensor that their functions hold, and asks `temporaries` for what an
operation needs meanwhile. Nothing is run, and no torch is imported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from moespan.checkpoint.placement import Parameter, cache_heads, head_shares
from moespan.config import DTYPE_BYTES, EngineConfig, ModelConfig
from moespan.parallel.fused import sent_tokens
from moespan.parallel.tokens import dispatch_of_step, split_evenly
from moespan.planner.temporaries import Heads, Matrix, Operations, operations_of

_CHOICE_BYTES = 8  # a weight, float32, and a number, int32


@dataclass(frozen=True)
class Step:
    """The step for which memory is counted.

    Attributes:
        num_tokens: tokens of each replica; None is `max_num_batched_tokens`.
        num_rows: rows of logits of each replica; None is `max_num_seqs`.
        sampling: how they are sampled, one of `temporaries.SAMPLINGS`.
        context: longest context; None is `max_model_len`.
    """

    num_tokens: int | None = None
    num_rows: int | None = None
    sampling: str = "truncated"
    context: int | None = None


@dataclass(frozen=True)
class Activations:
    """Memory of a step on one rank.

    Attributes:
        peak_bytes: most bytes of tensors alive at once.
        peak_in: the part of the step in which that is.
        scratch_bytes: memory that operations keep for later steps.
    """

    peak_bytes: int
    peak_in: str
    scratch_bytes: int

    @property
    def total_bytes(self) -> int:
        """Both together."""
        return self.peak_bytes + self.scratch_bytes


def activations(
    config: EngineConfig,
    model: ModelConfig,
    rank: int,
    parameters: Mapping[str, Parameter],
    step: Step | None = None,
) -> Activations:
    """The memory of a step on `rank`, which holds `parameters`; all replicas have equal steps.

    Experts are met evenly, and with `all_to_all` every token goes to every rank: a skewed router
    may send that much.
    """
    counts = _Counts(config, model, rank, parameters, step or Step())
    counts.step()
    live = counts.ops.live
    return Activations(live.peak_bytes, live.peak_in, counts.ops.scratch_bytes())


class _Counts:
    """Counts a step of one rank, by the parts of `moespan.model.network`."""

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        rank: int,
        parameters: Mapping[str, Parameter],
        step: Step,
    ) -> None:
        layout = config.layout
        self._config, self._model, self._layout = config, model, layout
        self._at, self._parameters = layout.coordinates(rank), parameters
        self._layers = layout.stages(model)[self._at.pp]
        self._sampling = step.sampling
        self.tokens = step.num_tokens or config.max_num_batched_tokens
        self.rows = min(step.num_rows or config.max_num_seqs, self.tokens)
        self.held = split_evenly(self.tokens, layout.sp)[self._at.sp]
        self.context = step.context or config.max_model_len
        self._element = DTYPE_BYTES[config.dtype]
        self.ops: Operations = operations_of(config, model.head_dim)
        self.live = self.ops.live
        queries, keys = head_shares(model, layout.tp, self._at.tp)
        heads = queries.length // model.head_dim
        self.local = Heads(heads, keys.length // model.head_dim, model.head_dim, self.context)
        cached = cache_heads(model, layout, rank)
        self.attended = Heads(heads // layout.sp, cached, model.head_dim, self.context)
        self.hidden_bytes = self.held * model.hidden_size * self._element
        group = split_evenly(self.tokens, layout.sp)[0]
        self._group_tokens = [group] * layout.ep_tp_groups
        self._dispatch = dispatch_of_step(
            config.moe_dispatch, model, layout, self._element, self._group_tokens
        )

    def step(self) -> None:
        """The whole step."""
        live, config = self.live, self._config
        self.live.enter("inputs")
        tables = self.rows * -(-self.context // config.block_size)
        live.take(4 * (tables + 3 * self.tokens + 2 * self.rows))
        if self._at.pp > 0:
            live.take(self.hidden_bytes)  # received from the previous stage
        is_last = self._at.pp == self._layout.pp - 1
        if not is_last:
            live.take(self._layout.pp * self._sent_bytes)  # until the next stage has received them
        with live.frame():
            self._network()
            if is_last:
                self._logits()
            else:
                live.enter("hidden state for the next stage")
                live.take(2 * self.hidden_bytes)  # the sum, and its copy while it is sent
        if is_last and self._at.sp == 0:
            live.enter("sampling")
            live.take(self._logit_bytes)
            if self._at.tp == 0:
                self.ops.sampling(self.rows, self._model.vocab_size, self._sampling)

    @property
    def _sent_bytes(self) -> int:
        """What the rank sends of a step's hidden state to the next stage."""
        elements = self.held * self._model.hidden_size
        return -(-elements // self._layout.tp) * self._element

    def _network(self) -> None:
        """Leaves x and the residual of the last layer."""
        live = self.live
        live.take(self.held * self.ops.rotary_bytes)
        if self._at.pp == 0:
            self._embed()
        x, residual = self.hidden_bytes if self._at.pp == 0 else 0, 0
        for layer in self._different_layers():
            with live.frame():
                self._layer(layer, is_first=layer == self._layers.start)
            live.take(2 * self.hidden_bytes)
            live.give(x, residual)  # the model's own, until the layer has returned
            x = residual = self.hidden_bytes

    def _different_layers(self) -> Iterator[int]:
        """Layers in their order, two of each kind: a third one takes the same as the second."""
        seen: Counter[object] = Counter()
        for layer in self._layers:
            experts = self._parameters.get(f"layers.{layer}.mlp.experts.gate_up")
            kind = experts and experts.shape
            seen[kind] += 1
            if seen[kind] <= 2:
                yield layer

    def _embed(self) -> None:
        self.live.enter("embedding")
        if self._layout.tp > 1:
            self.live.touch(self.hidden_bytes + 9 * self.held)
        self.live.take(self.hidden_bytes)

    def _layer(self, layer: int, is_first: bool) -> None:
        live, hidden = self.live, self._model.hidden_size
        name = f"layers.{layer}"
        live.enter("attention")
        if is_first:
            normed, residual = self.ops.rms_norm(self.held, hidden), 0
        else:
            normed, residual = self.ops.add_rms_norm(self.held, hidden)
        with live.frame():
            self._attention(f"{name}.attention")
        out = live.take(self.hidden_bytes)
        live.give(normed)
        normed, _ = self.ops.add_rms_norm(self.held, hidden)
        live.give(out, residual)
        with live.frame():
            if self._model.is_moe(layer):
                self._moe(f"{name}.mlp")
            else:
                live.enter("dense MLP")
                self.ops.mlp(self.held, *self._mlp_of(f"{name}.mlp"))
        live.take(self.hidden_bytes)
        live.give(normed)

    def _attention(self, name: str) -> None:
        live, local = self.live, self.local
        head_bytes = local.size * self._element
        self.ops.linear(self.held, self._matrix(f"{name}.qkv"))
        self.ops.rope(self.held, local)
        heads = local
        if self._layout.sp > 1:
            heads = self.attended
            sent = self.held * heads.all * self._layout.sp * head_bytes
            received = self.tokens * heads.all * head_bytes
            live.enter("attention, tokens to heads")
            with live.frame():
                live.take(self.held * local.all * head_bytes)  # q, k and v side by side
                live.take(2 * sent)  # the heads of each rank, chosen and in order
                live.take(received)
            live.take(received)
            live.enter("attention")
        attended = self.ops.attention(self.tokens, heads)
        if self._layout.sp > 1:
            mine = self.held * local.queries * head_bytes
            live.take(mine)
            live.take(mine)
            live.give(attended, mine)
        self.ops.linear(self.held, self._matrix(f"{name}.out"))

    def _moe(self, name: str) -> None:
        live, model = self.live, self._model
        live.enter("router")
        chosen = model.num_experts_per_tok
        self.ops.route(self.held, model.hidden_size, model.n_routed_experts or 0, chosen)
        live.enter("experts")
        by_dispatch = {"all_gather": self._all_gather, "all_to_all": self._all_to_all}
        with live.frame():
            if self._dispatch == "fused":
                self._fused(name)
            elif self._dispatch in by_dispatch:
                by_dispatch[self._dispatch](name)
            else:
                self._experts(name, self.held)
        live.take(self.hidden_bytes)
        if f"{name}.shared.gate_up" in self._parameters:
            live.enter("shared experts")
            self.ops.mlp(self.held, *self._mlp_of(f"{name}.shared"), plus=True)

    def _experts(self, name: str, rows: int) -> None:
        gate_up, down = self._mlp_of(f"{name}.experts")
        held = self._parameters[f"{name}.experts.gate_up"].shape[0]
        met = min(held / max(self._model.n_routed_experts or 1, 1), 1.0)
        self.ops.experts(rows, self._model.num_experts_per_tok, gate_up, down, met)

    def _all_gather(self, name: str) -> None:
        live, model = self.live, self._model
        most, groups = max(self._group_tokens), self._layout.ep_tp_groups
        choices = model.num_experts_per_tok * _CHOICE_BYTES
        live.take(most * choices)
        live.take(groups * most * model.hidden_size * self._element)
        live.take(groups * most * (choices + choices // 2))
        self._experts(name, groups * most)
        live.take(most * model.hidden_size * self._element)

    def _all_to_all(self, name: str) -> None:
        live, model = self.live, self._model
        groups, tp = self._layout.ep_tp_groups, self._layout.tp
        row = model.hidden_size * self._element
        choices = model.num_experts_per_tok * _CHOICE_BYTES
        sent = -(-self.held // tp) * min(self._layout.ep - tp, model.num_experts_per_tok)
        arrived = max(self._group_tokens) * (groups - 1)
        live.take(sent * (8 + 8 + choices))  # tokens, rows, packed choices
        live.take(arrived * 2 * choices)
        live.touch(sent * row)
        live.take(arrived * row)
        with live.frame():
            live.take((self.held + arrived) * (row + choices))
            self._experts(name, self.held + arrived)
        live.take((self.held + arrived) * row)  # results of both
        live.take(sent * row)
        live.take(self.held * model.hidden_size * 4 + sent * model.hidden_size * 4)

    def _fused(self, name: str) -> None:
        sent = sent_tokens(self._layout, self._group_tokens)
        held = self._parameters[f"{name}.experts.gate_up"].shape[0]
        rows = sent * self._layout.ep * min(held, self._model.num_experts_per_tok)
        self.live.take(rows * self._model.hidden_size * self._element)
        gate_up, down = self._mlp_of(f"{name}.experts")
        self.ops.experts(rows, 1, gate_up, down)

    @property
    def _logit_bytes(self) -> int:
        tp = self._layout.tp
        padded = -(-self._model.vocab_size // tp) * tp
        return self.rows * padded * self._element

    def _logits(self) -> None:
        live, model, layout = self.live, self._model, self._layout
        live.enter("logits")
        row_bytes = self.rows * model.hidden_size * self._element
        x = live.take(row_bytes)
        live.take(row_bytes)
        self.ops.add_rms_norm(self.rows, model.hidden_size)
        live.give(x)
        if self._at.sp > 0:
            return
        name = "embed" if model.tie_word_embeddings else "head"
        self.ops.linear(self.rows, self._matrix(name))
        if layout.tp > 1:
            live.take(2 * self._logit_bytes)  # gathered rank after rank, and row after row

    def _matrix(self, name: str) -> Matrix:
        return Matrix.of(self._parameters[name])

    def _mlp_of(self, name: str) -> tuple[Matrix, Matrix]:
        return self._matrix(f"{name}.gate_up"), self._matrix(f"{name}.down")
