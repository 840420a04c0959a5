"""Speed with and without drafts (`--speculative-tokens`) on texts that repeat and that do not.

    python benchmarks/speculation.py --tokens 4
    torchrun --nproc-per-node 2 benchmarks/speculation.py --tokens 4 --tp 2

Weights are random, so the network itself would not answer with text. Here the answers are given: a
step computes and samples as always, and then the next token of the answer takes the place of the
sampled one. All else is the engine's own, the drafts among it. Prompts and answers are this
project's own files, with a word, number or sign as one token. README.md explains the table.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from msgspec.structs import replace as replaced

from moespan import LLM, SamplingParams
from moespan.checkpoint.presets import preset
from moespan.engine import results
from moespan.engine.sampler import Sampling
from moespan.engine.step import Sampled

ROOT = Path(__file__).parents[1]
KINDS = ("edit", "extract", "prose", "random")
Text = tuple[list[int], list[int]]
"""Token ids of a prompt, and of its answer."""


class Words:
    """Words as token ids."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def __call__(self, text: str) -> list[int]:
        words = re.findall(r" ?\w{1,8}|\w+| ?[^\w\s]{1,3}|\s+", text)
        return [3 + self._ids.setdefault(word, len(self._ids)) for word in words]


def make_texts(
    kind: str, count: int, num_prompt: int, num_answer: int, vocab_size: int
) -> list[Text]:
    """`count` prompts of about `num_prompt` tokens, with answers of `num_answer`."""
    words, draw = Words(), random.Random(0)
    codes = [one for one in sorted((ROOT / "src/moespan/engine").glob("*.py")) if is_long(one)]
    pages = [one for one in sorted((ROOT / "docs").glob("*.md")) if is_long(one)]
    pages = [page for page in pages if ".zh" not in page.name]
    texts: list[Text] = []
    for number in range(count):
        if kind == "random":
            drawn = [draw.randrange(3, vocab_size) for _ in range(num_prompt + num_answer)]
            texts.append((drawn[:num_prompt], drawn[num_prompt:]))
            continue
        if kind == "edit":  # the same code, with a name that has changed and a line after each def
            code = codes[number % len(codes)].read_text()
            code = code[code.index("    def ") :]
            edited = re.sub(r"(\n +def .*:\n)", r"\1        log.debug('called')\n", code)
            prompt, answer = words(code), words(edited.replace("num_", "count_of_"))
        elif kind == "extract":  # sentences of a page, quoted in JSON
            page = pages[number % len(pages)].read_text()[: num_prompt * 5]
            found = [s for s in re.split(r"(?<=[.|])\s", page) if len(s) > 40]
            draw.shuffle(found)
            quotes = [json.dumps({"number": at, "quote": s}) for at, s in enumerate(found * 9)]
            prompt, answer = words(page), words("\n".join(quotes))
        else:  # a page goes on
            page = pages[number % len(pages)].read_text()
            prompt, answer = words(page), words(page)[num_prompt:]
        texts.append((prompt[:num_prompt], answer[:num_answer]))
    assert all(len(answer) == num_answer for _, answer in texts), "an answer is too short"
    return texts


def is_long(path: Path) -> bool:
    """Whether a file has enough words."""
    return path.stat().st_size > 6000


@contextmanager
def given(answers: dict[int, list[int]]) -> Iterator[None]:
    """Let the token at each position of `answers[seed]` be what is sampled there."""

    class Given(Sampling):
        def wait(self) -> list[Sampled]:
            sampled = super().wait()
            return [
                replaced(one, token_id=answers[row.seed][position]) if answers else one
                for one, row, position in zip(sampled, self._rows, self._positions, strict=True)
            ]

    with mock.patch.object(results, "Sampling", Given):
        yield


@dataclass(frozen=True)
class Round:
    """One measurement of all answers of a batch.

    Attributes:
        seconds: from when all sequences have their first token until the last one's last.
        num_steps: steps in that time, and before it.
    """

    seconds: float
    num_steps: int
    num_draft_tokens: int
    num_accepted_tokens: int


def measure(llm: LLM, texts: list[Text], num_drafts: int) -> Round:
    """Let all answers be given at once, with at most `num_drafts` drafts."""
    engine: Any = llm._client._engine  # type: ignore[attr-defined]
    for scheduler in engine._replicas.schedulers:
        scheduler.config = replace(scheduler.config, speculative_tokens=num_drafts)
    before, steps_before = llm.stats(), engine._pace.num_steps
    times: list[float] = []
    began: dict[str, float] = {}

    def note(delta: Any) -> None:
        times.append(time.perf_counter())
        began.setdefault(delta.id, times[-1])

    requests = []
    for number, (prompt, answer) in enumerate(texts):
        params = SamplingParams(temperature=0, seed=number, max_tokens=len(answer), ignore_eos=True)
        requests.append(llm.request(prompt, params))
    for output, (_, answer) in zip(
        sorted(llm.stream(requests, note), key=lambda one: int(one.request_id)), texts, strict=True
    ):
        assert output.outputs[0].token_ids == answer, "an answer has changed"
    after = llm.stats()
    return Round(
        times[-1] - max(began.values()),
        engine._pace.num_steps - steps_before,
        after.num_draft_tokens - before.num_draft_tokens,
        after.num_accepted_tokens - before.num_accepted_tokens,
    )


def run(
    args: argparse.Namespace, llm: LLM, answers: dict[int, list[int]]
) -> Iterator[dict[str, Any]]:
    """A row for each kind of text and batch."""
    for batch in args.batch:
        for kind in args.kinds:
            texts = make_texts(kind, batch, args.prompt, args.answer, llm.model_config.vocab_size)
            answers.clear()
            answers |= {number: answer for number, (_, answer) in enumerate(texts)}
            rounds: dict[int, list[Round]] = {0: [], args.tokens: []}
            for number in range(args.rounds):
                for num_drafts in sorted(rounds, reverse=bool(number % 2)):
                    rounds[num_drafts].append(measure(llm, texts, num_drafts))
            yield row(kind, batch, args.answer, rounds)


def row(kind: str, batch: int, num_answer: int, rounds: dict[int, list[Round]]) -> dict[str, Any]:
    """The medians of all rounds."""
    (_, without), (num_drafts, with_drafts) = sorted(rounds.items())
    tokens = batch * (num_answer - 1)
    ratios = [one.seconds / two.seconds for one, two in zip(without, with_drafts, strict=True)]
    return {
        "text": kind,
        "batch": batch,
        "drafts": num_drafts,
        "tokens_per_s_without": tokens / statistics.median(one.seconds for one in without),
        "tokens_per_s": tokens / statistics.median(one.seconds for one in with_drafts),
        "ratio": statistics.median(ratios),
        "steps_without": without[0].num_steps,
        "steps": with_drafts[0].num_steps,
        "draft_tokens": with_drafts[0].num_draft_tokens,
        "accepted_tokens": with_drafts[0].num_accepted_tokens,
        "rounds": {str(n): [asdict(one) for one in several] for n, several in rounds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="16b-4l")
    parser.add_argument("--layers", type=int, help="of them (all)")
    parser.add_argument("--vocab-size", type=int, help="for a smaller head (the preset's)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=4, help="--speculative-tokens")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--prompt", type=int, default=500, help="tokens")
    parser.add_argument("--answer", type=int, default=128, help="tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="file for all figures")
    args = parser.parse_args()
    answers: dict[int, list[int]] = {}
    with tempfile.TemporaryDirectory() as folder, given(answers):
        asked = {"num_hidden_layers": args.layers, "vocab_size": args.vocab_size}
        given_sizes = {name: value for name, value in asked.items() if value is not None}
        Path(folder, "config.json").write_text(json.dumps(preset(args.preset, given_sizes)))
        with LLM(
            folder,
            device="cpu",
            dtype=args.dtype,
            load_format="dummy",
            tensor_parallel_size=args.tp,
            max_model_len=args.prompt + args.answer,
            enable_prefix_caching=False,
        ) as llm:
            heading = (
                "text",
                "batch",
                "tokens/s without",
                "with",
                "ratio",
                "steps",
                "right drafts",
            )
            print(("{:<9}{:>6}{:>18}{:>9}{:>8}{:>14}{:>14}").format(*heading), flush=True)
            found = []
            for one in run(args, llm, answers):
                found.append(one)
                print(
                    f"{one['text']:<9}{one['batch']:>6}{one['tokens_per_s_without']:>18.1f}"
                    f"{one['tokens_per_s']:>9.1f}{one['ratio']:>8.3f}"
                    f"{one['steps_without']:>8} →{one['steps']:>4}"
                    f"{one['accepted_tokens']:>8}/{one['draft_tokens']:<5}",
                    flush=True,
                )
    if args.json:
        Path(args.json).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
