"""The largest message of each axis, and the HCCL buffers chosen for it. Imports no torch.

Pure arithmetic on config and layout. The mesh, the memory estimate and `--print-env` use it.

Every HCCL communicator takes twice its buffer from device memory, by default 2 × 200 MB, whatever
is sent. A message larger than the buffer travels in pieces.
"""

from __future__ import annotations

from moespan.config import DTYPE_BYTES, EngineConfig, ModelConfig
from moespan.parallel import fused

MB = 1 << 20
DEFAULT_BUFFER_MB = 200
"""The default of HCCL. More would need a measurement that shows a gain."""

DEFAULT_P2P_BUFFER_MB = 20

# HCCL's algorithms need some room, even for small messages.
_LEAST_BUFFER_MB = 16
_LEAST_P2P_BUFFER_MB = 2


def largest_messages(config: EngineConfig, model: ModelConfig) -> dict[str, int]:
    """Axis in use → bytes of its largest collective in a step of `max_num_batched_tokens`.

    For an all-gather or a reduce-scatter these are the bytes of the whole tensor, not of one rank's
    part. Steps that return the logits of whole prompts (`verify`) may carry more.
    """
    layout = config.layout
    element_bytes = DTYPE_BYTES[config.dtype]
    tokens = -(-config.max_num_batched_tokens // layout.sp)  # of a rank, outside attention
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
            # Each tp rank sends its part of the tokens, each token to at most K ranks.
            copies = min(model.num_experts_per_tok, layout.ep - layout.tp)
            found["ep"] = -(-hidden_bytes // layout.tp) * copies
        if config.moe_dispatch not in ("all_to_all", "fused"):
            found["ep_tp_groups"] = layout.ep_tp_groups * hidden_bytes
    if layout.pp > 1:
        found["pp"] = -(-hidden_bytes // layout.tp)
    return found


def group_buffers_mb(config: EngineConfig, model: ModelConfig) -> dict[str, int]:
    """Axis with collectives → MB of its groups' buffer. pp is absent: it only sends to peers."""
    return {
        axis: min(max(-(-message // MB), _LEAST_BUFFER_MB), DEFAULT_BUFFER_MB)
        for axis, message in largest_messages(config, model).items()
        if axis != "pp"
    }


def fused_buffer_mb(config: EngineConfig, model: ModelConfig) -> int:
    """MB of the buffer of the group that only the fused dispatch uses; 0 without that dispatch.

    The operators of an A2 read the size from HCCL_BUFFSIZE, so it is set there.
    """
    if config.moe_dispatch != "fused":
        return 0
    return max(-(-fused.buffer_bytes(config, model) // MB), _LEAST_BUFFER_MB)


def p2p_buffer_mb(config: EngineConfig, model: ModelConfig) -> int:
    """MB of the buffer between two stages; 0 with one stage."""
    message = largest_messages(config, model).get("pp")
    if message is None:
        return 0
    return min(max(-(-message // MB), _LEAST_P2P_BUFFER_MB), DEFAULT_P2P_BUFFER_MB)


def hccl_bytes(config: EngineConfig, model: ModelConfig) -> int:
    """Bytes of device memory for the communicators of the busiest rank: twice each buffer."""
    neighbours = min(config.layout.pp - 1, 2)
    groups_mb = sum(group_buffers_mb(config, model).values()) + fused_buffer_mb(config, model)
    return 2 * MB * (groups_mb + neighbours * p2p_buffer_mb(config, model))
