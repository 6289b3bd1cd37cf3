# SPDX-License-Identifier: Apache-2.0
"""Replicas and the ways they go wrong. Each is a context manager that takes away what it made."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import faulty_file
from guest import find_program
from host import Failure, expect, privileged, stop_process, wait_until

SECTOR_BYTES = 512


class FileReplica:
    """An image file. `path` is what the daemon opens, `image` holds the bytes to compare."""

    cache = "direct"

    def __init__(self, folder, name, size_bytes):
        self.name = name
        self.image = folder / f"{name}.img"
        self.path = self.image
        self.size_bytes = size_bytes

    def __enter__(self):
        with open(self.image, "wb") as file:
            file.truncate(self.size_bytes)
        return self

    def __exit__(self, *_):
        self.image.unlink(missing_ok=True)

    @property
    def argument(self):
        """The value of `--replica`."""
        return f"{self.path},name={self.name},cache={self.cache}"

    def spoil(self, sector, count, seed):
        """Writes garbage into `count` sectors, past the page cache's back so that a reader of the
        medium sees it."""
        with open(self.image, "r+b", buffering=0) as file:
            garbage = random.Random(seed).randbytes(count * SECTOR_BYTES)
            os.pwrite(file.fileno(), garbage, sector * SECTOR_BYTES)
            forget_cached(file)

    def truncate(self, size_bytes):
        """Cuts the image short while it is in use."""
        os.truncate(self.image, size_bytes)

    @property
    def _aside(self):
        return self.image.with_suffix(".aside")

    def take_away(self):
        """Removes the image from its place while it is in use."""
        self.image.rename(self._aside)

    def copy_aside(self):
        """Keeps a copy of the image as it is now."""
        subprocess.run(["cp", "--sparse=always", self.image, self._aside], check=True)

    def put_back(self):
        """Puts what was taken away, or copied, in the place of the image."""
        self._aside.rename(self.image)


class LoopReplica(FileReplica):
    """A loop device over a file. Once the file is cut short, reads beyond its end give EIO."""

    def __enter__(self):
        super().__enter__()
        self.path = privileged(find_program("losetup"), "--find", "--show", self.image)
        if os.geteuid() != 0:
            privileged("chown", str(os.getuid()), self.path)
        return self

    def __exit__(self, *_):
        privileged(find_program("losetup"), "--detach", self.path)
        super().__exit__()


class SmallTmpfsReplica(FileReplica):
    """A sparse image on a file system of its own that can be filled: writes then give ENOSPC."""

    cache = "buffered"

    def __init__(self, folder, name, size_bytes):
        super().__init__(folder, name, size_bytes)
        self._mount_point = folder / f"{name}-tmpfs"
        self.image = self._mount_point / f"{name}.img"
        self.path = self.image

    def __enter__(self):
        self._mount_point.mkdir()
        options = f"size={self.size_bytes},uid={os.getuid()},mode=700"
        privileged("mount", "-t", "tmpfs", "-o", options, "tmpfs", self._mount_point)
        return super().__enter__()

    def __exit__(self, *_):
        # Lazily: the daemon may be on its way out still.
        privileged("umount", "--lazy", self._mount_point)
        self._mount_point.rmdir()

    @property
    def _filler(self):
        return self._mount_point / "filler"

    def free(self):
        """Gives the space back."""
        self._filler.unlink()

    def fill(self):
        """Takes all space that is left."""
        with open(self._filler, "wb", buffering=0) as filler:
            for chunk in (bytes(1 << 20), bytes(4096)):
                try:
                    while True:
                        filler.write(chunk)
                except OSError:
                    continue


class FaultyReplica(FileReplica):
    """An image on a file system that goes wrong on command (`faulty_file.py`)."""

    DELAY_SECONDS = 0.0

    def __enter__(self):
        super().__enter__()
        self.path = self.image.with_suffix(".faulty")
        self.path.touch()
        self._control = self.image.with_suffix(".control")
        self._start()
        return self

    def _start(self):
        prefix = [] if os.geteuid() == 0 else ["sudo", "-n"]
        program = Path(__file__).with_name("faulty_file.py")
        command = [*prefix, sys.executable, program, "--delay", self.DELAY_SECONDS]
        command += [self.image, self.path, self._control]
        self._process = subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.PIPE, text=True
        )
        if self._process.stdout.readline() != "ready\n":
            raise Failure("the faulty file system ended; it needs root and /dev/fuse")
        if os.geteuid() != 0:
            privileged("chown", str(os.getuid()), self._control)

    def __exit__(self, *_):
        # Ended first: what still waits for an answer then fails instead of holding the mount.
        stop_process(self._process)
        self._process.stdout.close()
        privileged("umount", "--lazy", self.path)
        self.path.unlink()
        self._control.unlink()
        super().__exit__()

    def tell(self, command):
        """Sends a command. Returns its value, or `None` if it has none."""
        words = faulty_file.tell(self._control, command).split()
        expect(words[:1] == ["ok"], f"`{command}`: {' '.join(words)}")
        return int(words[1]) if len(words) > 1 else None


class SlowReplica(FaultyReplica):
    """An image on a file system that answers late."""

    DELAY_SECONDS = 0.5


class BufferingReplica(FaultyReplica):
    """An image that gets only what was flushed; the rest is in memory, and can be lost."""

    def __enter__(self):
        super().__enter__()
        self.tell("buffer on")
        return self


def expect_equal_soon(replicas, seconds=30):
    """Fails unless all images become the same within some time; nobody may write meanwhile."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if all(first_difference(replicas[0].image, each.image) is None for each in replicas[1:]):
            return
        time.sleep(0.2)
    expect_equal(replicas)


def expect_equal(replicas):
    """Fails unless all images hold the same bytes, and tells the first sector that differs."""
    first = replicas[0]
    for other in replicas[1:]:
        sector = first_difference(first.image, other.image)
        expect(sector is None, f"{first.name} and {other.name} differ from sector {sector} on")


def forget_cached(file):
    """Writes back and drops what the page cache holds of a file: the daemon goes past it, and a
    page that was cached at the wrong moment would show what is no longer on the medium."""
    os.fdatasync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def first_difference(one, other, chunk_bytes=1 << 20):
    """The first sector in which two files differ, or `None`."""
    offset = 0
    with open(one, "rb") as left, open(other, "rb") as right:
        forget_cached(left)
        forget_cached(right)
        while True:
            a, b = left.read(chunk_bytes), right.read(chunk_bytes)
            if a != b:
                for start in range(0, max(len(a), len(b)), SECTOR_BYTES):
                    if a[start : start + SECTOR_BYTES] != b[start : start + SECTOR_BYTES]:
                        return (offset + start) // SECTOR_BYTES
            if not a:
                return None
            offset += len(a)
