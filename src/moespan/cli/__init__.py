"""The command line: one thin verb each. Heavy imports wait until a verb needs them.

`moespan VERB --help` shows a verb's flags; vLLM's and SGLang's spellings are accepted too.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from moespan import __version__
from moespan.cli.flags import (
    add_common_flags,
    add_model_flags,
    add_sampling_flags,
    integers,
    serve_node,
)
from moespan.cli.verbs import (
    EXIT_FAILED,
    bench,
    doctor,
    generate,
    info,
    make_checkpoint,
    print_environment,
    quantize,
    verify,
)
from moespan.config import QUANTIZATIONS
from moespan.errors import MoespanError
from moespan.machine.environment import keep_torch_npu_out


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one verb and exit: 0 if all went well, 1 if something failed, 2 for a wrong command."""
    args = _parser().parse_args(argv)
    # An installed torch_npu without CANN would make `import torch` fail, for other devices too.
    keep_torch_npu_out()
    try:
        if getattr(args, "print_env", False):
            args.run = print_environment
        elif getattr(args, "node_rank", 0) > 0 and args.run is not doctor:
            serve_node(args)
        code = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has gone. Python flushes once more at the end: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_FAILED
    except (MoespanError, OSError) as error:
        print(f"moespan: {error}", file=sys.stderr)
        code = EXIT_FAILED
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moespan", description="Runs DeepSeek-MoE under any layout. See VERB --help."
    )
    parser.add_argument("--version", action="version", version=f"moespan {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    verb = _add_verb(verbs, generate, "continue prompts")
    add_model_flags(verb)
    what = verb.add_mutually_exclusive_group()  # one is required, but not with --print-env
    what.add_argument(
        "--prompt", nargs="+", action="extend", metavar="TEXT", help="one or more prompts"
    )
    what.add_argument(
        "--input",
        type=Path,
        metavar="FILE.jsonl",
        help='lines {"prompt": text or ids, "id": any, "params": {...}}',
    )
    verb.add_argument(
        "--output",
        type=Path,
        metavar="FILE.jsonl",
        help="answers, a line each as they finish (default: stdout)",
    )
    verb.add_argument("--resume", action="store_true", help="skip ids that --output has already")
    verb.add_argument(
        "--chat",
        action="store_true",
        help="put prompts through the chat template as what the user says",
    )
    verb.add_argument("--json", action="store_true", help="print each answer as a line of JSON")
    verb.add_argument("--quiet", action="store_true", help="only answers and errors")
    add_sampling_flags(verb)

    verb = _add_verb(verbs, verify, "compare with reference logits")
    add_model_flags(verb)
    verb.add_argument(
        "--reference",
        type=Path,
        metavar="FILE.safetensors",
        help="p<i>.ids [T], p<i>.logits [T, V], p<i>.greedy [N] (default: what the checkpoint "
        "gives in float32)",
    )
    verb.add_argument(
        "--all-layouts",
        type=int,
        metavar="WORLD",
        help="run every layout of WORLD ranks and print a table",
    )
    verb.add_argument(
        "--trace",
        action="store_true",
        help="also compare hidden states and router choices, where the reference has them",
    )
    verb.add_argument(
        "--write-reference",
        action="store_true",
        help="make the file, from the float32 model on one rank",
    )
    verb.add_argument(
        "--prompt",
        nargs="+",
        action="extend",
        metavar="TEXT",
        help="prompts of a reference to be made (default: random token ids)",
    )
    verb.add_argument(
        "--max-tokens", type=int, metavar="N", help="greedy tokens in a reference to be made (24)"
    )
    verb.add_argument(
        "--against",
        metavar="MODEL",
        help="without --reference: the checkpoint of floats to compare with (MODEL itself)",
    )
    verb.add_argument("--json", action="store_true", help="print the report as JSON")
    verb.set_defaults(max_num_batched_tokens=256)

    verb = _add_verb(verbs, bench, "measure speed against the machine's limits")
    add_model_flags(verb, model_is_required=False)
    verb.add_argument(
        "--preset",
        metavar="{16b,16b-4l,tiny}",
        help="random weights of this geometry instead of MODEL; takes --load-format dummy",
    )
    group = verb.add_argument_group("what to measure")
    group.add_argument(
        "--prefill",
        type=integers,
        default=(128, 512, 2048),
        metavar="N,N,...",
        help="lengths of single prompts (128,512,2048)",
    )
    group.add_argument(
        "--decode-batch",
        type=integers,
        default=(1, 8, 32),
        metavar="N,N,...",
        help="sequences that decode together (1,8,32)",
    )
    group.add_argument(
        "--context", type=int, default=128, metavar="N", help="prompt tokens of these (128)"
    )
    group.add_argument(
        "--decode-tokens", type=int, default=32, metavar="N", help="timed tokens of these (32)"
    )
    group.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="rounds after a warm-up (5)"
    )
    verb.add_argument("--json", action="store_true", help="print all figures as JSON")

    verb = _add_verb(verbs, info, "describe a model")
    add_common_flags(verb)
    verb.add_argument("--json", action="store_true", help="print as JSON")

    verb = _add_verb(verbs, make_checkpoint, "write random weights")
    verb.add_argument("folder", type=Path, metavar="DIR")
    verb.add_argument("--preset", default="tiny", metavar="{16b,16b-4l,tiny}")
    verb.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a key of config.json; may be repeated",
    )
    verb.add_argument("--seed", type=int, default=0)

    verb = _add_verb(verbs, quantize, "write a checkpoint of 8 or 4 bits")
    verb.add_argument("model", metavar="MODEL", help="checkpoint folder, or a hub name")
    verb.add_argument("folder", type=Path, metavar="OUT", help="the new folder")
    verb.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        default="int8",
        help="int8: integers for weights alone; w8a8: for activations, too, when it is run; fp8: "
        "floats for both; int4: integers for weights alone, of 4 bits (int8)",
    )

    verb = _add_verb(verbs, doctor, "check this machine")
    add_model_flags(verb, model_is_required=False)
    verb.add_argument(
        "--collectives",
        action="store_true",
        help="also start the layout's ranks, and time all-reduces over each axis",
    )
    verb.add_argument(
        "--compare-nodes",
        action="store_true",
        help="also compare code and clocks with the other nodes, which run the same meanwhile",
    )
    verb.add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser


def _add_verb(verbs: Any, run: Callable[[argparse.Namespace], int], summary: str) -> Any:
    """The parser of a verb, named for `run` and described by its docstring."""
    name = run.__name__.replace("_", "-")
    verb = verbs.add_parser(name, help=summary, description=run.__doc__, allow_abbrev=False)
    verb.set_defaults(run=run, usage_error=verb.error)
    return verb
