"""Which code this is: the same digest on two machines means the same package."""

from __future__ import annotations

import hashlib
from pathlib import Path

import moespan

DIGEST_CHARACTERS = 12


def source_digest() -> str:
    """The beginning of the SHA-256 of the package's Python files, with their names."""
    root = Path(moespan.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:DIGEST_CHARACTERS]
