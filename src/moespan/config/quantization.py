"""Weights as 8-bit integers: the schemes, and how a checkpoint says that it holds them.

The words are those of compressed-tensors (`quantization_config` of `config.json`), which vLLM and
llm-compressor read and write: format `int-quantized`, 8 bits, symmetric, one scale for each output
channel; activations, if they are rounded, anew for each token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from moespan.errors import ConfigError

QUANTIZATIONS = ("int8", "w8a8")
"""`int8`: weights alone (W8A16). `w8a8`: the same weights, and what they are multiplied with."""

KV_CACHE_DTYPES = ("auto", "int8")
"""`auto`: the engine's dtype. `int8`: with a float32 scale for each token and head."""

SCALE_SUFFIX = "_scale"
"""What the name of a tensor of integers gains to name its scales."""

_HEAD, _ROUTER = "lm_head", "re:.*mlp.gate$"
# A pattern of `ignore` is run on every module's name, so it may only be one that ends soon.
_PATTERN = re.compile(r"\^?(?:[\w.]|\\\.|\.\*)*\$?")
_MOST_WILDCARDS = 3


@dataclass(frozen=True)
class QuantizationConfig:
    """Which matrices are integers, and what is done to what they are multiplied with.

    Attributes:
        scheme: one of `QUANTIZATIONS`.
        ignore: names of modules, and patterns after `re:`, whose weights are left as they were.
    """

    scheme: str
    ignore: tuple[str, ...] = ()

    @classmethod
    def of(cls, scheme: str) -> QuantizationConfig:
        """What this engine makes of a model: of all linear layers but the router, and with W8A8 but
        the head, as the published recipes have it, so that the checkpoint can be read elsewhere."""
        return cls(scheme, (_ROUTER, *((_HEAD,) if scheme == "w8a8" else ())))

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
        _demand(
            raw, quant_method=("compressed-tensors",), format=("int-quantized",),
            kv_cache_scheme=(None,),
        )  # fmt: skip
        groups = raw.get("config_groups")
        if not isinstance(groups, dict) or len(groups) != 1:
            raise ConfigError("quantization_config: config_groups must be an object of one group")
        (group,) = groups.values()
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            raise ConfigError("quantization_config: the group has no weights")
        _demand(group, targets=(["Linear"],), output_activations=(None,))
        _demand(group["weights"], **_INTEGERS, strategy=("channel",), dynamic=(False, None))
        activations = group.get("input_activations")
        if activations is not None:
            if not isinstance(activations, dict):
                raise ConfigError("quantization_config: input_activations must be an object")
            _demand(activations, **_INTEGERS, strategy=("token",), dynamic=(True,))
        ignore = raw.get("ignore") or []
        if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
            raise ConfigError(f"quantization_config: ignore={ignore!r} must be a list of names")
        for name in ignore:
            _check_pattern(name)
        return cls("int8" if activations is None else "w8a8", tuple(ignore))

    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config` that `from_dict` reads, with all keys that others expect."""

        def integers(strategy: str, dynamic: bool) -> dict[str, Any]:
            return {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": strategy,
                "dynamic": dynamic,
                "group_size": None,
                "block_structure": None,
                "actorder": None,
                "observer": None if dynamic else "minmax",
                "observer_kwargs": {},
            }

        group = {
            "targets": ["Linear"],
            "weights": integers("channel", dynamic=False),
            "input_activations": integers("token", dynamic=True) if self.scheme == "w8a8" else None,
            "output_activations": None,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(self.ignore),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def holds(self, module: str) -> bool:
        """Whether the weight of `module`, a linear layer by its HF name, is stored as integers."""
        return not any(
            re.match(name.removeprefix("re:"), module)
            if name.startswith("re:")
            else name in (module, "Linear")
            for name in self.ignore
        )


_INTEGERS: dict[str, tuple[Any, ...]] = {
    "num_bits": (8,),
    "type": ("int",),
    "symmetric": (True,),
    "group_size": (None,),
    "actorder": (None,),
}


def _demand(raw: Mapping[str, Any], **implemented: tuple[Any, ...]) -> None:
    """Refuse by name whatever is not implemented."""
    for key, values in implemented.items():
        found = raw.get(key)
        if not any(type(found) is type(value) and found == value for value in values):
            raise ConfigError(
                f"quantization_config: {key}={found!r} is not implemented; only "
                f"{' or '.join(repr(value) for value in values)} is (int-quantized, 8 bits, "
                "symmetric, weights per channel, activations per token or not at all)"
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
