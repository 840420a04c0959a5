"""`moespan calibrate`: measures this machine, for `moespan plan`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from moespan.cli.flags import add_print_env_flag, add_settings_flags, settings_of
from moespan.cli.show import check_writable, say
from moespan.config import EngineConfig, ModelConfig, Nodes
from moespan.errors import ConfigError
from moespan.front.settings import Settings

SUMMARY = "measure this machine, for plan"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `calibrate`."""
    add_settings_flags(parser, model_is_required=False)
    add_print_env_flag(parser)
    parser.add_argument(
        "--preset", metavar="{16b,16b-4l,tiny}", help="a geometry, instead of MODEL (16b)"
    )
    group = parser.add_argument_group("what to measure")
    group.add_argument(
        "--out", type=Path, required=True, metavar="FILE.json", help="the profile to write"
    )
    group.add_argument(
        "--seconds",
        type=float,
        default=180.0,
        metavar="S",
        help="begin no operation later than this; all else is measured in any case (180)",
    )
    group.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: CPU time of one thread, which repeats on a machine with busy neighbours (wall)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure operations, collectives, the host's work and memory of this machine, and write them
    as a profile. Weights are random. A layout such as -tp 8 says over how many ranks collectives
    are measured. With --nnodes, collectives between nodes are measured too. Ctrl-C keeps what was
    measured."""
    from moespan.measure.calibrate import Calibration

    if not args.seconds > 0:
        raise ConfigError(f"--seconds {args.seconds:g} must be above 0")
    settings = settings_of(args)
    if settings.node_rank == 0:
        check_writable(args.out, "--out")
    model, config, nodes = _resolved(args.preset, settings)
    calibration = Calibration(
        config,
        model,
        args.out,
        args.seconds,
        args.clock,
        None if settings.model is None else Path(settings.model),
        " ".join(["moespan", *sys.argv[1:]]),
        say,
        nodes,
    )
    if nodes.node_rank > 0:
        calibration.assist()
        say(f"node 0 measures the rest and writes {args.out}")
        return 0
    profile = calibration.run()
    assert profile.made is not None
    say(
        f"wrote {args.out}: {len(profile.operations)} curves of operations, "
        f"{len(profile.collectives)} of collectives, in {profile.made.seconds:.0f} s"
    )
    return 0


def _resolved(name: str | None, settings: Settings) -> tuple[ModelConfig, EngineConfig, Nodes]:
    """The model, the engine and the nodes that are asked for."""
    from moespan.cli.bench import preset_model

    if name is None and settings.model is not None:
        model, config, nodes = settings.resolve()
    else:
        # No rank of another node reads the folder of the preset.
        alone = replace(settings, nnodes=1, node_rank=0)
        with preset_model(name or "16b", alone) as found:
            asked = replace(found, nnodes=settings.nnodes, node_rank=settings.node_rank)
            model, config, nodes = asked.resolve()
    assert model is not None
    return model, config, nodes
