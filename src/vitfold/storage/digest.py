"""The digest of a file, the same for bundles, sources and caches."""

from __future__ import annotations

import hashlib
from pathlib import Path

_CHUNK_BYTES = 1 << 22


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal, read in pieces."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            total.update(chunk)
    return total.hexdigest()
