"""Moves a mapping to where the kernel makes it one with its neighbour, away again, and writes to the neighbour, without end."""

import ctypes, os, time

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
PAGE, PRIVATE_ANONYMOUS, FAILED = 4096, 0x22, ctypes.c_void_p(-1).value
PAGES, MOVED = 64, 4


def new(pages):
    at = libc.mmap(None, pages * PAGE, 3, PRIVATE_ANONYMOUS, -1, 0)
    assert at != FAILED
    return at


def move(at, to):
    assert libc.mremap(at, MOVED * PAGE, MOVED * PAGE, 3, to) == to
    return to


os.setsid()
room = new(PAGES + 3 * MOVED)
# Holes on both sides of the neighbour, so that it becomes one with nothing else.
neighbour = room + 2 * MOVED * PAGE
libc.munmap(room, 2 * MOVED * PAGE)
libc.munmap(neighbour + PAGES * PAGE, MOVED * PAGE)
away = new(3 * MOVED) + MOVED * PAGE
libc.munmap(away - MOVED * PAGE, 3 * MOVED * PAGE)
# Never touched: one with pages of its own stays a mapping of its own.
moved = new(MOVED)
print("ready", flush=True)
count = 0
while True:
    count += 1
    moved = move(moved, neighbour - MOVED * PAGE)
    for page in range(count % 7, PAGES, 7):
        ctypes.memset(neighbour + page * PAGE, count % 255 + 1, PAGE)
    moved = move(moved, away)
    # Long enough to be looked at there, and looked at once more before it comes back.
    time.sleep(0.05)
