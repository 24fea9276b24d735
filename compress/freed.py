"""Memory that is no longer needed, handed back to the system."""

import ctypes
import gc


def give_back() -> None:
    """Collect cycles (traced programs are full of them) and return freed memory to the system."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
