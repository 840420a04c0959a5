"""Values inside the network for one prompt: recorded on every rank, collected by the leader,
compared with another recording."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from moespan.config import Coordinates
from moespan.engine.request import Request, SamplingParams, check_request
from moespan.engine.step import StepPlan, StepPlans
from moespan.errors import RequestError

if TYPE_CHECKING:
    from moespan.engine.scheduler import Scheduler
    from moespan.parallel.mesh import Mesh


class Observation(msgspec.Struct, frozen=True, array_like=True):
    """Values of one module in one layer (-1 before the first): float32 [rows, width] as bytes.

    Modules are those of `moespan.model.network.Model`: `embed`, `attention`, `router.experts`
    (sorted by number), `router.weights` (in their order) and `hidden`.
    """

    layer: int
    module: str
    width: int
    data: bytes

    @property
    def values(self) -> npt.NDArray[np.float32]:
        """The values [rows, width]."""
        return np.frombuffer(self.data, np.float32).reshape(-1, self.width)

    def __str__(self) -> str:
        return self.module if self.layer < 0 else f"layer {self.layer}, {self.module}"


_decode = msgspec.msgpack.Decoder(list[Observation]).decode


def check_trace(token_ids: list[int], scheduler: Scheduler, num_unfinished: int) -> None:
    """Raise `RequestError` if an engine with so many unfinished outputs cannot trace a prompt."""
    request = Request(id="trace", prompt_token_ids=token_ids, params=SamplingParams())
    check_request(request, scheduler.config.max_model_len, scheduler.vocab_size)
    most = scheduler.config.max_num_batched_tokens
    if num_unfinished:
        raise RequestError(
            f"a trace needs an idle engine, but {num_unfinished} outputs are unfinished; ask again "
            "when they have ended"
        )
    if len(token_ids) > most:
        raise RequestError(
            f"a trace computes all {len(token_ids)} tokens in one step of at most "
            f"max_num_batched_tokens={most}; use a shorter prompt"
        )


def run_trace(
    token_ids: list[int],
    scheduler: Scheduler,
    num_unfinished: int,
    mesh: Mesh,
    execute: Callable[[StepPlans], list[Observation]],
) -> list[Observation]:
    """On the leader: compute and record one prompt on an idle engine.

    Args:
        execute: has all ranks execute a step; → the leader's own recordings.

    Raises:
        RequestError: as from `check_trace`.
    """
    check_trace(token_ids, scheduler, num_unfinished)
    table = scheduler.allocator.take(scheduler.allocator.blocks_for(len(token_ids)))
    assert table is not None  # an idle engine has room for one sequence
    own = execute(trace_plan(token_ids, table, mesh.layout.dp))
    observations = collect_trace(mesh, own)
    scheduler.allocator.free(table)
    return observations


def trace_plan(token_ids: list[int], table: list[int], dp: int) -> StepPlans:
    """The step that computes and records one prompt on the first replica, in the blocks `table`."""
    plan = StepPlan(
        step=-1,
        token_ids=token_ids,
        query_lens=[len(token_ids)],
        context_lens=[0],
        block_tables=[table],
        samples=[],
    )
    return StepPlans.of([plan, *[None] * (dp - 1)], trace=True)


def collect_trace(mesh: Mesh, own: list[Observation]) -> list[Observation]:
    """On the leader: the recordings of all stages, once every rank has been given `trace_plan`.

    Args:
        own: the leader's part.
    """
    observations = []
    for stage in range(mesh.layout.pp):
        places = [Coordinates(stage, 0, sp, 0) for sp in range(mesh.layout.sp)]
        ranks = [mesh.layout.rank(place) for place in places]
        parts = [_decode(mesh.control.receive(rank)) if rank else own for rank in ranks]
        observations += join_rows(parts)
    if (speaker := mesh.speakers[0]) != mesh.rank:
        mesh.control.receive(speaker)  # its empty result
    return observations


def join_rows(parts: Sequence[list[Observation]]) -> list[Observation]:
    """Join the recordings of ranks that have consecutive rows of the same values."""
    return [
        Observation(same[0].layer, same[0].module, same[0].width, b"".join(o.data for o in same))
        for same in zip(*parts, strict=True)
    ]


def first_difference(
    ours: Sequence[Observation], theirs: Sequence[Observation], relative: float
) -> str | None:
    """The first place where two recordings of a prompt differ by more than `relative` of the
    largest value, as text; None if there is none. Values only in `ours` are not compared."""
    found = {(one.layer, one.module): one for one in ours}
    for other in theirs:
        one = found.get((other.layer, other.module))
        if one is None:
            return f"{other}: missing"
        if one.values.shape != other.values.shape:
            return f"{other}: shape {one.values.shape} instead of {other.values.shape}"
        difference = np.abs(one.values - other.values)
        scale = float(np.abs(other.values).max(initial=0)) or 1.0
        # Written so that a NaN differs.
        if difference.size and not difference.max() <= relative * scale:
            wrong = ~(difference.max(-1) <= relative * scale)
            return (
                f"{other}: first at token {int(wrong.argmax())}, by {difference.max() / scale:.1e} "
                "of the largest value"
            )
    return None
