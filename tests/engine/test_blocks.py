"""Tests of the block allocator: references, the prefix cache, eviction, and its own audit."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from moespan.engine.blocks import BlockAllocator
from moespan.engine.digests import Digests
from moespan.engine.integrity import check_blocks

SIZE = 4
DIGESTS = Digests(SIZE)


def digests_of(token_ids: list[int]) -> list[bytes]:
    digests: list[bytes] = []
    DIGESTS.extend(digests, token_ids, DIGESTS.root())
    return digests


def take(allocator: BlockAllocator, count: int, cached: Sequence[int] = ()) -> list[int]:
    """Take blocks, which must be there."""
    table = allocator.take(count, cached)
    assert table is not None
    return table


def take_published(allocator: BlockAllocator, token_ids: list[int]) -> list[int]:
    """Take the blocks of `token_ids`, all full, and publish them."""
    table = take(allocator, len(token_ids) // SIZE)
    for block, digest in zip(table, digests_of(token_ids), strict=True):
        allocator.publish(block, digest)
    return table


def test_taken_blocks_are_distinct_and_used_until_freed():
    allocator = BlockAllocator(5, SIZE)
    first, second = take(allocator, 2), take(allocator, 3)
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert (allocator.num_free, allocator.num_used) == (0, 5)
    allocator.free(first)
    assert (allocator.num_free, allocator.num_used) == (2, 3)
    assert sorted(take(allocator, 2)) == sorted(first)


def test_too_few_free_blocks_give_none_and_change_nothing():
    allocator = BlockAllocator(3, SIZE)
    table = take(allocator, 2)
    assert allocator.take(2) is None
    assert allocator.num_free == 1
    check_blocks(allocator, [table])


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_blocks_for_rounds_up(tokens, blocks):
    assert BlockAllocator(1, SIZE).blocks_for(tokens) == blocks


def test_only_published_blocks_are_found():
    allocator = BlockAllocator(4, SIZE)
    tokens = list(range(12))
    table, digests = take(allocator, 3), digests_of(tokens)
    assert allocator.match(digests) == []
    allocator.publish(table[0], digests[0])
    assert allocator.match(digests) == table[:1]
    allocator.publish(table[2], digests[2])
    assert allocator.match(digests) == table[:1]  # the chain ends where a block is missing
    allocator.publish(table[1], digests[1])
    assert allocator.match(digests) == table


def test_shared_blocks_are_freed_by_the_last_user():
    allocator = BlockAllocator(4, SIZE)
    first = take_published(allocator, list(range(8)))
    second = take(allocator, 1, allocator.match(digests_of(list(range(8)))))
    assert second[:2] == first
    assert allocator.num_used == 3
    check_blocks(allocator, [first, second])
    allocator.free(first)
    assert allocator.num_used == 3
    check_blocks(allocator, [second])
    allocator.free(second)
    assert allocator.num_used == 0
    check_blocks(allocator, [])


def test_freed_published_blocks_are_found_until_evicted():
    allocator = BlockAllocator(3, SIZE)
    digests = digests_of(list(range(8)))
    allocator.free(take_published(allocator, list(range(8))))
    assert len(allocator.match(digests)) == 2
    take(allocator, 1)  # the empty one goes first
    assert len(allocator.match(digests)) == 2
    take(allocator, 2)
    assert allocator.match(digests) == []


def test_a_cached_block_that_is_shared_is_not_counted_as_free_twice():
    allocator = BlockAllocator(2, SIZE)
    allocator.free(take_published(allocator, list(range(8))))
    shared = allocator.match(digests_of(list(range(8))))
    assert allocator.take(1, shared) is None
    check_blocks(allocator, [])
    assert take(allocator, 0, shared) == shared
    check_blocks(allocator, [shared])


def test_shared_blocks_are_not_evicted_for_the_new_blocks_of_the_same_take():
    allocator = BlockAllocator(3, SIZE)
    allocator.free(take_published(allocator, list(range(4))))
    allocator.free(take_published(allocator, list(range(10, 18))))
    shared = allocator.match(digests_of(list(range(4))))
    table = take(allocator, 2, shared)
    assert table[:1] == shared and len(set(table)) == 3
    check_blocks(allocator, [table])


def test_the_least_recently_used_prefix_is_evicted_first_and_its_tail_before_its_head():
    allocator = BlockAllocator(4, SIZE)
    old, new = list(range(8)), list(range(10, 18))
    tables = [take_published(allocator, tokens) for tokens in (old, new)]
    for table in tables:
        allocator.free(table)
    found = []
    for _ in range(4):
        take(allocator, 1)
        found.append([len(allocator.match(digests_of(t))) for t in (old, new)])
    assert found == [[1, 2], [0, 2], [0, 1], [0, 0]]


def test_using_a_cached_block_again_makes_it_recent():
    allocator = BlockAllocator(2, SIZE)
    for tokens in ([0] * 4, [1] * 4):
        allocator.free(take_published(allocator, tokens))
    allocator.free(take(allocator, 0, allocator.match(digests_of([0] * 4))))
    take(allocator, 1)
    assert len(allocator.match(digests_of([0] * 4))) == 1
    assert len(allocator.match(digests_of([1] * 4))) == 0


def test_of_two_blocks_with_equal_contents_the_first_is_known_and_the_other_becomes_empty():
    allocator = BlockAllocator(2, SIZE)
    first, second = take_published(allocator, [1] * 4), take_published(allocator, [1] * 4)
    assert allocator.match(digests_of([1] * 4)) == first
    check_blocks(allocator, [first, second])
    allocator.free(second)
    allocator.free(first)
    check_blocks(allocator, [])
    assert take(allocator, 1) == second  # empty, so it goes before the cached one
    assert allocator.match(digests_of([1] * 4)) == first


def test_retracted_blocks_are_not_found_and_not_kept():
    allocator = BlockAllocator(3, SIZE)
    table = take_published(allocator, list(range(8)))
    allocator.retract(table)
    assert allocator.match(digests_of(list(range(8)))) == []
    check_blocks(allocator, [table])
    allocator.free(table)
    check_blocks(allocator, [])
    assert len(take_published(allocator, list(range(8)))) == 2  # can be published anew


def test_a_block_freed_twice_is_refused():
    allocator = BlockAllocator(2, SIZE)
    table = take(allocator, 1)
    allocator.free(table)
    with pytest.raises(AssertionError, match=f"block {table[0]} is freed, but nobody uses it"):
        allocator.free(table)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda allocator, table: [], "block 0: 1 references, 0 users"),
        (lambda allocator, table: [table, table], "block 0: 1 references, 2 users"),
        (lambda allocator, table: [[*table, 0]], "a block occurs twice in the table"),
        (lambda allocator, table: [allocator._empty.append(0) or table], "block 0: 1 times empty"),
        (lambda allocator, table: [allocator._empty.pop() and table], "block 2: 0 times empty"),
        (lambda allocator, table: [allocator._published.clear() or table], "does not lead to it"),
        (lambda allocator, table: [allocator._published.update({b"?": 2}) or table], "published"),
    ],
)
def test_the_integrity_check_names_what_is_wrong(spoil, complaint):
    allocator = BlockAllocator(3, SIZE)
    table = take_published(allocator, list(range(8)))
    check_blocks(allocator, [table])
    with pytest.raises(AssertionError, match=complaint):
        check_blocks(allocator, spoil(allocator, table))


@pytest.mark.parametrize("seed", range(4))
def test_random_use_keeps_every_published_prefix_true(seed):
    """A model of the cache remembers the prefix for which each block was last published."""
    rng = random.Random(seed)
    allocator = BlockAllocator(9, SIZE)
    contents: dict[int, tuple[int, ...]] = {}  # block -> all tokens up to its end
    live: list[list[int]] = []
    num_hits = 0
    for _ in range(3000):
        if live and rng.random() < 0.5:
            allocator.free(live.pop(rng.randrange(len(live))))
        else:
            tokens = [rng.randrange(2) for _ in range(SIZE * rng.randint(1, 4))]
            tokens[: SIZE - 1] = [0] * (SIZE - 1)
            digests = digests_of(tokens)
            shared = allocator.match(digests)
            for i, block in enumerate(shared):
                assert contents[block] == tuple(tokens[: (i + 1) * SIZE])
            taken = allocator.take(len(digests) - len(shared), shared)
            if taken is not None:
                num_hits += len(shared)
                live.append(taken)
                for i in range(len(shared), rng.randint(len(shared), len(taken))):
                    contents[taken[i]] = tuple(tokens[: (i + 1) * SIZE])
                    allocator.publish(taken[i], digests[i])
        check_blocks(allocator, live)
    assert num_hits > 100
    for table in live:
        allocator.free(table)
    check_blocks(allocator, [])
    assert allocator.num_free == 9
