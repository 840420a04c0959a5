"""`moespan doctor`: finds what would stop a job on this machine, or slow it down."""

from __future__ import annotations

import argparse
import json

from moespan.cli.flags import add_print_env_flag, add_settings_flags, settings_of
from moespan.cli.show import EXIT_FAILED
from moespan.serve.options import ServeOptions

SUMMARY = "check this machine"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `doctor`."""
    add_settings_flags(parser, model_is_required=False)
    add_print_env_flag(parser)
    parser.add_argument(
        "--collectives",
        action="store_true",
        help="also start the ranks of the layout, and time all-reduces over each axis",
    )
    parser.add_argument(
        "--compare-nodes",
        action="store_true",
        help="also compare code and clocks of all nodes; run the same command on each at once",
    )
    parser.add_argument(
        "--port", type=int, metavar="N", help="also check what `serve --port N` needs"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    """Look for anything on this machine that would stop a job or slow it down. The exit code is 1
    if something would stop the job."""
    from moespan.doctor import report
    from moespan.doctor.checks import examine
    from moespan.doctor.host import Host
    from moespan.doctor.job_spec import JobSpec

    if args.port is not None:
        ServeOptions(port=args.port)  # has the rule for ports
    model, config, nodes = settings_of(args).resolve(to_run=False)
    job = JobSpec(
        device=config.device,
        layout=config.layout,
        config=config if model else None,
        model=model,
        bind=config.bind,
        nodes=nodes,
        port=args.port,
    )
    findings = examine(Host(), job)
    if args.collectives:
        from moespan.doctor.collectives import findings as time_collectives

        findings += time_collectives(config, nodes.nnodes)
    if args.compare_nodes:
        from moespan.doctor.nodes import findings as compare_nodes

        findings += compare_nodes(nodes)
    if args.json:
        print(json.dumps(report.to_dict(findings, job.device, str(job.layout))))
    else:
        print(*report.table(findings), sep="\n")
    return EXIT_FAILED if any(one.status == report.PROBLEM for one in findings) else 0
