"""Limits of the NPU operators that communicate and compute in one kernel.

| option                   | operators                            | what they replace             |
|--------------------------|--------------------------------------|-------------------------------|
| `moe_dispatch=fused`     | `npu_moe_distribute_dispatch_v2` and | the `all_to_all`s of a step,  |
|                          | `npu_moe_distribute_combine_v2`      | and the wait for their sizes  |
| `npu_fused_all_reduce=R` | `npu_mm_all_reduce_base`             | a matmul and its all-reduce,  |
|                          |                                      | in steps of R rows or more    |

The limits are checked before weights are loaded. They come from the operators' pages in
Ascend/op-plugin (docs/zh/custom_APIs/torch_npu). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moespan.checkpoint.experts import ExpertPlacement
from moespan.config import EngineConfig, Layout, ModelConfig
from moespan.errors import ConfigError

MOST_TOKENS = 256
"""Most tokens that a rank may send to experts at once. An A3 takes 512; no step needs them."""

_MOST_CHOSEN, _MOST_EXPERTS = 16, 1024
_ALL_REDUCE_RANKS = (2, 4, 8)
_A2, _A3 = "910B", "910C"


@dataclass(frozen=True)
class _Limits:
    """Limits of the fused dispatch on one kind of chip: ranks of the ep group, hidden sizes."""

    ranks: Sequence[int]
    hidden_sizes: Sequence[int]


_DISPATCH = {
    _A2: _Limits((*range(2, 9), 16, 32, 64, 128, 256), range(32, 7168 + 1, 32)),
    _A3: _Limits(range(2, 768 + 1), range(1024, 8192 + 1)),
}
# With `npu_hierarchical_dispatch`, which needs a driver of 25.0.RC1.1 or later.
_HIERARCHICAL_DISPATCH = {_A2: _Limits((16, 32, 64), range(32, 10240 + 1, 32))}


def sent_tokens(layout: Layout, group_tokens: Sequence[int]) -> int:
    """Tokens that every rank of an ep group sends in a step: those of the rank with most."""
    return max(-(-tokens // layout.tp) for tokens in group_tokens)


def buffer_bytes(config: EngineConfig, model: ModelConfig) -> int:
    """Bytes of the buffer that the fused dispatch needs for steps of `max_num_batched_tokens`.

    For S tokens of a rank and E experts on it, an A2 needs 2·(S·ep·min(E, K)·2H + 2 MB), an A3
    2·(S·ep·E·(2H + 64) + K·S·2H) with 2H + 64 and 2H each rounded up to 512 bytes. The result is
    the larger of the two. With `npu_hierarchical_dispatch` an A2 needs (N + ep/4)·S·(2H + 16·K)
    + 8 MB instead, N being all experts, K rounded up to 8 and the bytes of S rows to 512.
    """
    layout = config.layout
    held_tokens = -(-config.max_num_batched_tokens // layout.sp)
    sent = min(sent_tokens(layout, [held_tokens]), MOST_TOKENS)
    experts = -(-(model.n_routed_experts or 0) // layout.ep)
    row, chosen = 2 * model.hidden_size, model.num_experts_per_tok
    if config.npu_hierarchical_dispatch:
        rows = _aligned(sent * (row + 4 * 4 * (-(-chosen // 8) * 8)))
        return (layout.ep * experts + layout.ep // 4) * rows + (8 << 20)
    a2 = sent * layout.ep * min(experts, chosen) * row + (2 << 20)
    a3 = sent * layout.ep * experts * _aligned(row + 64) + chosen * sent * _aligned(row)
    return 2 * max(a2, a3)


def check(
    config: EngineConfig,
    model: ModelConfig,
    experts: ExpertPlacement,
    chip: str,
    ranks_here: int,
    hccl_buffer_mb: int,
) -> None:
    """Refuse an option that its operators cannot serve.

    Args:
        experts: which ep rank holds which experts.
        chip: `910B` (A2), `910C` (A3), `310P`, or empty.
        ranks_here: ranks on this node.
        hccl_buffer_mb: MB of a group's default buffer.

    Raises:
        ConfigError: with the option, all limits that it breaks, and the fix.
    """
    if config.moe_dispatch == "fused":
        needed_mb = -(-buffer_bytes(config, model) >> 20)
        problems = list(_against_dispatch(config, model, experts, chip))
        if hccl_buffer_mb < needed_mb:
            problems.append(f"it needs HCCL_BUFFSIZE={needed_mb} or more, not {hccl_buffer_mb}")
        _refuse("moe_dispatch=fused", problems, "use all_gather, all_to_all or auto")
    if config.npu_fused_all_reduce:
        problems = list(_against_all_reduce(config, model, chip, ranks_here))
        option = f"npu_fused_all_reduce={config.npu_fused_all_reduce}"
        _refuse(option, problems, "leave it out")


def _against_dispatch(
    config: EngineConfig, model: ModelConfig, experts: ExpertPlacement, chip: str
) -> Iterator[str]:
    layout, how = config.layout, ""
    limits, chips = _DISPATCH.get(chip), "A2 and A3"
    if config.npu_hierarchical_dispatch:
        how = "with npu_hierarchical_dispatch "
        limits, chips = _HIERARCHICAL_DISPATCH.get(chip), "A2"
    if limits is None:
        yield f"{how}it is for {chips}, not {chip or 'this device'}"
        return
    if layout.ep not in limits.ranks:
        yield f"{how}on {chip} it takes ep={_words(limits.ranks)}, not {layout.ep}"
    if model.hidden_size not in limits.hidden_sizes:
        yield f"on {chip} it takes a hidden_size of {_words(limits.hidden_sizes)}, not " + str(
            model.hidden_size
        )
    if model.num_experts_per_tok > _MOST_CHOSEN:
        yield f"it takes {_MOST_CHOSEN} experts per token at most, not {model.num_experts_per_tok}"
    for layer in filter(model.is_moe, range(model.num_hidden_layers)):
        held = [len(one) for one in experts.of(layer)]
        if len(set(held)) > 1:
            yield f"it needs equally many experts on each ep rank, and layer {layer} has {held}"
            break
        if sum(held) > _MOST_EXPERTS:
            yield f"it takes {_MOST_EXPERTS} experts at most, and layer {layer} has {sum(held)}"
            break


def _against_all_reduce(
    config: EngineConfig, model: ModelConfig, chip: str, ranks_here: int
) -> Iterator[str]:
    tp = config.layout.tp
    if config.quantization or model.quantization:
        yield "it takes matrices of 16-bit types, not of integers"
    if chip != _A2:
        yield f"it is for A2, not {chip or 'this device'}"
    if tp not in _ALL_REDUCE_RANKS:
        yield f"it takes tp={_words(_ALL_REDUCE_RANKS)}, not {tp}"
    elif ranks_here % tp:
        yield f"it works inside one server, and tp={tp} crosses nodes of {ranks_here} ranks"
    if config.moe_dispatch == "fused":
        yield "all fused operators of a process share one group, and moe_dispatch=fused has another"


def _refuse(option: str, problems: Sequence[str], fix: str) -> None:
    if problems:
        raise ConfigError(f"{option} does not work here: {'; '.join(problems)}; {fix}")


def _words(sizes: Sequence[int]) -> str:
    if isinstance(sizes, range):
        step = f", in steps of {sizes.step}" if sizes.step > 1 else ""
        return f"{sizes[0]} to {sizes[-1]}{step}"
    return ", ".join(map(str, sizes))


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 512) * 512
