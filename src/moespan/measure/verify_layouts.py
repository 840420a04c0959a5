"""Verifies all layouts one after another on the same ranks, and finds where a wrong one differs."""

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
    """Result of one layout with one dispatch.

    Attributes:
        dispatch: how tokens reached experts (`moespan.parallel.dispatch`).
        sent_bytes_per_token: axis → bytes that all ranks together sent over the axis for one token.
        first_difference: where a failed layout first differs from one rank, in words; else None.
        seconds: time to build and to compare the layout.
    """

    layout: Layout
    dispatch: str
    report: VerifyReport
    sent_bytes_per_token: dict[str, float]
    first_difference: str | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values for JSON."""
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
        llm: an engine with as many ranks as each of `layouts`.
        one_rank: starts the same model on one rank. It is called if a layout fails, to find where
            the layout differs.
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
    """Axis of the model → bytes that all ranks together have sent over it in steps."""
    total: Counter[str] = Counter()
    for axis, _, module, _, sent in itertools.chain.from_iterable(llm.traffic()):
        if axis != "control" and module != "load":
            total[axis] += sent
    return dict(total)


def trace_against_reference(llm: LLM, reference: Reference, relative: float) -> dict[str, str]:
    """Compare values inside the network with those in the reference.

    The file may hold `p<i>.hidden<l>` [T, H], the input of layer l, and the router's choices
    `p<i>.layer<l>.topk_idx` and `p<i>.layer<l>.topk_weight` [T, K].

    Returns:
        Prompt → its first difference, in words. Prompts without a difference are left out.
    """
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
            limit = 1e-3  # more than rounding changes in float32, less than a bug changes
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
            # The file may list the chosen experts in another order.
            ordered = -np.sort(-weights, -1)
            yield Observation(layer, "router.weights", ordered.shape[1], ordered.tobytes())
