# SPDX-License-Identifier: Apache-2.0
"""Where the replicas lie while they are measured."""

import os
import shutil
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "vm"))

from host import privileged  # noqa: E402
from replica import FaultyReplica  # noqa: E402

NAMES = ("alpha", "beta", "gamma")
# Three of them are far more than the processor's caches hold.
DISK_BYTES = 512 << 20
# Behind a file system in Python nobody gets far.
SMALL_DISK_BYTES = 64 << 20
LATE_SECONDS = 0.5
FLUSH_SECONDS = 0.3


class Storage:
    """Three equal images. `paths` is what servers open, `direct` how."""

    def __init__(self, paths, direct):
        self.paths = paths
        self.direct = direct

    def prepare(self, server):
        """Before each run of `server`."""

    def ready(self):
        """After its start, before the load."""


class Cached(Storage):
    """Drops the images from the page cache and reads them from front to back: ours drops them when
    it starts (rule F4), the peer does not, and reads at random would bring them back page by page
    during the measurement, into smaller pages than the peer's. After this the cache is the same
    for all."""

    def ready(self):
        for path in self.paths:
            with open(path, "rb", buffering=0) as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while file.read(1 << 20):
                    pass


class Late(Storage):
    """The last replica answers late, but not to the server named "healthy"."""

    def __init__(self, replicas):
        super().__init__([replica.path for replica in replicas], direct=True)
        self._last = replicas[-1]
        self._server = None

    def prepare(self, server):
        self._last.tell("delay 0")
        self._server = server

    def ready(self):
        if self._server != "healthy":
            self._last.tell(f"delay {LATE_SECONDS}")


@contextmanager
def cached(folder):
    """XFS on a loop device over a file on tmpfs: the page cache with a real file system's
    non-blocking path, which tmpfs itself lacks."""
    with ExitStack() as undo:
        memory, mount = folder / "memory", folder / "xfs"
        for path in (memory, mount):
            path.mkdir()
        size = 4 * DISK_BYTES
        privileged("mount", "-t", "tmpfs", "-o", f"size={size + (64 << 20)}", "tmpfs", memory)
        undo.callback(privileged, "umount", "--lazy", memory)
        backing = memory / "device"
        privileged("truncate", "-s", size, backing)
        device = privileged("losetup", "--find", "--show", backing)
        undo.callback(privileged, "losetup", "--detach", device)
        privileged("mkfs.xfs", "-q", device)
        privileged("mount", device, mount)
        undo.callback(privileged, "umount", "--lazy", mount)
        privileged("chown", os.getuid(), mount)
        yield Cached(make_images(mount, DISK_BYTES), direct=False)


@contextmanager
def direct(folder):
    """The file system that holds /var/tmp, or TMPDIR if that is set, past the page cache."""
    path = folder / "direct"
    path.mkdir()
    try:
        yield Storage(make_images(path, DISK_BYTES), direct=True)
    finally:
        shutil.rmtree(path)


@contextmanager
def faulty(folder, name):
    """Three images behind a file system that is late on command."""
    path = folder / name
    path.mkdir()
    with ExitStack() as undo:
        replicas = [FaultyReplica(path, each, SMALL_DISK_BYTES) for each in NAMES]
        yield [undo.enter_context(replica) for replica in replicas]


@contextmanager
def slow(folder):
    """One of three replicas is late."""
    with faulty(folder, "slow") as replicas:
        yield Late(replicas)


@contextmanager
def flush(folder):
    """Every flush takes its time."""
    with faulty(folder, "flush") as replicas:
        for replica in replicas:
            replica.tell(f"delay {FLUSH_SECONDS} fsync")
        yield Storage([replica.path for replica in replicas], direct=True)


def make_images(folder, size):
    """Three equal images, written out so that nothing is measured but overwriting."""
    images = [folder / f"{name}.img" for name in NAMES]
    chunk = os.urandom(1 << 20)
    for image in images:
        with open(image, "wb") as file:
            for _ in range(size >> 20):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    return images


STORAGE = {"cached": cached, "direct": direct, "slow": slow, "flush": flush}
