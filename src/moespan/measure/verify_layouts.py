"""Is every layout right? Runs them one after the other on the same ranks, and says where a wrong
one begins to differ."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from moespan.config import Layout
from moespan.engine.trace import Observation, first_difference
from moespan.front.llm import LLM
from moespan.measure.verify import Reference, VerifyReport, verify


@dataclass(frozen=True)
class LayoutReport:
    """How one layout compares.

    Attributes:
        dispatch: how tokens met experts.
        sent_bytes_per_token: axis → bytes that all ranks together sent over it for one token.
        first_difference: where a layout that failed first differs from one rank, in words.
        seconds: what building and comparing it took.
    """

    layout: Layout
    dispatch: str
    report: VerifyReport
    sent_bytes_per_token: dict[str, float]
    first_difference: str | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        return {
            **self.report.to_dict(),
            "dispatch": self.dispatch,
            "sent_bytes_per_token": self.sent_bytes_per_token,
            "first_difference": self.first_difference,
            "seconds": self.seconds,
        }


def verify_layouts(
    llm: LLM,
    layouts: list[Layout],
    reference: Reference,
    one_rank: Callable[[], LLM],
) -> Iterator[LayoutReport]:
    """Compare every layout, with every dispatch that applies to it, and yield the reports.

    Args:
        llm: running on as many ranks as each of `layouts` has.
        one_rank: starts the same model on one rank; called when a layout fails, to find out where.
    """
    cases = [(layout, dispatch) for layout in layouts for dispatch in layout.dispatches]
    for layout, dispatch in cases:
        started = time.perf_counter()
        llm.relayout(layout, dispatch)
        report = verify(llm, reference)
        sent = sent_bytes(llm)
        tokens = sum(
            len(reference.ids(name)) + max(len(reference.greedy(name) or ()) - 1, 0)
            for name in reference.prompts
        )
        difference = None
        if report.failures:
            difference = _first_difference(llm, one_rank, reference)
        yield LayoutReport(
            layout,
            dispatch,
            report,
            {axis: sent_bytes / tokens for axis, sent_bytes in sent.items()},
            difference,
            time.perf_counter() - started,
        )


def sent_bytes(llm: LLM) -> dict[str, int]:
    """Axis → bytes that all ranks together have sent over it in steps; the model's axes only."""
    total: Counter[str] = Counter()
    for axis, _, module, _, sent in itertools.chain.from_iterable(llm.traffic()):
        if axis != "control" and module != "load":
            total[axis] += sent
    return dict(total)


def trace_against_reference(llm: LLM, reference: Reference, relative: float) -> dict[str, str]:
    """Prompt → where what the network computes inside first differs from what the file holds: of
    `p<i>.hidden<l>` [T, H], what goes into layer l, and `p<i>.layer<l>.topk_idx` and
    `.topk_weight` [T, K]. Prompts that nowhere differ are left out."""
    found = {}
    for name in reference.prompts:
        expected = list(_expected(llm, reference, name))
        difference = first_difference(llm.trace(reference.ids(name)), expected, relative)
        if difference is not None:
            found[name] = difference
    return found


def _first_difference(llm: LLM, one_rank: Callable[[], LLM], reference: Reference) -> str:
    with one_rank() as single:
        for name in reference.prompts:
            ids = reference.ids(name)
            limit = 1e-3  # beyond what rounding does to float32, within what a bug does
            difference = first_difference(llm.trace(ids), single.trace(ids), limit)
            if difference is not None:
                return f"{name}, {difference}"
    return "none in the layers, when the first replica computes a prompt in one step"


def _expected(llm: LLM, reference: Reference, name: str) -> Iterator[Observation]:
    for layer in range(llm.model_config.num_hidden_layers):
        hidden = reference.get(f"{name}.hidden{layer}")
        if hidden is not None:
            module = "hidden" if layer else "embed"
            yield Observation(layer - 1, module, hidden.shape[1], hidden.tobytes())
        chosen = reference.get(f"{name}.layer{layer}.topk_idx")
        if chosen is not None:
            ordered = np.sort(chosen, -1)
            yield Observation(layer, "router.experts", ordered.shape[1], ordered.tobytes())
        weights = reference.get(f"{name}.layer{layer}.topk_weight")
        if weights is not None:
            # The file's order among the chosen ones need not be ours.
            ordered = -np.sort(-weights, -1)
            yield Observation(layer, "router.weights", ordered.shape[1], ordered.tobytes())
