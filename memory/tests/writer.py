"""A random program of memory operations, without end: writer.py SEED. The tests of this folder copy it while it runs."""

import ctypes, os, random, signal, sys, time

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mprotect.argtypes = libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mlock.argtypes = libc.munlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
PAGE, PRIVATE, ANON, SHARED, FAILED = 4096, 2, 0x20, 1, ctypes.c_void_p(-1).value
rnd = random.Random(int(sys.argv[1]))
areas = []  # [address, pages, may be written, may grow]
held = []  # what malloc gave
children = []


def new(pages=None, flags=PRIVATE | ANON, fd=-1):
    pages = pages or rnd.choice([1, 3, 17, 64, 700, 2500])
    at = libc.mmap(None, pages * PAGE, 3, flags, fd, 0)
    if at != FAILED:
        areas.append([at, pages, True, fd < 0 and flags & PRIVATE])


def part(area):
    first = rnd.randrange(area[1])
    return area[0] + first * PAGE, rnd.randint(1, min(area[1] - first, 300))


def write():
    area = rnd.choice(areas)
    if area[2]:
        at, pages = part(area)
        for i in range(0, pages, rnd.choice([1, 1, 2, 5])):
            # Now and then a page of zeros again.
            byte = rnd.randrange(256) if rnd.random() > 0.1 else 0
            size = PAGE if byte == 0 else rnd.choice([8, 100, PAGE])
            ctypes.memset(at + i * PAGE + (PAGE - size) // 2, byte, size)


def kernel_writes():
    area = rnd.choice(areas)
    if area[2]:
        at, pages = part(area)
        with open("/dev/urandom", "rb", buffering=0) as f:
            f.readinto((ctypes.c_char * (pages * PAGE)).from_address(at))


def advise():
    at, pages = part(rnd.choice(areas))
    libc.madvise(at, pages * PAGE, rnd.choice([4, 4, 8, 14, 15, 12, 13]))  # DONTNEED FREE HUGEPAGE NOHUGEPAGE MERGEABLE UNMERGEABLE


def remap():
    area = rnd.choice(areas)
    # What is behind the end of a file, or of shared memory, is SIGBUS.
    pages = max(1, area[1] + rnd.randint(-50, 200 if area[3] else 0))
    at = libc.mremap(area[0], area[1] * PAGE, pages * PAGE, 1)
    if at != FAILED:
        area[0], area[1] = at, pages


def unmap():
    if len(areas) > 6:
        area = areas.pop(rnd.randrange(len(areas)))
        libc.munmap(area[0], area[1] * PAGE)


def protect():
    area = rnd.choice(areas)
    area[2] = not area[2]
    libc.mprotect(area[0], area[1] * PAGE, 3 if area[2] else rnd.choice([0, 1]))


def lock():
    at, pages = part(rnd.choice(areas))
    (libc.mlock if rnd.random() < 0.5 else libc.munlock)(at, min(pages, 20) * PAGE)


def shared():
    if sum(1 for a in areas) < 40:
        new(rnd.randint(1, 40), SHARED | ANON)


def private_file():
    if len(areas) < 40:
        with open(os.__file__, "rb") as f:
            new(os.fstat(f.fileno()).st_size // PAGE, PRIVATE, f.fileno())


def heap():
    held.append(bytearray(rnd.randrange(1, 200_000)))
    if len(held) > 60:
        del held[rnd.randrange(len(held))]


def deep(n=200):
    return sum(bytes(rnd.randrange(1, 50))) if n == 0 else deep(n - 1) + 1


def fork():
    # Rarely, so that some live long enough to be followed.
    if rnd.random() > 0.05:
        return
    while len(children) >= 3:
        pid = children.pop(0)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    pid = os.fork()
    if pid == 0:
        # A child with a life of its own, some of which become another program.
        children.clear()
        rnd.seed(os.getpid())
        if rnd.random() < 0.2:
            os.execv("/bin/sleep", ["sleep", "100"])
        run([write, write, write, advise, heap, new, unmap])
    children.append(pid)


def run(what):
    while True:
        try:
            rnd.choice(what)()
        except (MemoryError, OSError):
            pass
        if sum(a[1] for a in areas) > 20_000:
            unmap()
        if rnd.random() < 0.05:
            time.sleep(0.001)


# CRIU dumps whole sessions.
os.setsid()
sys.setrecursionlimit(5000)
for _ in range(8):
    new()
print("ready", flush=True)
run([write] * 8 + [kernel_writes, advise, advise, remap, unmap, new, protect, lock, shared, private_file, heap, heap, deep] + ([fork] if len(sys.argv) > 2 else []))
