# SPDX-License-Identifier: Apache-2.0
"""A file system that is one file, and goes wrong on command.

  faulty_file.py [--delay SECONDS] [--cached] [--read-only] [--no-locks] IMAGE MOUNT_POINT CONTROL
  faulty_file.py --tell CONTROL COMMAND...

The first form shows IMAGE at MOUNT_POINT, an existing empty file, and listens on CONTROL, a Unix
stream socket that it makes. It needs root and /dev/fuse, prints "ready" once it is mounted, and
ends when it is unmounted or terminated; what still waits for an answer then fails, so nothing
hangs for longer than this program lives. The second form sends one command, prints the answer and
ends with 0 if it was "ok".

Each connection to CONTROL takes one line, a command, and gives one line back: "ok", perhaps with a
value, or "error: ..." if the command is not understood. Sectors have 512 bytes. OPERATION is one of
read, write (zeroing and discarding included) and fsync.

  delay SECONDS [OPERATION]    Answers are late by so much; without an operation, all of them.
                               They wait side by side: a queue of requests is late once, not each.
  hang [OPERATION]             Nothing is answered, and nothing done, until "resume". What is asked
                               for meanwhile is carried out then, in the order in which it came.
  resume                       Ends every "hang".
  eio OPERATION on|off [SECTOR COUNT]
                               Answers EIO, if a range is given only to what touches it (which is
                               not for fsync). One range for each operation; "off" takes no range.
  enospc on|off                Every write answers ENOSPC.
  buffer on|off                Writes stay in memory until an fsync that succeeds; reads show them.
                               "off" puts what is there into the image.
  drop [SEED]                  Loses what is in memory: a power loss. With a number, each sector of
                               it is lost or kept by the toss of a coin with that seed. The value
                               is how many sectors were lost.
  count OPERATION              The value is how many were asked for since the start.
  held                         The value is how many requests wait for an answer.
  unsynced                     The value is how many sectors are in memory only.

--cached lets the host's page cache keep what was read, over closing and opening too, as local file
systems do; the default is to pass it by. --read-only mounts it so that it cannot be opened for
writing; --no-locks refuses locks, as some network file systems do. --delay is the command of that name, before anything is
asked.

Speaks the kernel's FUSE protocol itself (include/uapi/linux/fuse.h): programs such as nbdfuse do
one write after another, so that a slow one is a stopped one. Here requests wait side by side.
"""

import argparse
import ctypes
import errno
import heapq
import os
import random
import select
import signal
import socket
import stat
import struct
import sys
import time

SECTOR_BYTES = 512

# Operations, by their numbers in the protocol.
FORGET, GETATTR, SETATTR, OPEN, READ, WRITE = 2, 3, 4, 14, 15, 16
STATFS, RELEASE, FSYNC, FLUSH, INIT = 17, 18, 20, 25, 26
GETLK, SETLK, SETLKW = 31, 32, 33
INTERRUPT, DESTROY, BATCH_FORGET, FALLOCATE = 36, 38, 42, 43
WITHOUT_ANSWER = (FORGET, INTERRUPT, BATCH_FORGET)
# Those that can go wrong, by the words of the commands.
KINDS = {READ: "read", WRITE: "write", FALLOCATE: "write", FSYNC: "fsync"}
WORDS = ("read", "write", "fsync")

PROTOCOL_MAJOR, PROTOCOL_MINOR = 7, 31
# Of INIT: reads side by side, large writes, direct I/O that does not block its caller.
INIT_FLAGS = 1 << 0 | 1 << 5 | 1 << 15
# Of INIT: locks are not the kernel's business but ours.
INIT_LOCKS = 1 << 1
# Of mount(2).
MOUNT_READ_ONLY = 1
# Of OPEN: past the page cache, writes side by side; or keep cached pages when opened again.
OPEN_PAST_CACHE = 1 << 0 | 1 << 6
OPEN_KEEP_CACHE = 1 << 1
REQUESTS_AT_ONCE = 256
WRITE_BYTES_MAX = 128 << 10
COMMAND_BYTES_MAX = 200

# Of SETATTR: what is to be set.
SET_SIZE, SET_MTIME = 1 << 3, 1 << 5
FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE = 1, 2, 16

IN_HEADER = struct.Struct("<IIQQIIIHH")
OUT_HEADER = struct.Struct("<IiQ")
ATTRIBUTES = struct.Struct("<QQQQQQIIIIIIIIII")
READ_IN = struct.Struct("<QQIIQII")
SETATTR_IN = struct.Struct("<II6QIII")
FALLOCATE_IN = struct.Struct("<QQQII")


class NotUnderstood(Exception):
    """A command that makes no sense."""


class Medium:
    """The image, and what was written and is not in it yet."""

    def __init__(self, path):
        self._image = os.open(path, os.O_RDWR)
        self._unsynced = {}
        self.is_buffering = False

    def status(self):
        return os.fstat(self._image)

    def set_size(self, size):
        os.ftruncate(self._image, size)
        first_lost = -(-size // SECTOR_BYTES)
        for sector in [sector for sector in self._unsynced if sector >= first_lost]:
            del self._unsynced[sector]

    def set_time(self, mtime_ns):
        os.utime(self._image, ns=(mtime_ns, mtime_ns))

    def read(self, offset, size):
        data = os.pread(self._image, size, offset)
        if not self._unsynced:
            return data
        data = bytearray(data)
        first = offset // SECTOR_BYTES
        for sector in range(first, (offset + len(data) - 1) // SECTOR_BYTES + 1):
            newer = self._unsynced.get(sector)
            if newer is not None:
                start = sector * SECTOR_BYTES - offset
                skip = max(0, -start)
                end = min(start + SECTOR_BYTES, len(data))
                data[start + skip : end] = newer[skip : end - start]
        return bytes(data)

    def write(self, offset, data):
        if not self.is_buffering:
            os.pwrite(self._image, data, offset)
            return
        start, end = offset, offset + len(data)
        # In whole sectors, with what is around them.
        first = start // SECTOR_BYTES * SECTOR_BYTES
        last = -(-end // SECTOR_BYTES) * SECTOR_BYTES
        if (first, last) != (start, end):
            before = self.read(first, start - first).ljust(start - first, b"\0")
            data = before + data + self.read(end, last - end).ljust(last - end, b"\0")
        for place in range(0, len(data), SECTOR_BYTES):
            sector = (first + place) // SECTOR_BYTES
            self._unsynced[sector] = bytes(data[place : place + SECTOR_BYTES])

    def unsynced(self):
        return len(self._unsynced)

    def sync(self):
        """Puts everything into the image. The image itself is not flushed: it is a medium that
        loses nothing."""
        for sector, data in self._unsynced.items():
            os.pwrite(self._image, data, sector * SECTOR_BYTES)
        self._unsynced.clear()

    def drop(self, seed):
        """Loses what is not in the image, all or by chance. Returns how many sectors."""
        coin = random.Random(seed)
        lost = 0
        for sector, data in sorted(self._unsynced.items()):
            if seed is not None and coin.random() < 0.5:
                os.pwrite(self._image, data, sector * SECTOR_BYTES)
            else:
                lost += 1
        self._unsynced.clear()
        return lost


class Faults:
    """What goes wrong, and the commands that say so."""

    def __init__(self, medium, delay_seconds):
        self._medium = medium
        self.delay_seconds = dict.fromkeys(WORDS, delay_seconds)
        self.hanging = set()
        # A range of bytes for each operation that fails.
        self._broken = {}
        self._is_full = False
        self.count = dict.fromkeys(WORDS, 0)

    def check(self, word, offset, size):
        """Fails if the operation is to fail."""
        if word in self._broken:
            start, end = self._broken[word]
            if word == "fsync" or (offset < end and start < offset + size):
                raise OSError(errno.EIO, "on command")
        if word == "write" and self._is_full:
            raise OSError(errno.ENOSPC, "on command")

    def obey(self, words):
        """Carries out one command. Returns its value, or `None`."""
        match words:
            case ["delay", seconds, *operation]:
                for word in self._operations(operation):
                    self.delay_seconds[word] = float(seconds)
            case ["hang", *operation]:
                self.hanging.update(self._operations(operation))
            case ["resume"]:
                self.hanging.clear()
            case ["eio", word, "off"] if word in WORDS:
                self._broken.pop(word, None)
            case ["eio", word, "on"] if word in WORDS:
                self._broken[word] = (0, float("inf"))
            case ["eio", "read" | "write" as word, "on", sector, count]:
                start = int(sector) * SECTOR_BYTES
                self._broken[word] = (start, start + int(count) * SECTOR_BYTES)
            case ["enospc", "on" | "off" as switch]:
                self._is_full = switch == "on"
            case ["buffer", "on" | "off" as switch]:
                self._medium.is_buffering = switch == "on"
                if not self._medium.is_buffering:
                    self._medium.sync()
            case ["drop"]:
                return self._medium.drop(None)
            case ["drop", seed]:
                return self._medium.drop(int(seed))
            case ["count", word] if word in WORDS:
                return self.count[word]
            case ["unsynced"]:
                return self._medium.unsynced()
            case _:
                raise NotUnderstood("no such command; see the head of faulty_file.py")
        return None

    @staticmethod
    def _operations(words):
        if not words:
            return WORDS
        if len(words) == 1 and words[0] in WORDS:
            return words
        raise NotUnderstood(f"no such operation: {' '.join(words)}")


class FaultyFile:
    """Answers the kernel's requests on one image."""

    def __init__(self, options):
        self._medium = Medium(options.image)
        self._faults = Faults(self._medium, options.delay)
        self._open_flags = OPEN_KEEP_CACHE if options.cached else OPEN_PAST_CACHE
        self._init_flags = INIT_FLAGS | (INIT_LOCKS if options.no_locks else 0)
        # Requests with the time of their answer, and those without: in the order of arrival.
        self._late = []
        self._held = []
        self._order = 0
        self._control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._control.bind(options.control)
        self._control.listen()
        self._device = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK)
        mode = stat.S_IFREG
        data = f"fd={self._device},rootmode={mode:o},user_id=0,group_id=0,allow_other"
        mount_point = os.fsencode(options.mount_point)
        flags = MOUNT_READ_ONLY if options.read_only else 0
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"faulty", mount_point, b"fuse", flags, data.encode()) != 0:
            raise OSError(ctypes.get_errno(), "cannot mount")

    def serve(self):
        """Answers until the file system is unmounted."""
        poller = select.poll()
        poller.register(self._device, select.POLLIN)
        poller.register(self._control, select.POLLIN)
        while True:
            timeout_ms = None
            if self._late:
                timeout_ms = max(0, (self._late[0][0] - time.monotonic()) * 1000)
            ready = [descriptor for descriptor, _ in poller.poll(timeout_ms)]
            if not self._take_requests():
                return
            if self._control.fileno() in ready:
                self._take_command()
            while self._late and self._late[0][0] <= time.monotonic():
                self._answer_unless_hanging(*heapq.heappop(self._late)[1:])

    def _take_command(self):
        connection, _ = self._control.accept()
        with connection:
            connection.settimeout(1)
            line = b""
            try:
                while not line.endswith(b"\n") and len(line) < COMMAND_BYTES_MAX:
                    more = connection.recv(COMMAND_BYTES_MAX)
                    if not more:
                        break
                    line += more
                answer = self._obey(line.decode("ascii", "replace").split())
                connection.sendall(answer.encode() + b"\n")
            except OSError:
                # Whoever asked has gone away.
                return

    def _obey(self, words):
        try:
            if words == ["held"]:
                value = len(self._late) + len(self._held)
            else:
                value = self._faults.obey(words)
        except (NotUnderstood, ValueError, OSError) as error:
            return f"error: {error}"
        held, self._held = self._held, []
        for request in held:
            self._answer_unless_hanging(*request)
        return "ok" if value is None else f"ok {value}"

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
            self._order += 1
            self._schedule(self._order, operation, unique, body)
            if operation == DESTROY:
                return False

    def _schedule(self, order, operation, unique, body):
        word = KINDS.get(operation)
        if word is None:
            self._answer(operation, unique, body)
            return
        self._faults.count[word] += 1
        delay_seconds = self._faults.delay_seconds[word]
        if delay_seconds > 0:
            due = time.monotonic() + delay_seconds
            heapq.heappush(self._late, (due, order, operation, unique, body))
        else:
            self._answer_unless_hanging(order, operation, unique, body)

    def _answer_unless_hanging(self, order, operation, unique, body):
        if KINDS[operation] in self._faults.hanging:
            self._held.append((order, operation, unique, body))
        else:
            self._answer(operation, unique, body)

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
                *(PROTOCOL_MAJOR, PROTOCOL_MINOR, 0, self._init_flags),
                *(REQUESTS_AT_ONCE, REQUESTS_AT_ONCE, WRITE_BYTES_MAX, 1, 0, 0, 0, 0),
            )
        if operation == GETATTR:
            return struct.pack("<QII", 0, 0, 0) + self._attributes()
        if operation == SETATTR:
            return self._set_attributes(*SETATTR_IN.unpack_from(body))
        if operation == OPEN:
            return struct.pack("<QII", 1, self._open_flags, 0)
        if operation == READ:
            _, offset, size, *_ = READ_IN.unpack_from(body)
            self._faults.check("read", offset, size)
            return self._medium.read(offset, size)
        if operation == WRITE:
            _, offset, size, *_ = READ_IN.unpack_from(body)
            self._faults.check("write", offset, size)
            self._medium.write(offset, body[READ_IN.size : READ_IN.size + size])
            return struct.pack("<II", size, 0)
        if operation == FALLOCATE:
            return self._zero(*FALLOCATE_IN.unpack_from(body)[1:4])
        if operation == FSYNC:
            self._faults.check("fsync", 0, 0)
            self._medium.sync()
            return b""
        if operation in (FLUSH, RELEASE, DESTROY):
            return b""
        if operation in (GETLK, SETLK, SETLKW):
            raise OSError(errno.ENOLCK, "not done here")
        if operation == STATFS:
            return bytes(80)
        raise OSError(errno.ENOSYS, "not done here")

    def _set_attributes(self, valid, _pad, _fh, size, _owner, _atime, mtime, *rest):
        if valid & SET_SIZE:
            self._medium.set_size(size)
        if valid & SET_MTIME:
            self._medium.set_time(mtime * 1_000_000_000 + rest[2])
        return struct.pack("<QII", 0, 0, 0) + self._attributes()

    def _zero(self, offset, size, mode):
        if mode not in (FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, FALLOC_ZERO_RANGE):
            raise OSError(errno.EOPNOTSUPP, "not done here")
        self._faults.check("write", offset, size)
        size = min(size, self._medium.status().st_size - offset)
        if size > 0:
            self._medium.write(offset, bytes(size))
        return b""

    def _attributes(self):
        status = self._medium.status()
        size = status.st_size
        seconds, nanoseconds = divmod(status.st_mtime_ns, 1_000_000_000)
        return ATTRIBUTES.pack(
            *(1, size, size // 512, seconds, seconds, seconds),
            *(nanoseconds, nanoseconds, nanoseconds),
            *(stat.S_IFREG | 0o600, 1, os.getuid(), os.getgid(), 0, 4096, 0),
        )


def tell(control, command):
    """Sends a command to a running faulty file. Returns the answer without its line end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(os.fspath(control))
        connection.sendall(command.encode("ascii") + b"\n")
        with connection.makefile() as answer:
            return answer.readline().rstrip("\n")


def main():
    if sys.argv[1:2] == ["--tell"] and len(sys.argv) > 3:
        answer = tell(sys.argv[2], " ".join(sys.argv[3:]))
        print(answer)
        sys.exit(0 if answer.split()[:1] == ["ok"] else 1)
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--cached", action="store_true")
    parser.add_argument("--read-only", action="store_true")
    parser.add_argument("--no-locks", action="store_true")
    parser.add_argument("image")
    parser.add_argument("mount_point")
    parser.add_argument("control")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    faulty = FaultyFile(options)
    print("ready", flush=True)
    faulty.serve()


if __name__ == "__main__":
    main()
