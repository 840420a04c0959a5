"""Audits of the blocks and queues of a scheduler, for tests. They take O(blocks).

Each raises `AssertionError` with everything that is wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from moespan.engine.blocks import BlockAllocator
from moespan.engine.scheduler import Scheduler


def check_scheduler(scheduler: Scheduler) -> None:
    """No block is leaked or misused, and every sequence waits in its place."""
    in_flight = (sequence for _, batch in scheduler._in_flight for sequence, *_ in batch)
    returning = dict.fromkeys(sequence for sequence in in_flight if sequence.is_finished)
    check_blocks(scheduler.allocator, (s.block_table for s in (*scheduler.running, *returning)))
    problems = []
    for queue in (scheduler.running, scheduler.waiting):
        arrivals = [sequence.arrival for sequence in queue]
        if arrivals != sorted(set(arrivals)):
            problems.append(f"not in the order of arrival: {list(queue)}")
    siblings = [sequence for held in scheduler._siblings.values() for sequence in held]
    if any(sequence.block_table for sequence in (*scheduler.waiting, *siblings)):
        problems.append(f"a waiting sequence holds blocks: {[*scheduler.waiting, *siblings]}")
    if any(scheduler._live[sequence.id][0].index for sequence in siblings):
        problems.append(f"these wait for a sequence that has ended: {siblings}")
    if problems:
        raise AssertionError("; ".join(problems))


def check_blocks(allocator: BlockAllocator, tables: Iterable[Sequence[int]]) -> None:
    """The reference counts are those of a recount over `tables`, which are those of all sequences.

    So no block is leaked, freed too early, or in two states at once.
    """
    users: Counter[int] = Counter()
    problems = []
    for table in tables:
        users.update(table)
        if len(set(table)) < len(table):
            problems.append(f"a block occurs twice in the table {list(table)}")
    empty, cached = Counter(allocator._empty), Counter(allocator._cached.keys())
    for block in range(allocator.num_blocks):
        references, digest = allocator._references[block], allocator._digests[block]
        if references != users[block]:
            problems.append(f"block {block}: {references} references, {users[block]} users")
        known = digest is not None
        states = (0, 0) if references else (0, 1) if known else (1, 0)
        if (empty[block], cached[block]) != states:
            problems.append(
                f"block {block}: {empty[block]} times empty and {cached[block]} times cached "
                f"with {references} references and {'a' if known else 'no'} digest"
            )
        if digest is not None and allocator._published.get(digest) != block:
            problems.append(f"block {block}: its digest does not lead to it")
    if len(allocator._published) != sum(digest is not None for digest in allocator._digests):
        problems.append("a published digest leads to a block that has another one")
    if problems:
        raise AssertionError("KV blocks: " + "; ".join(problems))
