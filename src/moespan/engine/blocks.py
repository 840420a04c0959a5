"""Blocks of the KV cache: their users, and the prefixes they hold for reuse.

Counts and digests only: the worker has the tensors, and the scheduler decides who gets a block.

A block is in one of three states:

| state | references | digest | left by |
|---|---|---|---|
| empty | 0 | no | `take` |
| used | 1 or more; above 1 if sequences share a prefix | once published | `free` by the last user |
| cached | 0 | yes | `take`, which shares it, or evicts it if none is empty |
"""

from __future__ import annotations

import hashlib
import secrets
import struct
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

DIGEST_BYTES = 16


class BlockAllocator:
    """Hands out `num_blocks` blocks of `block_size` tokens, and finds the blocks of known prefixes.

    A full block is named by a digest of its tokens and all tokens before it. The digest has a
    random key of this process, so no client can make two prefixes collide. Allocators with the
    same `key` have the same digests.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool = True,
        key: bytes | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._key = key or secrets.token_bytes(32)
        self._references = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._published: dict[bytes, int] = {}
        self._empty = list(reversed(range(num_blocks)))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_free(self) -> int:
        """Blocks that `take` can hand out: empty and cached ones."""
        return len(self._empty) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks in use by sequences."""
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Number of blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def take(self, num_new: int, shared: Sequence[int] = ()) -> list[int] | None:
        """Use the blocks `shared` (from `match`) and `num_new` others; None if too few are free."""
        revived = sum(self._references[block] == 0 for block in shared)
        if num_new + revived > self.num_free:
            return None
        for block in shared:
            self._cached.pop(block, None)
        table = [*shared, *(self._empty_one() for _ in range(num_new))]
        for block in table:
            self._references[block] += 1
        return table

    def free(self, table: Sequence[int]) -> None:
        """Give back a table from `take`, last block first, so that the last is evicted first."""
        for block in reversed(table):
            if self._references[block] == 0:
                raise AssertionError(f"block {block} is freed, but nobody uses it")
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._digests[block] is None:
                    self._empty.append(block)
                else:
                    self._cached[block] = None

    def extend_digests(self, digests: list[bytes], token_ids: Sequence[int]) -> None:
        """Extend the digests of the first blocks of `token_ids` to all its full blocks.

        With prefix caching off they stay empty, so that nothing is published or found.
        """
        if not self.enable_prefix_caching:
            return
        size = self.block_size
        for start in range(len(digests) * size, len(token_ids) - size + 1, size):
            digest = hashlib.blake2b(key=self._key, digest_size=DIGEST_BYTES)
            digest.update(digests[-1] if digests else bytes(DIGEST_BYTES))
            digest.update(struct.pack(f"<{size}I", *token_ids[start : start + size]))
            digests.append(digest.digest())

    def match(self, digests: Iterable[bytes]) -> list[int]:
        """Find the published blocks of the longest prefix of `digests`."""
        blocks: list[int] = []
        for digest in digests:
            block = self._published.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def publish(self, block: int, digest: bytes) -> None:
        """Let `match` find `block`, which is in use and fully computed.

        If two blocks have equal contents, the first stays published.
        """
        if self._published.setdefault(digest, block) == block:
            self._digests[block] = digest

    def retract(self, table: Iterable[int]) -> None:
        """Let `match` no longer find the blocks of `table`, which are in use: they are corrupt."""
        for block in table:
            digest = self._digests[block]
            if digest is not None:
                del self._published[digest]
                self._digests[block] = None

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Compare the reference counts with a recount over `tables`, those of all sequences.

        Raises:
            AssertionError: a block is leaked, freed too early, or in two states at once.
        """
        users: Counter[int] = Counter()
        problems = []
        for table in tables:
            users.update(table)
            if len(set(table)) < len(table):
                problems.append(f"a block occurs twice in the table {list(table)}")
        empty, cached = Counter(self._empty), Counter(self._cached.keys())
        for block in range(self.num_blocks):
            references, digest = self._references[block], self._digests[block]
            if references != users[block]:
                problems.append(f"block {block}: {references} references, {users[block]} users")
            known = digest is not None
            states = (0, 0) if references else (0, 1) if known else (1, 0)
            if (empty[block], cached[block]) != states:
                problems.append(
                    f"block {block}: {empty[block]} times empty and {cached[block]} times cached "
                    f"with {references} references and {'a' if known else 'no'} digest"
                )
            if digest is not None and self._published.get(digest) != block:
                problems.append(f"block {block}: its digest does not lead to it")
        if len(self._published) != sum(digest is not None for digest in self._digests):
            problems.append("a published digest leads to a block that has another one")
        if problems:
            raise AssertionError("KV blocks: " + "; ".join(problems))

    def _empty_one(self) -> int:
        """Take an empty block; if there is none, evict the least recently used cached one."""
        if self._empty:
            return self._empty.pop()
        block, _ = self._cached.popitem(last=False)
        digest, self._digests[block] = self._digests[block], None
        if digest is not None:
            del self._published[digest]
        return block
