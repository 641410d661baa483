"""Why is the same training step sometimes half as fast? Because the C library gives memory back and must fetch it again.

glibc returns large freed blocks to the system at once, and every page of the next one is then fetched and zeroed anew: on a small
machine that cost up to a third of a BDH training step, and it came and went with the order of allocations. A process that trains
keeps what it has freed. A process that measures memory does not.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_ONE_GIB = 2**30


def keep_freed_memory() -> bool:
    """Reuse freed blocks of up to 1 GiB in this process; False where the C library cannot be told."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent in musl
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _ONE_GIB) and mallopt(_TRIM_THRESHOLD, 2 * _ONE_GIB - 1))
