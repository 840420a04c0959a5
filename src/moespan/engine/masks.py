"""The way of masks (`SampleRow.allowed`) to the ranks that sample with them.

A mask has a bit for each token of the vocabulary: 12.8 KB for 102,400 tokens. Plans are broadcast
without them. The leader sends the masks of a replica's plan to its speaker only, right after the
plan; its own plan keeps them. So nothing is sent where the leader is the only speaker: with dp=1
and pp=1.
"""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from moespan.engine.step import StepPlan
from moespan.parallel.mesh import Mesh

Masks = dict[int, bytes]
"""Index into a plan's samples → `allowed` of that row."""


def masks_of(plan: StepPlan | None) -> Masks:
    """All masks of a plan."""
    rows = () if plan is None else plan.samples
    return {at: row.allowed for at, row in enumerate(rows) if row.allowed is not None}


def without_masks(plan: StepPlan | None) -> StepPlan | None:
    """The plan as it is broadcast: rows that have a mask have an empty one."""
    masks = masks_of(plan)
    return plan if plan is None or not masks else _with(plan, dict.fromkeys(masks, b""))


def send_masks(mesh: Mesh, plans: list[StepPlan | None]) -> None:
    """On the leader: send the masks of each replica's plan to its speaker."""
    for plan, speaker in zip(plans, mesh.speakers, strict=True):
        masks = masks_of(plan)
        if masks and speaker != mesh.rank:
            mesh.control.send(msgspec.msgpack.encode(masks), "masks", speaker)


def with_masks(mesh: Mesh, plan: StepPlan | None) -> StepPlan | None:
    """On a follower: the plan of its replica, with its masks if it is the speaker."""
    if plan is None or not mesh.is_speaker or not masks_of(plan):
        return plan
    return _with(plan, _decode(mesh.control.receive(0)))


def _with(plan: StepPlan, masks: Masks) -> StepPlan:
    rows = list(plan.samples)
    for at, allowed in masks.items():
        rows[at] = replace(rows[at], allowed=allowed)
    return replace(plan, samples=rows)


_decode = msgspec.msgpack.Decoder(Masks).decode
