"""Tests of the digests that name prefixes."""

from __future__ import annotations

from moespan.engine.digests import DIGEST_BYTES, Digests

SIZE = 4
DIGESTS = Digests(SIZE)


def digests_of(token_ids: list[int], *names: str | int, by: Digests = DIGESTS) -> list[bytes]:
    digests: list[bytes] = []
    by.extend(digests, token_ids, by.root(*names))
    return digests


def test_only_full_blocks_have_digests():
    assert [len(digests_of([1] * n)) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]


def test_digests_extended_piece_by_piece_are_those_made_at_once():
    tokens = list(range(17))
    digests: list[bytes] = []
    for end in range(len(tokens) + 1):
        DIGESTS.extend(digests, tokens[:end], DIGESTS.root())
    assert digests == digests_of(tokens)


def test_a_digest_depends_on_every_token_before_it():
    tokens = [0] * 12
    last = {digests_of(tokens)[-1]}
    for i in range(12):
        last.add(digests_of([*tokens[:i], 1, *tokens[i + 1 :]])[-1])
    assert len(last) == 13


def test_tokens_that_join_to_the_same_bytes_have_different_digests():
    assert digests_of([1, 0, 0, 0]) != digests_of([256, 0, 0, 0])
    assert digests_of([1, 11, 1, 1]) != digests_of([11, 1, 1, 1])


def test_digests_of_different_roots_have_nothing_in_common():
    tokens = list(range(8))
    roots = [
        ("salt", "a"),
        ("salt", "b"),
        ("salta",),
        ("salt", 1),
        ("salt", "1"),
        ("salt", "\ud800"),
    ]
    found = [digest for names in roots for digest in digests_of(tokens, *names)]
    assert len(set(found)) == len(found) == 2 * len(roots)
    assert digests_of(tokens, "salt", "a") == digests_of(tokens, "salt", "a")
    root = DIGESTS.root("salt", "a")
    assert root not in found and len(root) == DIGEST_BYTES


def test_digests_are_keyed_anew_for_every_engine():
    digests = [digests_of([1, 2, 3, 4], by=Digests(SIZE))[0] for _ in range(3)]
    assert len(set(digests)) == 3
    assert DIGEST_BYTES >= 16 and {len(digest) for digest in digests} == {DIGEST_BYTES}
