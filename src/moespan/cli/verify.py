"""`moespan verify`: compares the engine with reference logits, under one layout or all."""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moespan.cli.flags import add_print_env_flag, add_settings_flags, settings_of
from moespan.cli.show import (
    EXIT_FAILED,
    LAYOUT_ROW,
    check_writable,
    print_layout,
    print_verification,
)
from moespan.cli.starting import serve_unless_first_node, start_llm
from moespan.config import Layout, ModelConfig, all_layouts
from moespan.errors import ConfigError, LayoutError
from moespan.front.settings import Settings

if TYPE_CHECKING:
    from moespan.front.llm import LLM
    from moespan.measure.verify import Reference
    from moespan.measure.verify_layouts import LayoutReport

SUMMARY = "compare with reference logits"

_BATCHED_TOKENS = 256
_REFERENCE_TOKENS = 24
_REFERENCE_LENGTHS = (1, 7, 32, 100)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `verify`."""
    add_settings_flags(parser)
    add_print_env_flag(parser)
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="FILE.safetensors",
        help="p<i>.ids [T], p<i>.logits [T, V], p<i>.greedy [N] (default: made from the checkpoint "
        "in float32)",
    )
    parser.add_argument(
        "--all-layouts",
        type=int,
        metavar="WORLD",
        help="run every layout of WORLD ranks and print a table",
    )
    parser.add_argument(
        "--trace",
        action="store_true",
        help="also compare hidden states and router choices, where the reference has them",
    )
    parser.add_argument(
        "--write-reference",
        action="store_true",
        help="write the --reference file, from the float32 model on one rank",
    )
    parser.add_argument(
        "--prompt",
        nargs="+",
        action="extend",
        metavar="TEXT",
        help="prompts of the reference that is made (default: random token ids)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help=f"greedy tokens of the reference that is made ({_REFERENCE_TOKENS})",
    )
    parser.add_argument(
        "--against",
        metavar="MODEL",
        help="without --reference: the float checkpoint to compare with (MODEL itself)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Compare the engine with reference logits. They come from a file, which verify can also write.
    Without a file, they come from the same checkpoint in float32, without rounding to 8 or 4
    bits."""
    settings = settings_of(args, max_num_batched_tokens=_BATCHED_TOKENS)
    layouts = _layouts(args.all_layouts, settings)
    if layouts and settings != settings.with_layout(Layout()):
        raise ConfigError(
            "--all-layouts runs every layout of so many ranks; leave -tp, -ep, -pp, -sp and -dp out"
        )
    serve_unless_first_node(settings.with_layout(layouts[0]) if layouts else settings)
    makes_reference = args.write_reference or args.reference is None
    if not makes_reference and (args.prompt or args.max_tokens is not None or args.against):
        raise ConfigError(
            "--prompt, --max-tokens and --against are only for making a reference; leave "
            "--reference out, or add --write-reference"
        )
    if args.write_reference:
        if args.reference is None:
            args.usage_error("--write-reference needs --reference")
        return _write_reference(args, settings)
    if args.reference is not None:
        return _compare(args, settings, layouts, args.reference)
    return _compare_with_floats(args, settings, layouts)


def _layouts(world_size: int | None, settings: Settings) -> list[Layout]:
    """The layouts of `--all-layouts` that the model can be cut into; none without the flag."""
    if world_size is None:
        return []
    from moespan.front.hub import resolve

    assert settings.model is not None
    model = ModelConfig.from_pretrained(resolve(settings.model))
    layouts = [
        layout
        for layout in all_layouts(world_size, model)
        if _can_be_cut(model, layout, settings.quantization)
    ]
    if not layouts:
        raise ConfigError(
            f"--all-layouts {world_size}: no layout with that many ranks fits the model; use "
            "another number"
        )
    return layouts


def _can_be_cut(model: ModelConfig, layout: Layout, quantization: str | None) -> bool:
    from moespan.checkpoint.placement import place

    try:
        place(model, layout, 0, quantization=quantization)
    except LayoutError:
        return False
    return True


def _compare(
    args: argparse.Namespace, settings: Settings, layouts: list[Layout], path: Path
) -> int:
    from moespan.measure.verify import Reference

    reference = Reference(path)
    if layouts:
        return _compare_layouts(settings, layouts, reference, as_json=args.json)
    return _compare_one(args, settings, reference)


def _compare_with_floats(
    args: argparse.Namespace, settings: Settings, layouts: list[Layout]
) -> int:
    """Make the reference with a first engine, close that engine, and verify a second one.

    The first engine computes in float32, without rounding to 8 or 4 bits, in the same layout. With
    `--all-layouts` it is one rank, and it rounds weights and cache as the layouts do.
    """
    if args.trace:
        raise ConfigError("--trace needs --reference: a reference made here holds no hidden states")
    if settings.nnodes > 1:
        raise ConfigError("on many nodes verify needs --reference; make one with --write-reference")
    plain = replace(settings.in_float32(), model=args.against or settings.model)
    if layouts:
        plain = plain.with_layout(Layout())
    else:
        plain = replace(plain, quantization=None, kv_cache_dtype="auto")
    with tempfile.TemporaryDirectory(prefix="moespan-") as folder:
        path = Path(folder) / "reference.safetensors"
        _make_reference(plain, path, args.prompt, args.max_tokens)
        return _compare(args, settings, layouts, path)


def _compare_one(args: argparse.Namespace, settings: Settings, reference: Reference) -> int:
    from moespan.measure.verify import verify
    from moespan.measure.verify_layouts import trace_against_reference

    differences = {}
    with start_llm(settings) as llm:
        report = verify(llm, reference)
        if args.trace:
            differences = trace_against_reference(llm, reference, report.tolerance.relative)
    if args.json:
        print(json.dumps({**report.to_dict(), "first_differences": differences}))
    else:
        print_verification(report)
        for name, difference in differences.items():
            print(f"{name}: first difference inside: {difference}")
        if args.trace and not differences:
            print("nothing inside differs from what the reference holds")
    return EXIT_FAILED if report.failures or differences else 0


def _compare_layouts(
    settings: Settings, layouts: list[Layout], reference: Reference, as_json: bool
) -> int:
    from moespan.measure.verify_layouts import verify_layouts

    # A layout that fails is compared with one rank, which node 0 runs alone.
    one_rank: Callable[[], LLM] = lambda: start_llm(  # noqa: E731
        replace(settings.with_layout(Layout()), nnodes=1)
    )
    reports: list[LayoutReport] = []
    if not as_json:
        print(LAYOUT_ROW.format("layout", "dispatch", "max |Δ|", "greedy", "", "bytes sent/token"))
    with start_llm(settings.with_layout(layouts[0])) as llm:
        for one in verify_layouts(llm, layouts, reference, one_rank):
            reports.append(one)
            if not as_json:
                print_layout(one)
    failed = sum(bool(one.report.failures) for one in reports)
    if as_json:
        print(json.dumps([one.to_dict() for one in reports]))
    else:
        seconds = sum(one.seconds for one in reports)
        verdict = f"{failed} FAILED" if failed else "all passed"
        print(f"{len(layouts)} layouts, {len(reports)} runs in {seconds:.0f} s: {verdict}")
    return EXIT_FAILED if failed else 0


def _write_reference(args: argparse.Namespace, settings: Settings) -> int:
    if args.reference.exists():
        raise ConfigError(f"--reference {args.reference} exists; give a new file to write")
    check_writable(args.reference, "--reference")
    if settings.dtype not in ("auto", "float32") or settings != settings.with_layout(Layout()):
        raise ConfigError(
            "--write-reference computes in float32 on one rank; leave --dtype and -tp out"
        )
    settings = replace(settings, dtype="float32")
    num_prompts = _make_reference(settings, args.reference, args.prompt, args.max_tokens)
    kind = "float32" if settings.quantization is None else f"float32, {settings.quantization}"
    print(f"wrote {args.reference}: {num_prompts} prompts, {kind}, one rank")
    return 0


def _make_reference(
    settings: Settings, path: Path, texts: list[str] | None, num_tokens: int | None
) -> int:
    """Write the results of an engine of `settings`; returns the number of prompts."""
    from moespan.measure.verify import write_reference

    num_tokens = _REFERENCE_TOKENS if num_tokens is None else num_tokens
    if num_tokens < 1:
        raise ConfigError(f"--max-tokens {num_tokens} must be at least 1")
    with start_llm(settings) as llm:
        prompts = _reference_prompts(texts, llm, num_tokens)
        write_reference(llm, path, prompts, num_tokens)
    return len(prompts)


def _reference_prompts(texts: list[str] | None, llm: LLM, num_tokens: int) -> list[list[int]]:
    """Token ids of `texts`, or random prompts that leave room for `num_tokens` more."""
    if texts is not None:
        if llm.tokenizer is None:
            raise ConfigError("--prompt needs a tokenizer, and this checkpoint has none")
        return [llm.tokenizer.encode(text) for text in texts]
    generator = random.Random(0)
    longest = llm.config.max_model_len - num_tokens
    if longest < 1:
        raise ConfigError(
            f"--max-tokens {num_tokens} leaves no room for a prompt within "
            f"max_model_len={llm.config.max_model_len}"
        )
    return [
        [generator.randrange(llm.model_config.vocab_size) for _ in range(length)]
        for length in _REFERENCE_LENGTHS
        if length <= longest
    ]
