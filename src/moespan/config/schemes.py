"""Weights of 8 and of 4 bits: the schemes, and how a checkpoint says that it holds them.

The words are those of compressed-tensors (`quantization_config` of `config.json`), which vLLM and
llm-compressor read and write: formats `int-quantized` and `float-quantized`, 8 bits, symmetric, one
scale for each output channel, activations, if they are rounded, anew for each token; and
`pack-quantized`, integers of 4 bits, symmetric, one scale for each group of 32 along the input.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from moespan.errors import ConfigError

SCALE_BYTES = 4
"""Scales of rows are float32."""

_GROUP_SCALE_BYTES = 2


@dataclass(frozen=True)
class Scheme:
    """What becomes of weights, and of what they are multiplied with.

    Attributes:
        dtype: of weights, as torch calls it.
        activation_bits: 8 where activations are rounded to the same dtype; 16 where they stay.
        format: of a checkpoint, as compressed-tensors calls it.
        number_type: `int` or `float`, its word for what `num_bits` are.
        weight_bits: of each number.
        group_size: how many neighbours of a row have one scale, which is bfloat16 then; None is a
            float32 scale for the whole row.
        head: the scheme of a head that the checkpoint holds as floats; None leaves it so.
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
        """The dtype of the tensor that holds weights, as torch calls it: 4 bits are packed."""
        return "int32" if self.weight_bits < 8 else self.dtype

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of `width` with its scales."""
        groups = self.group_size and width // self.group_size
        scale_bytes = SCALE_BYTES if groups is None else groups * _GROUP_SCALE_BYTES
        return width * self.weight_bits // 8 + scale_bytes


SCHEMES = {
    "int8": Scheme("int8", 16, "int-quantized", "int"),
    "w8a8": Scheme("int8", 8, "int-quantized", "int"),
    "fp8": Scheme("float8_e4m3fn", 8, "float-quantized", "float"),
    "int4": Scheme("int4", 16, "pack-quantized", "int", weight_bits=4, group_size=32, head="int8"),
}
QUANTIZATIONS = tuple(SCHEMES)

KV_CACHE_DTYPES = ("auto", "int8")
"""`auto`: the engine's dtype. `int8`: with a float32 scale for each token and head."""

SCALE_SUFFIX = "_scale"
"""What the name of a quantised tensor gains to name its scales."""

PACKED_SUFFIX, SHAPE_SUFFIX = "_packed", "_shape"
"""What it gains, of 4 bits, to name its integers, eight to an int32, and the shape that it has."""

_HEAD, _ROUTER = "lm_head", "re:.*mlp.gate$"
# A pattern of `ignore` is run on every module's name, so it may only be one that ends soon.
_PATTERN = re.compile(r"\^?(?:[\w.]|\\\.|\.\*)*\$?")
_MOST_WILDCARDS = 3


@dataclass(frozen=True)
class QuantizationConfig:
    """Which matrices are quantised, and how.

    Attributes:
        scheme: one of `QUANTIZATIONS`.
        ignore: names of modules, and patterns after `re:`, whose weights are left as they were.
    """

    scheme: str
    ignore: tuple[str, ...] = ()

    @classmethod
    def of(cls, scheme: str) -> QuantizationConfig:
        """What this engine makes of a model: of all linear layers but the router, and where
        activations are rounded or weights have 4 bits but the head, as the published recipes have
        it, so that the checkpoint can be read elsewhere."""
        own = SCHEMES[scheme]
        leaves_head = own.activation_bits == 8 or own.weight_bits < 8
        return cls(scheme, (_ROUTER, *((_HEAD,) if leaves_head else ())))

    @property
    def same_weights(self) -> tuple[str, ...]:
        """Schemes whose weights are those that are stored."""
        dtype = SCHEMES[self.scheme].dtype
        return tuple(name for name, scheme in SCHEMES.items() if scheme.dtype == dtype)

    def running_as(self, wanted: str | None) -> str:
        """The scheme in which what is stored is run: its own, or `wanted` if the weights are the
        same in both.

        Raises:
            ConfigError: they are not.
        """
        if wanted not in (None, *self.same_weights):
            raise ConfigError(
                f"quantization={wanted}: the checkpoint holds weights of {self.scheme}, which can "
                f"be run as {' or '.join(self.same_weights)} only; use the one that it was made "
                "from"
            )
        return wanted or self.scheme

    def with_ignored_head(self) -> QuantizationConfig:
        """The same, but for the head."""
        return replace(self, ignore=tuple(dict.fromkeys((*self.ignore, _HEAD))))

    @classmethod
    def from_dict(cls, raw: Any) -> QuantizationConfig:
        """Read a `quantization_config`.

        Raises:
            ConfigError: it is none, or asks for what is not implemented.
        """
        if not isinstance(raw, dict):
            raise ConfigError(f"quantization_config={raw!r} must be an object")
        formats = tuple(dict.fromkeys(scheme.format for scheme in SCHEMES.values()))
        _demand(raw, quant_method=("compressed-tensors",), format=formats, kv_cache_scheme=(None,))
        schemes = {name: one for name, one in SCHEMES.items() if one.format == raw["format"]}
        first = next(iter(schemes.values()))
        groups = raw.get("config_groups")
        if not isinstance(groups, dict) or len(groups) != 1:
            raise ConfigError("quantization_config: config_groups must be an object of one group")
        (group,) = groups.values()
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            raise ConfigError("quantization_config: the group has no weights")
        _demand(group, targets=(["Linear"],), output_activations=(None,))
        _demand(group["weights"], **_weights(first), dynamic=(False, None))
        activations = group.get("input_activations")
        bits = 16
        if activations is not None:
            if not isinstance(activations, dict):
                raise ConfigError("quantization_config: input_activations must be an object")
            _demand(activations, **_activations(first), dynamic=(True,))
            bits = 8
        scheme = next((name for name in schemes if schemes[name].activation_bits == bits), None)
        if scheme is None:
            raise ConfigError(
                f"quantization_config: format={raw['format']!r} "
                f"{'without' if bits == 16 else 'with'} input_activations is not implemented"
            )
        ignore = raw.get("ignore") or []
        if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
            raise ConfigError(f"quantization_config: ignore={ignore!r} must be a list of names")
        for name in ignore:
            _check_pattern(name)
        return cls(scheme, tuple(ignore))

    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config` that `from_dict` reads, with all keys that others expect."""

        scheme = SCHEMES[self.scheme]

        def numbers(kind: dict[str, tuple[Any, ...]], dynamic: bool) -> dict[str, Any]:
            return {
                **{key: value for key, (value,) in kind.items()},
                "dynamic": dynamic,
                "block_structure": None,
                "observer": None if dynamic else "minmax",
                "observer_kwargs": {},
            }

        group = {
            "targets": ["Linear"],
            "weights": numbers(_weights(scheme), dynamic=False),
            "input_activations": numbers(_activations(scheme), dynamic=True)
            if scheme.activation_bits == 8
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
        """Whether the weight of `module`, a linear layer by its HF name, is stored quantised."""
        return not any(
            re.match(name.removeprefix("re:"), module)
            if name.startswith("re:")
            else name in (module, "Linear")
            for name in self.ignore
        )


def _weights(scheme: Scheme) -> dict[str, tuple[Any, ...]]:
    """What is implemented of a scheme's weights, in compressed-tensors' words."""
    return {
        "num_bits": (scheme.weight_bits,),
        "type": (scheme.number_type,),
        "symmetric": (True,),
        "strategy": ("channel" if scheme.group_size is None else "group",),
        "group_size": (scheme.group_size,),
        "actorder": (None,),
    }


def _activations(scheme: Scheme) -> dict[str, tuple[Any, ...]]:
    """What is implemented of activations that are rounded."""
    return {**_weights(scheme), "num_bits": (8,), "strategy": ("token",), "group_size": (None,)}


def _demand(raw: Mapping[str, Any], **implemented: tuple[Any, ...]) -> None:
    """Refuse by name whatever is not implemented."""
    for key, values in implemented.items():
        found = raw.get(key)
        if not any(type(found) is type(value) and found == value for value in values):
            raise ConfigError(
                f"quantization_config: {key}={found!r} is not implemented; only "
                f"{' or '.join(repr(value) for value in values)} is (int-quantized or "
                "float-quantized, 8 bits, symmetric, weights per channel, activations per token; "
                "int-quantized also without these; pack-quantized, 4 bits, symmetric, weights in "
                "groups of 32)"
            )


def _check_pattern(name: str) -> None:
    if not name.startswith("re:"):
        return
    pattern = name.removeprefix("re:")
    if not _PATTERN.fullmatch(pattern) or pattern.count("*") > _MOST_WILDCARDS:
        raise ConfigError(
            f"quantization_config: the pattern {name!r} in ignore is refused: only letters, dots "
            f"and at most {_MOST_WILDCARDS} of .* are read; name the modules instead"
        )
