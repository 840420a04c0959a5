"""Which ep rank holds which routed experts: a table for each layer, by rule or from a file.

An expert may have copies on several ranks; its tokens then take turns on the copies. Each copy is a
*physical expert*; physical experts are numbered from 0, rank after rank. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moespan.config import ExpertTable, Layout, ModelConfig, read_json
from moespan.errors import ConfigError, shown

RULES = ("contiguous", "round_robin")

_LAYER = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True)
class ExpertPlacement:
    """The experts of every ep rank; `default` applies to layers that `layers` does not name."""

    default: tuple[tuple[int, ...], ...]
    layers: Mapping[int, tuple[tuple[int, ...], ...]]

    def of(self, layer: int) -> tuple[tuple[int, ...], ...]:
        """For each ep rank, the experts of `layer` that it holds, in the order of their physical
        ids."""
        return self.layers.get(layer, self.default)

    @classmethod
    def make(cls, how: str | ExpertTable, config: ModelConfig, layout: Layout) -> ExpertPlacement:
        """Build from a rule of `RULES` or from a table.

        Contiguous gives each rank the next E/ep experts; if ep does not divide E, the first ranks
        hold one more. Round-robin gives rank r the experts r, r + ep, ...

        Raises:
            ConfigError: the table leaves an expert out, or does not fit the model or the layout.
        """
        experts, ep = config.n_routed_experts or 0, layout.ep
        if isinstance(how, str):
            rules = {
                "contiguous": [range(experts)[_part(experts, ep, r)] for r in range(ep)],
                "round_robin": [range(r, experts, ep) for r in range(ep)],
            }
            return cls(tuple(map(tuple, rules[how])), {})
        contiguous = cls.make("contiguous", config, layout).default
        tables = {name: tuple(map(tuple, ranks)) for name, ranks in how.items()}
        for name, table in tables.items():
            _check(name, table, config, ep)
        layers = {int(name): table for name, table in tables.items() if name != "default"}
        return cls(tables.get("default", contiguous), layers)


def expert_rule(text: str) -> str | ExpertTable:
    """The argument of `ExpertPlacement.make`, from a rule's name or the path of a JSON file."""
    return text if text in RULES else _read_table(Path(text))


def _read_table(path: Path) -> ExpertTable:
    """Read `{"default": [[experts of ep rank 0], ...], "5": [...]}`.

    `default` is the table of all layers; a number is the table of one layer.

    Raises:
        ConfigError: the file does not have this form.
    """
    if not path.exists():
        raise ConfigError(f"expert placement {path} is neither {' nor '.join(RULES)} nor a file")
    raw = read_json(path)
    for name, table in raw.items():
        is_table = isinstance(table, list) and all(
            isinstance(experts, list) and all(type(e) is int for e in experts) for experts in table
        )
        if not is_table or not (name == "default" or _LAYER.fullmatch(name)):
            raise ConfigError(
                f"{path}: {shown(name)} must be a layer number or 'default', and its value a list "
                "of expert numbers for each ep rank"
            )
    return raw


def _part(total: int, parts: int, part: int) -> slice:
    size, extra = divmod(total, parts)
    start = part * size + min(part, extra)
    return slice(start, start + size + (part < extra))


def _check(name: str, table: tuple[tuple[int, ...], ...], config: ModelConfig, ep: int) -> None:
    experts = set(range(config.n_routed_experts or 0))
    where = f"expert placement of layer {name}" if name != "default" else "expert placement"
    if name != "default" and not (
        int(name) < config.num_hidden_layers and config.is_moe(int(name))
    ):
        raise ConfigError(f"{where}: the model has no experts there")
    if len(table) != ep:
        raise ConfigError(f"{where} lists {len(table)} ranks, but ep={ep}")
    for rank, held in enumerate(table):
        unknown = sorted(set(held) - experts)
        if not held or unknown or len(set(held)) < len(held):
            what = f"unknown experts {shown(unknown)}" if unknown else "no expert, or one twice"
            raise ConfigError(f"{where}: ep rank {rank} has {what}")
    missing = sorted(experts.difference(*table))
    if missing:
        raise ConfigError(f"{where}: no rank has the experts {shown(missing)}")
