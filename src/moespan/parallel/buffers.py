"""How much one collective of each axis carries, and the buffers that HCCL gets for it.

Pure arithmetic on config and layout: the mesh, the memory estimate and what `--print-env` says
come from it. Imports no torch.

Every HCCL communicator takes twice its buffer from device memory, by default 2 × 200 MB, whatever
is sent. A message that is larger than the buffer travels in pieces.
"""

from __future__ import annotations

from moespan.config import DTYPE_BYTES, EngineConfig, ModelConfig
from moespan.parallel import fused

MB = 1 << 20
DEFAULT_BUFFER_MB = 200
"""HCCL's own; nothing gains from more unless it was measured."""

DEFAULT_P2P_BUFFER_MB = 20

# Small messages are not what a buffer is short for, and HCCL's algorithms want some room.
_LEAST_BUFFER_MB = 16
_LEAST_P2P_BUFFER_MB = 2


def largest_messages(config: EngineConfig, model: ModelConfig) -> dict[str, int]:
    """Axis in use → bytes of its largest collective in a step of `max_num_batched_tokens`.

    Of an all-gather or a reduce-scatter it is the whole, not one rank's part. Steps that return
    the logits of whole prompts (`verify`) may carry more.
    """
    layout = config.layout
    element_bytes = DTYPE_BYTES[config.dtype]
    tokens = -(-config.max_num_batched_tokens // layout.sp)  # that a rank holds between attentions
    hidden_bytes = tokens * model.hidden_size * element_bytes
    found: dict[str, int] = {}
    if layout.tp > 1:
        logits_bytes = config.max_num_seqs * model.vocab_size * 4
        found["tp"] = max(hidden_bytes, logits_bytes)
    if layout.sp > 1:
        queries = model.num_attention_heads // layout.tp
        keys = max(model.num_key_value_heads // (layout.tp * layout.sp), 1) * layout.sp
        found["sp"] = tokens * (queries + 2 * keys) * model.head_dim * element_bytes
    if layout.ep_tp_groups > 1:
        if config.moe_dispatch != "all_gather":
            # Each tp rank sends its part of the tokens, each to as many ranks as it has experts.
            copies = min(model.num_experts_per_tok, layout.ep - layout.tp)
            found["ep"] = -(-hidden_bytes // layout.tp) * copies
        if config.moe_dispatch not in ("all_to_all", "fused"):
            found["ep_tp_groups"] = layout.ep_tp_groups * hidden_bytes
    if layout.pp > 1:
        found["pp"] = -(-hidden_bytes // layout.tp)
    return found


def group_buffers_mb(config: EngineConfig, model: ModelConfig) -> dict[str, int]:
    """Axis with collectives → MB of its groups' buffer. pp has none: it only sends to peers."""
    return {
        axis: min(max(-(-message // MB), _LEAST_BUFFER_MB), DEFAULT_BUFFER_MB)
        for axis, message in largest_messages(config, model).items()
        if axis != "pp"
    }


def fused_buffer_mb(config: EngineConfig, model: ModelConfig) -> int:
    """MB of the buffer of the group that only the fused dispatch uses; 0 without it.

    An A2's operators read its size from HCCL_BUFFSIZE, so that it is set there.
    """
    if config.moe_dispatch != "fused":
        return 0
    return max(-(-fused.buffer_bytes(config, model) // MB), _LEAST_BUFFER_MB)


def p2p_buffer_mb(config: EngineConfig, model: ModelConfig) -> int:
    """MB of the buffer between two stages; 0 without stages."""
    message = largest_messages(config, model).get("pp")
    if message is None:
        return 0
    return min(max(-(-message // MB), _LEAST_P2P_BUFFER_MB), DEFAULT_P2P_BUFFER_MB)


def hccl_bytes(config: EngineConfig, model: ModelConfig) -> int:
    """Device memory that the communicators of the busiest rank take, twice each buffer."""
    neighbours = min(config.layout.pp - 1, 2)
    groups_mb = sum(group_buffers_mb(config, model).values()) + fused_buffer_mb(config, model)
    return 2 * MB * (groups_mb + neighbours * p2p_buffer_mb(config, model))
