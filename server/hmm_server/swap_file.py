"""The memory of the swap area: a file, mapped as a whole.

**Invariants**: every block of the file is there before the daemon serves, so that a full disk is an error at the start
and not the daemon's end at a write.

**Absent**: what is in it (`hmm.swap_area`).  It is worth nothing to a daemon that starts: it is overwritten.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from hmm.frame_contents import MemoryProvider, anonymous_memory
from hmm_server.config import Config, ConfigError

__all__ = ["swap_memory"]


def swap_memory(config: Config) -> MemoryProvider:
    """What gives the swap area its memory: the file of the configuration, or none: then it is the daemon's own."""
    if not config.swap_file:
        return anonymous_memory
    path = Path(config.swap_file)

    def provider(size_bytes: int) -> mmap.mmap:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)  # as swapon demands: nobody else's
        except OSError as error:
            raise ConfigError(f"swap_file {path}: {error.strerror}") from error
        try:
            os.ftruncate(file, size_bytes)
            os.posix_fallocate(file, 0, size_bytes)
            return mmap.mmap(file, size_bytes)
        except OSError as error:
            raise ConfigError(f"swap_file {path}: {size_bytes} bytes: {error.strerror}") from error
        finally:
            os.close(file)

    return provider
