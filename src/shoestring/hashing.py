"""Hash of anything, the same on every machine and in every process."""

from __future__ import annotations

import hashlib


def stable_hash(*parts: object) -> int:
    """64 bits of SHA-256 over the parts: the same on every machine and in every run.

    >>> stable_hash("train", 3) == stable_hash("train", 3) != stable_hash("test", 3)
    True
    """
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "big")
