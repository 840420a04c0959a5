"""Blocks of the KV cache: their users, and the prefixes they hold for reuse.

Counts and digests (`digests`) only: the worker has the tensors, and the scheduler decides who gets
a block.

A block is in one of three states:

| state | references | digest | left by |
|---|---|---|---|
| empty | 0 | no | `take` |
| used | 1 or more; above 1 if sequences share a prefix | once published | `free` by the last user |
| cached | 0 | yes | `take`, which shares it, or evicts it if none is empty |
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockAllocator:
    """Hands out `num_blocks` blocks of `block_size` tokens, and finds those of known prefixes."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
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

    def _empty_one(self) -> int:
        """Take an empty block; if there is none, evict the least recently used cached one."""
        if self._empty:
            return self._empty.pop()
        block, _ = self._cached.popitem(last=False)
        digest, self._digests[block] = self._digests[block], None
        if digest is not None:
            del self._published[digest]
        return block
