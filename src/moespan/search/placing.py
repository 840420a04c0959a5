"""What a placement of experts by recorded counts is worth to a candidate of a plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moespan.planner.cost import StepCost
from moespan.planner.expert_balance import balanced_layers
from moespan.search.explore import Found, Question, typical_step

WORTHWHILE = 0.02
"""Least share of a decode step that a proposal saves: less is within the prediction's error."""


def proposed_placement(question: Question, one: Found) -> dict[str, Any] | None:
    """Seconds of a typical decode step with experts placed as now and by the counts of the routing;
    None where there are no counts, every rank has all experts, or it does not pay."""
    counts, config = question.routing.counts, one.candidate.config
    if not counts or config.layout.ep == 1:
        return None
    placed = replace(config, expert_placement=balanced_layers(counts, config.layout.ep))
    step = typical_step(question, one)
    now_s, placed_s = (
        sum(StepCost(question.profile, question.model, each, question.routing).stages_s(step))
        for each in (config, placed)
    )
    if placed_s > (1 - WORTHWHILE) * now_s:
        return None
    return {"counts": question.routing.name, "now_s": now_s, "placed_s": placed_s}
