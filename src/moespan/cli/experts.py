"""`moespan experts`: how evenly experts are chosen, and which rank should hold which."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moespan import files
from moespan.cli.flags import add_model_flags, settings_of
from moespan.cli.show import check_writable
from moespan.config import DTYPE_BYTES, EngineConfig, ExpertTable, ModelConfig
from moespan.errors import ConfigError
from moespan.units import bytes_in_words

if TYPE_CHECKING:
    from moespan.planner.expert_load import Routing

SUMMARY = "show how evenly experts are chosen, and place them on ranks"

_CONTEXT = 1000
_SEQUENCES = 64


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `experts`."""
    add_model_flags(parser)
    parser.add_argument(
        "--counts",
        required=True,
        metavar="FILE.json",
        help="tokens of each expert, as generate --record-routing writes them",
    )
    parser.add_argument(
        "--copies",
        type=int,
        default=0,
        metavar="N",
        help="most further experts on each ep rank (0)",
    )
    parser.add_argument(
        "--hardware", metavar="NAME|FILE.json", help="predict a decode step on this machine"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.json", help="the placement, for --expert-placement"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="the heat map as a page")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png|.svg", help="the heat map, by matplotlib"
    )


def run(args: argparse.Namespace) -> int:
    """Compare the rows of the busiest ep rank as experts are placed now, and as the counts suggest.
    Starts nothing, reads no weights, needs no torch."""
    import msgspec

    from moespan.planner.expert_balance import balanced_layers
    from moespan.planner.expert_load import Routing
    from moespan.search import heat

    for flag, path in (("--out", args.out), ("--html", args.html), ("--plot", args.plot)):
        if path is not None:
            check_writable(path, flag)
    if args.plot is not None and args.plot.suffix not in (".png", ".svg"):
        raise ConfigError(f"--plot {args.plot} must end in .png or .svg")
    model, config, _ = settings_of(args).resolve(to_run=False)
    assert model is not None
    _check(args, config, model)
    routing = Routing.of_file(args.counts, model)
    counts, ep = routing.counts, config.layout.ep
    table: ExpertTable = balanced_layers(counts, ep, args.copies)
    placed = replace(config, expert_placement=table)
    lines = _lines(model, counts, config, placed)
    if args.copies:
        lines.append(_copies_line(table, model, ep, args.copies))
    if args.hardware is not None:
        lines.append(_predicted(args.hardware, model, routing, config, placed))
    print("\n".join(lines))
    if args.out is not None:
        files.write(args.out, msgspec.json.format(msgspec.json.encode(table), indent=0) + b"\n")
    title = f"Tokens of experts: {args.counts}"
    if args.html is not None:
        files.write(args.html, heat.page(counts, title, lines))
    if args.plot is not None:
        heat.plot(counts, title, args.plot)
    return 0


def _check(args: argparse.Namespace, config: EngineConfig, model: ModelConfig) -> None:
    experts, ep = model.n_routed_experts or 0, config.layout.ep
    if ep == 1:
        raise ConfigError("ep=1: every rank has all experts; give -ep N for a placement")
    if not 0 <= args.copies <= experts - -(-experts // ep):
        raise ConfigError(
            f"--copies {args.copies} must be from 0 to {experts - -(-experts // ep)}: a rank holds "
            f"{-(-experts // ep)} of {experts} experts, and none twice"
        )


def _lines(
    model: ModelConfig,
    counts: Mapping[int, Sequence[int]],
    config: EngineConfig,
    placed: EngineConfig,
) -> list[str]:
    """Rows and weight bytes of the busiest rank against the mean, now and placed."""
    from moespan.checkpoint.experts import ExpertPlacement
    from moespan.planner.expert_balance import rank_rows

    ep = config.layout.ep
    tables = [
        ExpertPlacement.make(one.expert_placement, model, one.layout) for one in (config, placed)
    ]
    lines = [f"rows of the busiest of {ep} ep ranks, mean = 1", "layer     now  placed"]
    for layer, row in counts.items():
        mean = sum(row) / ep
        now, then = (max(rank_rows(row, table.of(layer))) / mean for table in tables)
        lines.append(f"{layer:5}  {now:6.3f}  {then:6.3f}")
    each = 3 * model.hidden_size * model.moe_intermediate_size * DTYPE_BYTES[config.dtype]
    for name, table in zip(("now", "placed"), tables, strict=True):
        held = [sum(len(table.of(layer)[rank]) for layer in counts) for rank in range(ep)]
        most, mean = max(held) * each, sum(held) * each / ep
        lines.append(
            f"weights of experts {name}, {config.dtype}: {bytes_in_words(most)} on the fullest "
            f"rank, {bytes_in_words(mean)} on average"
        )
    return lines


def _copies_line(table: ExpertTable, model: ModelConfig, ep: int, copies: int) -> str:
    """How many of the copies that `--copies` allows the placement has."""
    experts = model.n_routed_experts or 0
    made = sum(sum(map(len, layer)) - experts for layer in table.values())
    allowed = copies * ep * len(table)
    why = "" if made == allowed else "; the others would not take a row from the busiest rank"
    return f"copies of experts: {made} of {allowed} allowed{why}"


def _predicted(
    hardware: str,
    model: ModelConfig,
    routing: Routing,
    config: EngineConfig,
    placed: EngineConfig,
) -> str:
    """Seconds of a decode step, now and placed."""
    from moespan.device import DEVICES
    from moespan.planner import profile
    from moespan.planner.cost import ReplicaStep, StepCost

    machine = profile.load(hardware)
    kind = machine.device.kind
    step = ReplicaStep(_SEQUENCES, _SEQUENCES, _SEQUENCES, _SEQUENCES * _CONTEXT)
    now, then = (
        sum(
            StepCost(
                machine,
                model,
                replace(one, device=kind, block_size=DEVICES[kind].block_size),
                routing,
            ).stages_s([step] * config.layout.dp)
        )
        for one in (config, placed)
    )
    return (
        f"predicted decode step on {hardware}, {_SEQUENCES} sequences of {_CONTEXT} tokens a "
        f"replica: {now * 1e3:.3f} ms now, {then * 1e3:.3f} ms placed"
    )
