"""Configuration of a run: the model's geometry, the layout, the engine's options, the nodes.

All of it is typed, checked, and free of torch, so that code that only plans or prints starts fast.
"""

from moespan.config.engine import (
    COLLECTIVE_TIMEOUT_S,
    DISPATCHES,
    WEIGHT_FORMATS,
    EngineConfig,
    EngineOptions,
    ExpertTable,
)
from moespan.config.layout import (
    Coordinates,
    Layout,
    all_layouts,
    balanced_stages,
    layer_cost,
    share_of_experts_read,
)
from moespan.config.model import DTYPE_BYTES, ModelConfig, read_json
from moespan.config.nodes import Nodes, is_wildcard
from moespan.config.schemes import (
    KV_CACHE_DTYPES,
    PACKED_SUFFIX,
    QUANTIZATIONS,
    SCALE_SUFFIX,
    SCHEMES,
    SHAPE_SUFFIX,
    QuantizationConfig,
    Scheme,
)

__all__ = [
    "COLLECTIVE_TIMEOUT_S",
    "DISPATCHES",
    "DTYPE_BYTES",
    "KV_CACHE_DTYPES",
    "PACKED_SUFFIX",
    "QUANTIZATIONS",
    "SCALE_SUFFIX",
    "SCHEMES",
    "SHAPE_SUFFIX",
    "WEIGHT_FORMATS",
    "Coordinates",
    "EngineConfig",
    "EngineOptions",
    "ExpertTable",
    "Layout",
    "ModelConfig",
    "Nodes",
    "QuantizationConfig",
    "Scheme",
    "all_layouts",
    "balanced_stages",
    "is_wildcard",
    "layer_cost",
    "read_json",
    "share_of_experts_read",
]
