"""`moespan plan`: which layout fits, which is fastest, and what one more node would give."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from moespan import files
from moespan.cli.flags import integers
from moespan.cli.show import EXIT_FAILED, check_writable, say
from moespan.config import DTYPE_BYTES, KV_CACHE_DTYPES, QUANTIZATIONS, EngineConfig, ModelConfig
from moespan.config.engine import check_choice
from moespan.device import DEVICES
from moespan.errors import ConfigError, shown
from moespan.log import logger
from moespan.version import __version__

if TYPE_CHECKING:
    from moespan.planner.load import Load
    from moespan.planner.profile import Profile
    from moespan.search.candidates import Space
    from moespan.search.explore import Question

SUMMARY = "find the layout that fits and meets latency targets"

_WHAT_IF = "nodes=+1,nodes=-1"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `plan`."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help="folder with a config.json")
    parser.add_argument("--preset", metavar="{16b,16b-4l,tiny}", help="a geometry, for MODEL")
    _add_machine_flags(parser)
    _add_load_flags(parser)
    _add_search_flags(parser)
    _add_output_flags(parser)


def _add_machine_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machines")
    group.add_argument(
        "--hardware",
        required=True,
        metavar="NAME|FILE.json|NAME+FILE.json",
        help="a built-in profile (an unknown name lists them), what `moespan calibrate` wrote, or "
        "the second over the first",
    )
    many = group.add_mutually_exclusive_group()
    many.add_argument("--nodes", type=int, metavar="N", help="machines (1)")
    many.add_argument("--devices", type=int, metavar="N", help="devices of all machines together")


def _add_load_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "load and targets",
        "Without --rate and --concurrency: as many requests as the targets allow.",
    )
    length = "N|lognormal:MEAN:SIGMA|uniform:LOW:HIGH"
    group.add_argument("--input", metavar=length, help="prompt tokens (1024)")
    group.add_argument("--output", metavar=length, help="output tokens (256)")
    group.add_argument(
        "--load",
        metavar="FILE",
        help="requests of a trace instead: CSV of Azure's traces, JSON Lines of Mooncake's or ours",
    )
    group.add_argument("--speed", type=float, metavar="X", help="FILE X times as fast (1)")
    group.add_argument("--clip", action="store_true", help="cut prompts that are too long")
    often = group.add_mutually_exclusive_group()
    often.add_argument("--rate", type=float, metavar="R", help="requests per second, Poisson")
    often.add_argument("--concurrency", type=int, metavar="N", help="requests at any time")
    group.add_argument(
        "--num-requests", type=int, default=1000, metavar="N", help="simulated requests (1000)"
    )
    time = "TIME[@mean|p50|p90|p95|p99]"
    group.add_argument("--ttft", metavar=time, help="time to the first token, as 2s@p90")
    group.add_argument("--tpot", metavar=time, help="time per further token, as 40ms@p99")


def _add_search_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("search")
    group.add_argument(
        "--quantization",
        default="none",
        metavar="NAME,...",
        help=f"schemes to try: none (the checkpoint's form), {', '.join(QUANTIZATIONS)} (none)",
    )
    group.add_argument(
        "--kv-cache-dtype",
        default="auto",
        metavar="NAME,...",
        help=f"dtypes of the cache to try: {', '.join(KV_CACHE_DTYPES)} (auto)",
    )
    group.add_argument("--dtype", choices=["auto", *DTYPE_BYTES], default="auto")
    group.add_argument("--max-num-seqs", type=integers, default=(64, 128, 256), metavar="N,...")
    group.add_argument(
        "--max-num-batched-tokens", type=integers, default=(1024, 2048, 4096), metavar="N,..."
    )
    group.add_argument("--max-model-len", type=int, metavar="N", help="(the model's limit)")
    group.add_argument("--only", metavar="'tp=8 ...'", help="layouts with these degrees only")
    group.add_argument(
        "--routing",
        default="uniform",
        metavar="uniform|FILE.json",
        help="how often each expert is chosen (uniform)",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the load (0)")
    group.add_argument("--fast", action="store_true", help="estimate only, simulate nothing")
    group.add_argument("--jobs", type=int, metavar="N", help="cores to use (all)")


def _add_output_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--top", type=int, default=5, metavar="N", help="layouts to show (5)")
    group.add_argument(
        "--what-if",
        default=_WHAT_IF,
        metavar="nodes=+N,...",
        help=f"other numbers of nodes to compare; none for nothing ({_WHAT_IF})",
    )
    group.add_argument(
        "--explain", metavar="'tp=2 ep=8 ...'", help="every part of one layout's memory and steps"
    )
    group.add_argument("--json", metavar="FILE", help="everything, for programs; - is stdout")
    group.add_argument("--html", metavar="FILE", help="one page with pictures, without a network")
    group.add_argument("--plot", metavar="FILE.png|.svg", help="the front, by matplotlib")


def run(args: argparse.Namespace) -> int:
    """Find the layouts that fit the machines and meet the targets, and rank them. The engine's own
    scheduler runs on predicted times. Nothing is started, no weights are read, no torch is needed.
    Exit code 1: no layout meets every target; the closest ones are shown."""
    from moespan.search.candidates import no_layout
    from moespan.search.document import document
    from moespan.search.explore import explore
    from moespan.search.report import text

    _check_files(args)
    question, name = _question(args)
    what_if = _what_if(args, question)
    one_layout = _explained(args, question)
    answer, explain = explore(question), None
    if not answer.num_layouts:
        raise no_layout(question.space, question.model, question.profile)
    if one_layout is not None:
        explain = explore(one_layout)
        if not explain.found:
            raise ConfigError(
                f"--explain {shown(args.explain)}: no such layout of these devices fits the model "
                "and the memory"
            )
    found = document(answer, name, nodes=what_if, explain=explain)
    if args.json == "-":
        print(_as_json(found))
    else:
        print(*text(found, explain=explain is not None), sep="\n")
        _write_files(args, found)
    return 0 if answer.met else EXIT_FAILED


def _check_files(args: argparse.Namespace) -> None:
    for flag in ("json", "html", "plot"):
        path = getattr(args, flag)
        if path is not None and path != "-":
            check_writable(Path(path), f"--{flag}")
    if args.plot is not None:
        from moespan.search.plot import check_installed

        if Path(args.plot).suffix not in (".png", ".svg"):
            raise ConfigError(f"--plot {args.plot} must end in .png or .svg")
        check_installed()
    for flag, least in (
        ("num_requests", 20),
        ("top", 1),
        ("jobs", 1),
        ("devices", 1),
        ("nodes", 1),
    ):
        value = getattr(args, flag)
        if value is not None and value < least:
            raise ConfigError(f"--{flag.replace('_', '-')} {value} must be at least {least}")


def _write_files(args: argparse.Namespace, found: dict[str, Any]) -> None:
    if args.json:
        files.write(args.json, _as_json(found) + "\n")
    if args.html:
        from moespan.search.pages import page

        files.write(args.html, page(found))
    if args.plot:
        from moespan.search.plot import plot

        plot(found, Path(args.plot))
    for path in (args.json, args.html, args.plot):
        if path:
            say(f"wrote {path}")


def _as_json(found: dict[str, Any]) -> str:
    """JSON has no infinity: a latency without end is null."""
    return msgspec.json.format(msgspec.json.encode(found), indent=1).decode()


def _question(args: argparse.Namespace) -> tuple[Question, str]:
    """What is asked, and the model's name for commands."""
    from moespan.planner import profile
    from moespan.planner.expert_load import Routing
    from moespan.planner.outcome import parse_target
    from moespan.search.explore import Question

    model, name, folder = _model(args)
    machine = profile.load(args.hardware)
    if machine.made is not None and machine.made.moespan not in ("", __version__):
        logger.warning(
            f"{args.hardware} was measured with moespan {machine.made.moespan}, and this is "
            f"{__version__}: calibrate again if steps have become faster or slower"
        )
    space = _space(args, model, machine)
    targets = [
        parse_target(latency, given)
        for latency in ("ttft", "tpot")
        for given in [getattr(args, latency)]
        if given is not None
    ]
    lengths = args.input or "1024", args.output or "256"
    load = _load(args, lengths, folder)
    # A distribution has a tail; what is given exactly is refused if it is too long.
    clip = args.clip or (args.load is None and not all(map(str.isdecimal, lengths)))
    if load is not None:
        load = load.fitting(space.base.max_model_len, clip)
    question = Question(
        space,
        machine,
        model,
        Routing.read(args.routing, model, args.seed),
        load,
        lengths,
        tuple(targets),
        args.num_requests,
        args.top,
        args.seed,
        args.fast,
        jobs=args.jobs,
        clip_to=space.base.max_model_len,
        clip=clip,
        trace=args.load,
        speed=args.speed or 1.0,
        tell=_Progress().tell,
    )
    question.demand(1)  # refuses lengths that are none, before anything is searched
    return question, name


class _Progress:
    """Tells a person every ten seconds what a long search does."""

    def __init__(self) -> None:
        self._started = self._told = time.monotonic()

    def tell(self, doing: str) -> None:
        now = time.monotonic()
        if now - self._told >= _TOLD_EVERY_S:
            self._told = now
            say(f"{now - self._started:.0f} s: {doing}")


_TOLD_EVERY_S = 10.0


def _model(args: argparse.Namespace) -> tuple[ModelConfig, str, Path | None]:
    """The model, its name for commands, and its folder if it has one."""
    from moespan.checkpoint.presets import preset
    from moespan.front.hub import resolve
    from moespan.search.commands import MODEL_PLACE

    if (args.model is None) == (args.preset is None):
        args.usage_error("one of the arguments MODEL --preset is required, and not both")
    if args.preset is not None:
        return ModelConfig.from_dict(preset(args.preset, {})), MODEL_PLACE, None
    folder = resolve(args.model)
    return ModelConfig.from_pretrained(folder), args.model, folder


def _space(args: argparse.Namespace, model: ModelConfig, machine: Profile) -> Space:
    """The search space."""
    from moespan.search.candidates import Space, parse_axes

    kind = machine.device.kind
    base = EngineConfig(
        "",
        device=kind,
        dtype=_dtype(args.dtype, model, machine),
        max_model_len=(
            model.max_position_embeddings if args.max_model_len is None else args.max_model_len
        ),
        block_size=DEVICES[kind].block_size,
    )
    base.check(model)
    per_node = machine.devices_per_node
    devices = args.devices if args.devices is not None else (args.nodes or 1) * per_node
    _check_number(devices, "--nodes" if args.devices is None else "--devices")
    schemes = _names(args.quantization)
    for name in schemes:
        check_choice("--quantization", name, ("none", *QUANTIZATIONS))
    return Space(
        base,
        devices,
        tuple(None if name == "none" else name for name in schemes),
        tuple(_names(args.kv_cache_dtype)),
        args.max_num_seqs,
        args.max_num_batched_tokens,
        parse_axes(args.only) if args.only else (),
    )


_MOST_DEVICES = 16384


def _check_number(devices: int, flag: str) -> None:
    """Raise `ConfigError` for more devices than a plan takes. The most take about a minute with
    `--fast` on two cores."""
    if devices > _MOST_DEVICES:
        raise ConfigError(
            f"{flag}: {devices:,} devices exceed the {_MOST_DEVICES:,} of the largest plan; plan a "
            "part of them with its share of the load"
        )


def _dtype(asked: str, model: ModelConfig, machine: Profile) -> str:
    """The dtype of the activations; `auto` is the model's, or float16 where a device computes that
    and not the model's."""
    rates = machine.device.operations_per_s
    if asked == "auto":
        return "float16" if "float16" in rates and model.dtype not in rates else model.dtype
    if rates and asked not in rates:
        raise ConfigError(
            f"--dtype {asked}: {machine.title or machine.name} has figures for {', '.join(rates)} "
            "only; use one of them"
        )
    return asked


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _load(args: argparse.Namespace, lengths: tuple[str, str], folder: Path | None) -> Load | None:
    """The load of all engines; None for as many requests as possible."""
    from moespan.planner import load

    often = {"rate": args.rate, "concurrency": args.concurrency}
    if args.load is None:
        load.refuse_speed(args.speed)
        if args.rate is None and args.concurrency is None:
            return None
        # A closed loop needs some rounds of its requests.
        number = max(args.num_requests, 6 * (args.concurrency or 0))
        return load.drawn(*lengths, number, **often, seed=args.seed)
    if args.input is not None or args.output is not None:
        raise ConfigError("--load brings its own lengths; leave out --input and --output")
    found = load.read(args.load, speed=args.speed, **often, seed=args.seed)
    return load.encoded(found, None if folder is None else _encoder(folder))


def _encoder(folder: Path) -> Any:
    from moespan.text.tokenizer import Tokenizer

    if not (folder / "tokenizer.json").exists():
        return None
    tokenizer = Tokenizer.from_pretrained(folder)
    return tokenizer and tokenizer.encode


def _explained(args: argparse.Namespace, question: Question) -> Question | None:
    """The question for one layout alone, if one is to be explained."""
    from dataclasses import replace

    from moespan.config import Layout
    from moespan.search.candidates import parse_axes

    if args.explain is None:
        return None
    asked = dict(parse_axes(args.explain))
    whole = tuple((axis, asked.get(axis, 1)) for axis in Layout.AXES)
    return replace(question, space=replace(question.space, only=whole), num_shown=1)


def _what_if(args: argparse.Namespace, question: Question) -> list[int]:
    """The changes of the number of nodes that `--what-if` asks for.

    Raises:
        ConfigError: the text is not like `nodes=+1,nodes=-1`, or names more nodes fewer than there
            are, unless it is the default.
    """
    found = []
    per_node, devices = question.profile.devices_per_node, question.space.devices
    for part in _names(args.what_if):
        if part == "none":
            continue
        name, _, number = part.partition("=")
        try:
            change = int(number)
        except ValueError:
            change = 0
        if name != "nodes" or not change:
            raise ConfigError(f"--what-if {shown(part)} is not like nodes=+1")
        _check_number(devices + change * per_node, f"--what-if {part}")
        if devices + change * per_node < 1 and args.what_if != _WHAT_IF:
            raise ConfigError(
                f"--what-if {part} leaves no device of {devices}; a node has {per_node}"
            )
        found.append(change)
    return found
