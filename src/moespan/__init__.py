"""moespan: DeepSeek-MoE from its original checkpoints, under parallel layouts.

The public names are imported when they are first used, so that the command line starts fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = [
    "LLM",
    "CompletionOutput",
    "ModelConfig",
    "MoespanError",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
]

if TYPE_CHECKING:
    from moespan.config import ModelConfig
    from moespan.engine.request import SamplingParams
    from moespan.errors import MoespanError
    from moespan.front.llm import LLM
    from moespan.front.outputs import CompletionOutput, RequestOutput
    from moespan.text.grammar import StructuredOutputsParams
    from moespan.version import __version__


def __getattr__(name: str) -> object:
    if name == "LLM":
        from moespan.front.llm import LLM

        return LLM
    if name == "SamplingParams":
        from moespan.engine.request import SamplingParams

        return SamplingParams
    if name == "StructuredOutputsParams":
        from moespan.text.grammar import StructuredOutputsParams

        return StructuredOutputsParams
    if name == "ModelConfig":
        from moespan.config import ModelConfig

        return ModelConfig
    if name == "MoespanError":
        from moespan.errors import MoespanError

        return MoespanError
    if name in ("CompletionOutput", "RequestOutput"):
        from moespan.front import outputs

        return getattr(outputs, name)
    if name == "__version__":
        from moespan.version import __version__

        return __version__
    raise AttributeError(f"module 'moespan' has no attribute {name!r}")
