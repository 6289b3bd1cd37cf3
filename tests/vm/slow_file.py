# SPDX-License-Identifier: Apache-2.0
"""A file system that is one file, and slow: every read, write and sync is answered late.

  slow_file.py IMAGE MOUNT_POINT DELAY_SECONDS

Shows IMAGE at MOUNT_POINT, an existing empty file. Speaks the kernel's FUSE protocol itself
(include/uapi/linux/fuse.h), because nbdfuse does one write after another: with half a second each
that would be two a second, which is not a slow disk but a stopped one. Here requests wait side by
side. Needs root. Ends when it is unmounted or terminated.
"""

import ctypes
import errno
import heapq
import os
import select
import signal
import stat
import struct
import sys
import time

# Operations, by their numbers in the protocol.
FORGET, GETATTR, OPEN, READ, WRITE = 2, 3, 14, 15, 16
STATFS, RELEASE, FSYNC, FLUSH, INIT = 17, 18, 20, 25, 26
INTERRUPT, DESTROY, BATCH_FORGET = 36, 38, 42
WITHOUT_ANSWER = (FORGET, INTERRUPT, BATCH_FORGET)
LATE = (READ, WRITE, FSYNC)

PROTOCOL_MAJOR, PROTOCOL_MINOR = 7, 31
# Of INIT: reads side by side, large writes, direct I/O that does not block its caller.
INIT_FLAGS = 1 << 0 | 1 << 5 | 1 << 15
# Of OPEN: past the page cache, writes side by side.
OPEN_FLAGS = 1 << 0 | 1 << 6
REQUESTS_AT_ONCE = 256
WRITE_BYTES_MAX = 128 << 10

IN_HEADER = struct.Struct("<IIQQIIIHH")
OUT_HEADER = struct.Struct("<IiQ")
ATTRIBUTES = struct.Struct("<QQQQQQIIIIIIIIII")
READ_IN = struct.Struct("<QQIIQII")


class SlowFile:
    """Answers the kernel's requests on one image."""

    def __init__(self, image, mount_point, delay_seconds):
        self._image = os.open(image, os.O_RDWR)
        self._delay_seconds = delay_seconds
        self._waiting = []
        self._order = 0
        self._device = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK)
        mode = stat.S_IFREG
        options = f"fd={self._device},rootmode={mode:o},user_id=0,group_id=0,allow_other"
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"slow", os.fsencode(mount_point), b"fuse", 0, options.encode()) != 0:
            raise OSError(ctypes.get_errno(), "cannot mount")

    def serve(self):
        """Answers until the file system is unmounted."""
        poller = select.poll()
        poller.register(self._device, select.POLLIN)
        while True:
            timeout_ms = None
            if self._waiting:
                timeout_ms = max(0, (self._waiting[0][0] - time.monotonic()) * 1000)
            poller.poll(timeout_ms)
            if not self._take_requests():
                return
            while self._waiting and self._waiting[0][0] <= time.monotonic():
                self._answer(*heapq.heappop(self._waiting)[2:])

    def _take_requests(self):
        """Takes what the kernel has. Returns false if that is the end."""
        while True:
            try:
                request = os.read(self._device, WRITE_BYTES_MAX + 4096)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EINTR, errno.ENOENT):
                    return True
                return False
            _, operation, unique, *_ = IN_HEADER.unpack_from(request)
            body = request[IN_HEADER.size :]
            if operation in WITHOUT_ANSWER:
                continue
            if operation in LATE:
                self._order += 1
                due = time.monotonic() + self._delay_seconds
                heapq.heappush(self._waiting, (due, self._order, operation, unique, body))
            else:
                self._answer(operation, unique, body)
            if operation == DESTROY:
                return False

    def _answer(self, operation, unique, body):
        try:
            code, answer = 0, self._do(operation, body)
        except OSError as error:
            code, answer = -error.errno, b""
        header = OUT_HEADER.pack(OUT_HEADER.size + len(answer), code, unique)
        try:
            os.write(self._device, header + answer)
        except OSError as error:
            # The request was interrupted, or the file system is going away.
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise

    def _do(self, operation, body):
        if operation == INIT:
            return struct.pack(
                "<IIIIHHIIHHII24x",
                *(PROTOCOL_MAJOR, PROTOCOL_MINOR, 0, INIT_FLAGS),
                *(REQUESTS_AT_ONCE, REQUESTS_AT_ONCE, WRITE_BYTES_MAX, 1, 0, 0, 0, 0),
            )
        if operation == GETATTR:
            return struct.pack("<QII", 1, 0, 0) + self._attributes()
        if operation == OPEN:
            return struct.pack("<QII", 1, OPEN_FLAGS, 0)
        if operation == READ:
            _, offset, size, *_ = READ_IN.unpack_from(body)
            return os.pread(self._image, size, offset)
        if operation == WRITE:
            _, offset, size, *_ = READ_IN.unpack_from(body)
            data = body[READ_IN.size : READ_IN.size + size]
            return struct.pack("<II", os.pwrite(self._image, data, offset), 0)
        if operation == FSYNC:
            os.fdatasync(self._image)
            return b""
        if operation in (FLUSH, RELEASE, DESTROY):
            return b""
        if operation == STATFS:
            return bytes(80)
        raise OSError(errno.ENOSYS, "not done here")

    def _attributes(self):
        size = os.fstat(self._image).st_size
        return ATTRIBUTES.pack(
            *(1, size, size // 512, 0, 0, 0, 0, 0, 0),
            *(stat.S_IFREG | 0o600, 1, os.getuid(), os.getgid(), 0, 4096, 0),
        )


def main():
    image, mount_point, delay_seconds = sys.argv[1:]
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    SlowFile(image, mount_point, float(delay_seconds)).serve()


if __name__ == "__main__":
    main()
