"""Text that the verbs print for people, and checks of files that several verbs make."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moespan.errors import ConfigError
from moespan.units import bytes_in_words

if TYPE_CHECKING:
    from tqdm import tqdm

    from moespan.front.llm import LLM
    from moespan.measure.verify import VerifyReport
    from moespan.measure.verify_layouts import LayoutReport


EXIT_FAILED = 1
"""Exit code of a verb that could not do its work, or whose check failed."""

EXIT_REFUSED = 2
"""Exit code of a command that is refused because of its flags or their values; argparse's own."""

LAYOUT_ROW = "{:<28}{:<12}{:>10}  {:<8}{:<8}{}"


def print_layout(one: LayoutReport) -> None:
    greedy = all(prompt.greedy_equal is not False for prompt in one.report.prompts)
    sent = ", ".join(f"{axis} {count:,.0f}" for axis, count in one.sent_bytes_per_token.items())
    print(
        LAYOUT_ROW.format(
            str(one.layout),
            one.dispatch,
            f"{one.report.max_relative_diff:.1e}",
            "equal" if greedy else "differs",
            "FAILED" if one.report.failures else "passed",
            sent or "-",
        ),
        flush=True,
    )
    if one.first_difference:
        print(f"    first difference from one rank: {one.first_difference}")


def check_writable(path: Path, flag: str) -> None:
    """Raise `ConfigError` for a file that could not be written, before a long run."""
    if path.is_dir():
        raise ConfigError(f"{flag} {path} is a folder; give a file")
    if not path.parent.is_dir():
        raise ConfigError(f"{flag} {path}: there is no folder {path.parent}; make it first")
    place = path if path.exists() else path.parent
    if not (os.access(path, os.W_OK) if place == path else _takes_files(place)):
        raise ConfigError(f"{flag} {path}: {place} cannot be written; give a file elsewhere")


def _takes_files(folder: Path) -> bool:
    """Whether a file can be made in `folder`. Folders of /proc take none, whatever their mode."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def progress_bytes(total_bytes: int) -> tqdm[Any]:
    """A progress bar on stderr that counts bytes; shown only on a terminal."""
    from tqdm import tqdm

    return tqdm(total=total_bytes, unit="B", unit_scale=True, disable=None, leave=False)


def say(text: str) -> None:
    """Tell a person on stderr how a verb gets on; a stderr that takes nothing ends no run."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)


def say_written(folder: Path, total_bytes: int, seconds: float) -> None:
    """Print on stderr which checkpoint was written."""
    say(f"wrote {folder}: {bytes_in_words(total_bytes)} in {seconds:.1f} s")


def say_start(args: argparse.Namespace, llm: LLM) -> None:
    """Print on stderr where and how the engine runs."""
    if args.quiet:
        return
    info = llm.info
    rate = f" ({bytes_in_words(info.read_bytes / max(info.load_s, 1e-9))}/s)"
    say(
        f"model    {args.model}\n"
        f"runs on  {info.device}, {info.dtype}, {info.layout}\n"
        f"weights  {bytes_in_words(info.weight_bytes)} of {info.quantization or info.dtype} per "
        f"rank, {'loaded' if info.read_bytes else 'mapped'} in {info.load_s:.2f} s"
        f"{rate if info.read_bytes else ''}\n"
        f"KV cache {info.num_blocks * info.block_size} tokens in blocks of {info.block_size}, "
        f"{info.cache_dtype}"
    )
    if info.binding:
        say("cores    " + "\n         ".join(info.binding))


def say_speed(args: argparse.Namespace, num_requests: int, num_tokens: int, seconds: float) -> None:
    """Say on stderr what was answered, and how fast."""
    if not args.quiet:
        rate = num_tokens / max(seconds, 1e-9)
        say(f"{num_requests} answered, {num_tokens} tokens in {seconds:.2f} s: {rate:.1f} tokens/s")


def print_text(prompt: str, output: Any) -> None:
    for one in output.outputs:
        text = one.text if one.text or not one.token_ids else " ".join(map(str, one.token_ids))
        print(f"\n{prompt}\n→ {text}", flush=True)


def bench_table(report: dict[str, Any]) -> Iterator[str]:
    """Lines of the table that `bench` prints."""
    layout = ", ".join(f"{axis}={n}" for axis, n in report["layout"].items() if n > 1)
    low, high = report["bandwidth_range_GBps"]
    yield f"{report['model']}, {report['dtype']}, {layout or 'one rank'}"
    yield f"{report['device']}: {report['machine']}, {report['cores']} cores"
    yield (
        f"limits: {report['bandwidth_GBps']:.1f} GB/s ({low:.1f} to {high:.1f}), "
        f"{report['gemm_TFLOPs']:.3g} TFLOP/s in {report['dtype']}"
    )
    yield (
        f"weights read in {report['load_s']:.2f} s, engine started in "
        f"{report['engine_start_s']:.2f} s, first token {report['start_to_first_token_s']:.2f} s "
        f"after the start of the program, at most {bytes_in_words(report['peak_rss_bytes'])} of RAM"
    )
    yield from _drafts(report)
    yield ""
    yield (
        f"{'phase':<9}{'size':>6}{'tokens/s':>11}{'spread':>8}{'of limit':>10}  {'bound by':<9}"
        f"{'ms to a token':>15}{'p99':>9}"
    )
    for phase in ("prefill", "decode"):
        for size, row in report[phase].items():
            wait_s = row.get("first_token_s", row.get("inter_token_s"))
            late = f"{1e3 * row['inter_token_p99_s']:.1f}" if "inter_token_p99_s" in row else "-"
            yield (
                f"{phase:<9}{size:>6}{row['tokens_per_s']:>11.1f}{row['spread']:>8.0%}"
                f"{row['limit_share']:>10.1%}  {row['bound']:<9}{1e3 * wait_s:>15.1f}{late:>9}"
            )


def _drafts(report: dict[str, Any]) -> Iterator[str]:
    if report["draft_tokens"]:
        yield f"{report['accepted_tokens']} of {report['draft_tokens']} drafts were right"


def load_table(report: dict[str, Any]) -> Iterator[str]:
    """Lines that `bench` prints for a load."""
    layout = ", ".join(f"{axis}={n}" for axis, n in report["layout"].items() if n > 1)
    clipped = f", {report['num_clipped']} prompts cut" if report["num_clipped"] else ""
    yield f"{report['model']}, {layout or 'one rank'}, {report['device']}: {report['machine']}"
    yield f"{report['load']}{clipped}"
    yield (
        f"{report['num_requests']} requests counted in {report['seconds']:.1f} s: "
        f"{report['requests_per_s']:.3g} requests/s, {report['tokens_per_s']:.1f} tokens/s; "
        f"{report['prefix_hits']:.0%} of prompts in the cache, {report['preemptions']} preemptions"
    )
    yield from _drafts(report)
    yield ""
    yield f"{'ms':<6}" + "".join(f"{name:>16}" for name in ("mean", "p50", "p90", "p95", "p99"))
    for key, name in (("ttft_s", "TTFT"), ("tpot_s", "TPOT")):
        cells = (
            f"{1e3 * one['value']:.1f}"
            + ("" if one["half_width"] is None else f" ±{1e3 * one['half_width']:.1f}")
            for one in report[key].values()
        )
        yield f"{name:<6}" + "".join(f"{cell:>16}" for cell in cells)


def kinds(report: VerifyReport) -> str:
    """Dtype, quantisation and dtype of the KV cache, in words."""
    parts = [report.dtype]
    if report.quantization is not None:
        parts.append(report.quantization)
    if report.cache_dtype != report.dtype:
        parts.append(f"KV cache {report.cache_dtype}")
    return ", ".join(parts)


def print_verification(report: VerifyReport) -> None:
    print(
        f"{'prompt':<8}{'tokens':>7}{'max |Δ|':>11}{'mean KL':>11}{'max KL':>11}{'top-1':>9}  "
        f"{'first diff':<12}greedy"
    )
    for one in report.prompts:
        first = "-" if one.first_divergence is None else f"at {one.first_divergence}"
        greedy = {True: "equal", False: f"differs at {one.first_greedy_divergence}", None: "-"}
        print(
            f"{one.name:<8}{one.num_tokens:>7}{one.max_abs_diff:>11.2e}{one.mean_kl:>11.2e}"
            f"{one.max_kl:>11.2e}{one.top1:>9.2%}  {first:<12}{greedy[one.greedy_equal]}"
        )
    limit = report.tolerance
    kl_limit = "" if limit.kl is None else f" (limit {limit.kl:.1e})"
    top1_limit = "" if limit.top1 is None else f" (limit {limit.top1:.1%})"
    print(
        f"\n{kinds(report)}, {report.layout}: max |Δ| {report.max_relative_diff:.2e} of the "
        f"largest logit (limit {limit.relative:.1e}), mean KL {report.mean_kl:.2e}{kl_limit}, "
        f"max KL {report.max_kl:.2e}, "
        f"top-1 {report.top1:.2%}{top1_limit}"
    )
    for failure in report.failures:
        print(f"FAILED: {failure}")
    if not report.failures:
        print("passed")
