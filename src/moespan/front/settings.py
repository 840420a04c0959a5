"""Every option of a run, declared once: its name, default, check, and the meaning of `auto`.

`LLM(model, **options)`, the flags of the command line, and the verbs (`doctor`, `bench`, `verify`,
...) all make a `Settings` and `resolve` it, so that they judge and run the same configuration. A
new option is one field and one flag (`moespan.cli.flags`). The field goes into `EngineOptions` if
it reaches the ranks as given, and into `Settings` if it has to be resolved first.

Imports no torch by itself: `resolve` does, where it has to find out whether torch can use a device.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, NamedTuple

from moespan.checkpoint.experts import ExpertPlacement, expert_rule
from moespan.config import DTYPE_BYTES, EngineConfig, EngineOptions, Layout, ModelConfig, Nodes
from moespan.config.engine import check_choice
from moespan.device import DEVICES
from moespan.errors import ConfigError, shown
from moespan.front.hub import resolve as resolve_folder
from moespan.machine.device import choose_device, present_device

PYTHON_ONLY = frozenset({"seed", "silence_s"})
"""Fields of `Settings` that have no flag: `--seed` is the sampling parameter."""

FIELD_OF_AXIS = {
    "tp": "tensor_parallel_size",
    "ep": "expert_parallel_size",
    "pp": "pipeline_parallel_size",
    "sp": "sequence_parallel_size",
    "dp": "data_parallel_size",
}
"""Axis of a layout → the field of `Settings` with its degree."""


class Resolved(NamedTuple):
    """Resolved `Settings`: the model (None if none is named), the engine, and the nodes."""

    model_config: ModelConfig | None
    engine_config: EngineConfig
    nodes: Nodes


@dataclass(frozen=True)
class Settings(EngineOptions, Nodes):
    """Options that a user gives, with vLLM's names where the meaning is the same.

    `EngineOptions` and `Nodes` hold the other options. The fields declared here are:

    Attributes:
        model: checkpoint folder, or a name for the hub clients. None only if nothing is run, as
            when the doctor judges a machine without a model.
        tensor_parallel_size: ranks over which heads, widths and the vocabulary are split.
        expert_parallel_size: ranks over which whole routed experts are spread.
        pipeline_parallel_size: stages into which the layers are split.
        sequence_parallel_size: ranks over which the tokens of a step are split.
        data_parallel_size: replicas over which requests are spread.
        enable_expert_parallel: take the largest expert_parallel_size that the other sizes allow.
        pipeline_layers: layers of each stage; None cuts the layers by cost.
        expert_placement: which ep rank holds which experts: `contiguous`, `round_robin`, or the
            path of a JSON file.
        device: `auto`, `npu`, `cuda` or `cpu`.
        dtype: `float32`, `bfloat16`, `float16`, or `auto` for the checkpoint's.
        load_format: `auto`, `safetensors`, or `dummy` for random weights without a file (the folder
            then needs only a config.json).
        max_model_len: most tokens of one sequence; None is the model's own limit.
        max_num_seqs: most sequences in one step; None is 64, or as many as a step has tokens.
        block_size: tokens in one block of the KV cache; None is the device's default.
        trust_remote_code: always refused: no code from a checkpoint is ever run.
    """

    model: str | None = None
    _: KW_ONLY
    tensor_parallel_size: int = 1
    expert_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    sequence_parallel_size: int = 1
    data_parallel_size: int = 1
    enable_expert_parallel: bool = False
    pipeline_layers: Sequence[int] | None = None
    expert_placement: str = EngineConfig.expert_placement  # type: ignore[assignment]
    device: str = "auto"
    dtype: str = "auto"
    load_format: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    block_size: int | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.model, os.PathLike):
            object.__setattr__(self, "model", os.fspath(self.model))
        for field in fields(self):
            _check_type(field.name, getattr(self, field.name), str(field.type))
        EngineOptions.__post_init__(self)
        Nodes.__post_init__(self)
        if self.trust_remote_code:
            raise ConfigError(
                "trust_remote_code is refused: the model is built in, and code that comes with a "
                "checkpoint is never run"
            )
        check_choice("device", self.device, ("auto", *DEVICES))
        check_choice("dtype", self.dtype, ("auto", *DTYPE_BYTES))
        check_choice("load_format", self.load_format, ("auto", "safetensors", "dummy"))

    def with_layout(self, layout: Layout) -> Settings:
        """The same settings under another layout."""
        sizes: dict[str, Any] = {
            field: getattr(layout, axis) for axis, field in FIELD_OF_AXIS.items()
        }
        return replace(
            self, **sizes, enable_expert_parallel=False, pipeline_layers=layout.pipeline_layers
        )

    def in_float32(self) -> Settings:
        """The same settings in float32, without the options that only 16-bit dtypes have."""
        options = {option for device in DEVICES.values() for option in device.half_options}
        names = {"batch_invariant", *options} - {"moe_dispatch=fused"}
        changes: dict[str, Any] = {name: getattr(EngineOptions, name) for name in names}
        if self.moe_dispatch == "fused":
            changes |= {"moe_dispatch": "auto", "npu_hierarchical_dispatch": False}
        return replace(self, dtype="float32", **changes)

    def resolve(self, *, to_run: bool = True) -> Resolved:
        """Find the model, replace every `auto` and None, and check that all settings fit together.

        Args:
            to_run: whether the device must work here and now. If False, a named device is taken
                without a check, and `auto` is the device whose driver is on this machine.

        Raises:
            ConfigError, LayoutError: the first setting that cannot be used, and why.
        """
        folder = None if self.model is None else resolve_folder(self.model)
        model = None if folder is None else ModelConfig.from_pretrained(folder)
        device = choose_device(self.device) if to_run else self._judged_device
        config = EngineConfig(
            "" if folder is None else str(folder.resolve()),
            self._layout(model),
            device,
            dtype=self._dtype(model),
            load_format="safetensors" if self.load_format == "auto" else self.load_format,
            max_model_len=self._max_model_len(model),
            max_num_seqs=self._max_num_seqs,
            block_size=(DEVICES[device].block_size if self.block_size is None else self.block_size),
            expert_placement=expert_rule(self.expert_placement),
            **_inherited(self, EngineOptions),
        )
        if model is not None:
            check(config, model)
        return Resolved(model, config, Nodes(**_inherited(self, Nodes)))

    @property
    def _judged_device(self) -> str:
        return present_device() if self.device == "auto" else self.device

    @property
    def _max_num_seqs(self) -> int:
        if self.max_num_seqs is not None:
            return self.max_num_seqs
        return min(EngineConfig.max_num_seqs, self.max_num_batched_tokens)

    def _layout(self, model: ModelConfig | None) -> Layout:
        sizes = {axis: getattr(self, field) for axis, field in FIELD_OF_AXIS.items()}
        layout = Layout(**sizes, pipeline_layers=_tuple(self.pipeline_layers))
        if model is None or not self.enable_expert_parallel:
            return layout
        return layout.with_largest_ep(model)

    def _dtype(self, model: ModelConfig | None) -> str:
        if self.dtype != "auto":
            return self.dtype
        return EngineConfig.dtype if model is None else model.dtype

    def _max_model_len(self, model: ModelConfig | None) -> int:
        if self.max_model_len is not None:
            return self.max_model_len
        return EngineConfig.max_model_len if model is None else model.max_position_embeddings


# Part of an annotation of `Settings` → the types that it takes, and their name in an error.
_KINDS: dict[str, tuple[type, str]] = {
    "bool": (bool, "True or False"),
    "int": (Integral, "an integer"),
    "float": (Real, "a number"),
    "str": (str, "text"),
    "None": (type(None), "None"),
}


def _check_type(name: str, value: object, annotation: str) -> None:
    """Raise `ConfigError` unless `value` is of the type that a field of `Settings` declares."""
    kinds = annotation.split(" | ")
    if "Sequence[int]" in kinds and isinstance(value, list | tuple):
        if not all(_is_a(one, ["int"]) for one in value):
            raise ConfigError(f"{name}={shown(value)} must be a list of integers")
    elif not _is_a(value, kinds):
        words = [_KINDS[kind][1] for kind in kinds if kind in _KINDS]
        words += ["a list of integers"] * ("Sequence[int]" in kinds)
        raise ConfigError(f"{name}={shown(value)} must be {' or '.join(words)}")


def _is_a(value: object, kinds: Sequence[str]) -> bool:
    if isinstance(value, bool):  # Python counts it as an integer
        return "bool" in kinds
    return any(isinstance(value, _KINDS[kind][0]) for kind in kinds if kind in _KINDS)


def check(config: EngineConfig, model_config: ModelConfig) -> None:
    """Refuse an engine that the model cannot run on, before any rank is started.

    Raises:
        LayoutError: the layout does not fit the model, or the dispatch the layout.
        ConfigError: `max_model_len` or `expert_placement` does not fit the model.
    """
    config.check(model_config)
    ExpertPlacement.make(config.expert_placement, model_config, config.layout)


def _inherited(settings: Settings, base: type[Any]) -> dict[str, Any]:
    """The fields of `settings` that its base class `base` declares, with their values."""
    return {field.name: getattr(settings, field.name) for field in fields(base)}


def _tuple(layers: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if layers is None else tuple(layers)
