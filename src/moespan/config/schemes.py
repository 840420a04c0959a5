"""Schemes that hold weights in 8 or 4 bits, and how `config.json` declares them.

A checkpoint declares its scheme under `quantization_config`, in the format of compressed-tensors,
which vLLM and llm-compressor read and write. All schemes are symmetric. Three formats are known:

- `int-quantized` and `float-quantized`: 8 bits and one scale for each output channel. Activations
  that are rounded get a new scale for each token.
- `pack-quantized`: 4-bit integers and one scale for each group of 32 along the input.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from moespan.errors import ConfigError, shown

SCALE_BYTES = 4
"""Bytes of the scale of a whole row, which is float32."""

# The scale of a group is bfloat16.
_GROUP_SCALE_BYTES = 2


@dataclass(frozen=True)
class Scheme:
    """How weights, and the activations that multiply them, are rounded.

    Attributes:
        dtype: torch's name of the weights' dtype.
        activation_bits: 8 if activations are rounded to `dtype` too; 16 if they are not rounded.
        format: compressed-tensors' name of the checkpoint format.
        number_type: compressed-tensors' `type` of the numbers, `int` or `float`.
        weight_bits: bits of one weight.
        group_size: neighbours in a row that share one bfloat16 scale; None is one float32 scale for
            the whole row.
        head: scheme for a head that the checkpoint holds as floats; None leaves the head in floats.
    """

    dtype: str
    activation_bits: int
    format: str
    number_type: str
    weight_bits: int = 8
    group_size: int | None = None
    head: str | None = None

    @property
    def storage(self) -> str:
        """Torch's name of the dtype of the tensor that holds the weights; 4 bits are packed."""
        return "int32" if self.weight_bits < 8 else self.dtype

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of `width` weights, scales included."""
        groups = self.group_size and width // self.group_size
        scale_bytes = SCALE_BYTES if groups is None else groups * _GROUP_SCALE_BYTES
        return width * self.weight_bits // 8 + scale_bytes


SCHEMES = {
    "int8": Scheme("int8", 16, "int-quantized", "int"),
    "w8a8": Scheme("int8", 8, "int-quantized", "int", head="int8"),
    "fp8": Scheme("float8_e4m3fn", 8, "float-quantized", "float"),
    "int4": Scheme("int4", 16, "pack-quantized", "int", weight_bits=4, group_size=32, head="int8"),
}
QUANTIZATIONS = tuple(SCHEMES)

KV_CACHE_DTYPES = ("auto", "int8")
"""`auto` is the engine's dtype; `int8` adds a float32 scale for each token and head."""

SCALE_SUFFIX = "_scale"
"""Suffix that turns the name of a quantised tensor into the name of its scales."""

PACKED_SUFFIX, SHAPE_SUFFIX = "_packed", "_shape"
"""Suffixes of a tensor of 4 bits: its integers, eight to an int32, and its unpacked shape."""

_HEAD, _ROUTER = "lm_head", "re:.*mlp.gate$"
# A pattern of `ignore` is matched against the name of every module. Patterns that could backtrack
# for long are refused.
_PATTERN = re.compile(r"\^?(?:[\w.]|\\\.|\.\*)*\$?")
_RE = "re:"
_MOST_WILDCARDS, _MOST_PATTERNS = 3, 64


@dataclass(frozen=True)
class QuantizationConfig:
    """Which matrices are quantised, and how.

    Attributes:
        scheme: one of `QUANTIZATIONS`.
        ignore: names of modules, and patterns after `re:`, whose weights stay unquantised.
    """

    scheme: str
    ignore: tuple[str, ...] = ()

    @classmethod
    def of(cls, scheme: str) -> QuantizationConfig:
        """The matrices that this engine quantises when it makes `scheme` from floats.

        These are all linear layers except the router. The head is left out too where activations
        are rounded or weights have 4 bits. The published recipes do the same, so that other engines
        can read the checkpoint.
        """
        own = SCHEMES[scheme]
        leaves_head = own.activation_bits == 8 or own.weight_bits < 8
        return cls(scheme, (_ROUTER, *((_HEAD,) if leaves_head else ())))

    @property
    def same_weights(self) -> tuple[str, ...]:
        """Schemes that run with the weights exactly as the checkpoint holds them."""
        dtype = SCHEMES[self.scheme].dtype
        return tuple(name for name, scheme in SCHEMES.items() if scheme.dtype == dtype)

    def running_as(self, wanted: str | None) -> str:
        """The scheme in which the checkpoint runs: `wanted`, or its own if `wanted` is None.

        Raises:
            ConfigError: the weights of `wanted` are not those that the checkpoint holds.
        """
        if wanted not in (None, *self.same_weights):
            raise ConfigError(
                f"quantization={wanted}: the checkpoint holds weights of {self.scheme}, which can "
                f"be run as {' or '.join(self.same_weights)} only; use the checkpoint that it was "
                "made from"
            )
        return wanted or self.scheme

    def with_ignored_head(self) -> QuantizationConfig:
        """The same matrices except the head."""
        return replace(self, ignore=tuple(dict.fromkeys((*self.ignore, _HEAD))))

    @classmethod
    def from_dict(cls, raw: Any) -> QuantizationConfig:
        """Read a `quantization_config`.

        Raises:
            ConfigError: `raw` is malformed, or asks for something that is not implemented.
        """
        if not isinstance(raw, dict):
            raise ConfigError(f"quantization_config={shown(raw)} must be an object")
        formats = tuple(dict.fromkeys(scheme.format for scheme in SCHEMES.values()))
        _require(raw, quant_method=("compressed-tensors",), format=formats, kv_cache_scheme=(None,))
        scheme = _scheme_of(_only_group(raw), raw["format"])
        ignore = raw.get("ignore") or []
        if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
            raise ConfigError(
                f"quantization_config: ignore={shown(ignore)} must be a list of names"
            )
        _check_patterns([name for name in ignore if name.startswith(_RE)])
        return cls(scheme, tuple(ignore))

    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config` that `from_dict` reads, with every key that others expect."""
        scheme = SCHEMES[self.scheme]
        rounds_activations = scheme.activation_bits == 8
        group = {
            "targets": ["Linear"],
            "weights": _entry(_weights(scheme), dynamic=False),
            "input_activations": _entry(_activations(scheme), dynamic=True)
            if rounds_activations
            else None,
            "output_activations": None,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": scheme.format,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(self.ignore),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def holds(self, module: str) -> bool:
        """Whether the weight of the linear layer with the HF name `module` is quantised."""
        if self._ignored_names & {module, "Linear"}:
            return False
        return not any(pattern.match(module) for pattern in self._ignored_patterns)

    @functools.cached_property
    def _ignored_names(self) -> frozenset[str]:
        return frozenset(self.ignore)

    @functools.cached_property
    def _ignored_patterns(self) -> list[re.Pattern[str]]:
        return [re.compile(name[len(_RE) :]) for name in self.ignore if name.startswith(_RE)]


def _only_group(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The one entry of `config_groups`."""
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise ConfigError("quantization_config: config_groups must be an object of one group")
    (group,) = groups.values()
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise ConfigError("quantization_config: the group has no weights")
    _require(group, targets=(["Linear"],), output_activations=(None,))
    return group


def _scheme_of(group: Mapping[str, Any], format_: str) -> str:
    """The scheme of a group of a checkpoint whose format is `format_`."""
    schemes = {name: one for name, one in SCHEMES.items() if one.format == format_}
    first = next(iter(schemes.values()))
    _require(group["weights"], **_weights(first), dynamic=(False, None))
    activations = group.get("input_activations")
    bits = 16
    if activations is not None:
        if not isinstance(activations, dict):
            raise ConfigError("quantization_config: input_activations must be an object")
        _require(activations, **_activations(first), dynamic=(True,))
        bits = 8
    scheme = next((name for name in schemes if schemes[name].activation_bits == bits), None)
    if scheme is None:
        raise ConfigError(
            f"quantization_config: format={format_!r} "
            f"{'without' if bits == 16 else 'with'} input_activations is not implemented"
        )
    return scheme


def _weights(scheme: Scheme) -> dict[str, tuple[Any, ...]]:
    """Key of compressed-tensors → its implemented values, for the weights of `scheme`."""
    return {
        "num_bits": (scheme.weight_bits,),
        "type": (scheme.number_type,),
        "symmetric": (True,),
        "strategy": ("channel" if scheme.group_size is None else "group",),
        "group_size": (scheme.group_size,),
        "actorder": (None,),
    }


def _activations(scheme: Scheme) -> dict[str, tuple[Any, ...]]:
    """Key of compressed-tensors → its implemented values, for rounded activations."""
    return {**_weights(scheme), "num_bits": (8,), "strategy": ("token",), "group_size": (None,)}


def _entry(implemented: Mapping[str, tuple[Any, ...]], dynamic: bool) -> dict[str, Any]:
    """The object that declares weights or activations in a group of `config_groups`."""
    return {
        **{key: value for key, (value,) in implemented.items()},
        "dynamic": dynamic,
        "block_structure": None,
        "observer": None if dynamic else "minmax",
        "observer_kwargs": {},
    }


def _require(raw: Mapping[str, Any], **implemented: tuple[Any, ...]) -> None:
    """Raise `ConfigError` for the first key whose value is not implemented."""
    for key, values in implemented.items():
        found = raw.get(key)
        if not any(type(found) is type(value) and found == value for value in values):
            raise ConfigError(
                f"quantization_config: {key}={shown(found)} is not implemented; only "
                f"{' or '.join(repr(value) for value in values)} is (int-quantized or "
                "float-quantized, 8 bits, symmetric, weights per channel, activations per token; "
                "int-quantized also without rounded activations; pack-quantized, 4 bits, "
                "symmetric, weights in groups of 32)"
            )


def _check_patterns(names: list[str]) -> None:
    """Refuse patterns of `ignore` that are more than letters, dots and a few `.*`, or many."""
    if len(names) > _MOST_PATTERNS:
        raise ConfigError(
            f"quantization_config: ignore has {len(names)} patterns; at most {_MOST_PATTERNS} are "
            "read; name the modules instead"
        )
    for name in names:
        pattern = name[len(_RE) :]
        if not _PATTERN.fullmatch(pattern) or pattern.count("*") > _MOST_WILDCARDS:
            raise ConfigError(
                f"quantization_config: the pattern {shown(name)} in ignore is refused: only "
                f"letters, dots and at most {_MOST_WILDCARDS} of .* are read; name the modules "
                "instead"
            )
