"""A digest of the package's code: equal digests on two machines mean equal code."""

from __future__ import annotations

import hashlib
from pathlib import Path

import moespan

DIGEST_CHARACTERS = 12


def source_digest() -> str:
    """The first characters of the SHA-256 over the package's Python files and their names."""
    root = Path(moespan.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:DIGEST_CHARACTERS]
