"""The program of the demo recording: python3 -I -S demo.py."""

import ctypes
import mmap
import os
import tempfile
import threading

PAGE = mmap.PAGESIZE
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
libc = ctypes.CDLL(None, use_errno=True)


def grow() -> None:
    """Small objects push the break up; a buffer too large for the heap moves while it grows."""
    words = [str(number) * 3 for number in range(12_000)]
    buffer = bytearray()
    for _ in range(12):
        buffer += bytes(400_000)
    del words, buffer


def share_with_a_child() -> None:
    """A forked child writes into shared memory, and into a copy of private memory."""
    shared = mmap.mmap(-1, 16 * PAGE)
    private = mmap.mmap(-1, 64 * PAGE, flags=PRIVATE)
    private[:PAGE] = b"p" * PAGE
    child = os.fork()
    if child == 0:
        shared[:5] = b"child"
        private[:5] = b"child"
        scratch = mmap.mmap(-1, 256 * PAGE, flags=PRIVATE)
        scratch[::PAGE] = b"s" * 256
        scratch.close()
        os._exit(0)
    os.waitpid(child, 0)
    kept.extend((shared, private))


def edit_a_file() -> None:
    """A file is mapped, written, grown and written back."""
    with tempfile.TemporaryFile(dir="/tmp") as file:
        file.truncate(32 * PAGE)
        table = mmap.mmap(file.fileno(), 32 * PAGE)
        table[::PAGE] = b"t" * 32
        table.resize(96 * PAGE)
        table[-1:] = b"e"
        table.flush()
        kept.append(table)


def protect_pieces() -> None:
    """Protection changes split an area into pieces, and join some of them again."""
    area = mmap.mmap(-1, 32 * PAGE, flags=PRIVATE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for page in range(0, 32, 4):
        libc.mprotect(ctypes.c_void_p(start + page * PAGE), PAGE, mmap.PROT_READ)
    for page in range(0, 32, 8):
        libc.mprotect(ctypes.c_void_p(start + page * PAGE), PAGE, mmap.PROT_READ | mmap.PROT_WRITE)
    kept.append(area)


def work(number: int) -> None:
    """What each thread does: use memory, give it back, move it, and allocate from an arena of its own."""
    mine = mmap.mmap(-1, (number + 1) * 64 * PAGE, flags=PRIVATE)
    for _ in range(3):
        mine[::PAGE] = bytes(len(mine) // PAGE)
        mine.madvise(mmap.MADV_DONTNEED)
    mine.resize(len(mine) * 2)
    mine.close()
    sum(len(bytes(200_000 * (turn + 1))) for turn in range(4))


kept: list[mmap.mmap] = []
grow()
share_with_a_child()
edit_a_file()
protect_pieces()
threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
os.posix_spawn("/bin/true", ["true"], {})
os.wait()
