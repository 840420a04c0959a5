"""Digests that name the prefixes of token ids, block by block. Imports no torch."""

from __future__ import annotations

import hashlib
import secrets
import struct
from collections.abc import Sequence

DIGEST_BYTES = 16


class Digests:
    """Names a full block by its tokens and by all tokens before it.

    The chain of digests of a prompt begins with a root: prefixes with different roots have no
    digest in common. The digests have a random key of this process, so no client can make two
    prefixes collide.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._key = secrets.token_bytes(32)

    def root(self, *names: str | int) -> bytes:
        """A root that belongs to `names` alone."""
        return hashlib.blake2b(
            repr(names).encode(errors="surrogatepass"),
            key=self._key,
            digest_size=DIGEST_BYTES,
            person=b"root",
        ).digest()

    def extend(self, digests: list[bytes], token_ids: Sequence[int], root: bytes) -> None:
        """Extend the digests of the first blocks of `token_ids` to all its full blocks."""
        size = self._block_size
        for start in range(len(digests) * size, len(token_ids) - size + 1, size):
            digest = hashlib.blake2b(key=self._key, digest_size=DIGEST_BYTES)
            digest.update(digests[-1] if digests else root)
            digest.update(struct.pack(f"<{size}I", *token_ids[start : start + size]))
            digests.append(digest.digest())
