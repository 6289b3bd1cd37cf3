#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measures the daemon against QEMU's quorum driver: same files, same front-end, in turn.

Each row is a load on a kind of storage. Both servers are started on the same three files, run for
a few seconds in alternating rounds, and the medians are compared. Needs root for mounts.

  compare.py                      all rows
  compare.py --row 'randread'     rows whose name contains this; --list names them
  compare.py --row restart        only how long a restart of the daemon takes
  compare.py --peer-only          leave the daemon out, to try other settings of the peer
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tests" / "vm"))

from host import (  # noqa: E402
    Failure,
    privileged,
    scratch_folder,
    stop_process,
    target_folder,
    wait_until,
)
import restart  # noqa: E402

THRESHOLD = 2
NAMES = ("alpha", "beta", "gamma")
# Three of them are far more than the processor's caches hold.
DISK_BYTES = 512 << 20

# Enough for a random load to meet every extent.
WARM_UP_SECONDS = 1

# Without these the peer maps and unmaps memory for every large read, and is 3.6 times slower.
PEER_MALLOC = "glibc.malloc.mmap_threshold=67108864:glibc.malloc.trim_threshold=1073741824"


@dataclass(frozen=True)
class Row:
    """One load. `target` is the least ratio of requests a second, `cpu_target_us` the most
    processor time a request may take; `None` where only the other counts."""

    name: str
    storage: str
    mix: str
    block_bytes: int
    depth: int
    peer_aio: str
    target: float | None
    cpu_target_us: float | None
    # The least share of the requests a second without a state record; then that is measured too.
    record_target: float | None = None


# The peer's aio is its best for that row, found with --peer-only --peer-aio.
ROWS = (
    Row("4k randread qd32, page cache", "cached", "read", 4096, 32, "io_uring", 1.5, None),
    Row("4k randwrite qd32, page cache", "cached", "write", 4096, 32, "io_uring", None, None, 0.95),
    Row("4k randread qd32, direct", "direct", "read", 4096, 32, "native", None, None),
    Row("4k randwrite qd32, direct", "direct", "write", 4096, 32, "native", None, None),
)


@contextmanager
def cached_storage(folder):
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
        undo.callback(privileged, "umount", mount)
        privileged("chown", os.getuid(), mount)
        yield mount


@contextmanager
def direct_storage(folder):
    """The file system that holds /var/tmp, or TMPDIR if that is set, past the page cache."""
    path = folder / "direct"
    path.mkdir(parents=True)
    yield path


STORAGE = {"cached": cached_storage, "direct": direct_storage}


def make_images(folder):
    """Three equal images, written out so that nothing is measured but overwriting."""
    images = [folder / f"{name}.img" for name in NAMES]
    chunk = os.urandom(1 << 20)
    for image in images:
        with open(image, "wb") as file:
            for _ in range(DISK_BYTES >> 20):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    return images


def fill_page_cache(images):
    """Drops the images from the page cache and reads them from front to back: ours drops them when it
    starts (rule F4), the peer does not, and reads at random would bring them back page by page
    during the measurement, into smaller pages than the peer's. After this the cache is the same
    for both."""
    for image in images:
        with open(image, "rb", buffering=0) as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while file.read(1 << 20):
                pass


@contextmanager
def peer(_program, row, images, socket, aio):
    """qemu-storage-daemon with its quorum driver, an I/O thread and a vhost-user-blk export."""
    direct = row.storage == "direct"
    command = ["qemu-storage-daemon", "--object", "iothread,id=worker"]
    for name, image in zip(NAMES, images):
        command += ["--blockdev", json.dumps({
            "driver": "file",
            "filename": str(image),
            "node-name": name,
            "aio": aio or row.peer_aio,
            "cache": {"direct": direct},
            "discard": "unmap",
        })]
    command += ["--blockdev", json.dumps({
        "driver": "quorum",
        "node-name": "quorum",
        "children": list(NAMES),
        "vote-threshold": THRESHOLD,
    })]
    export = "vhost-user-blk,id=export,node-name=quorum,writable=on,num-queues=1,iothread=worker"
    command += ["--export", f"{export},addr.type=unix,addr.path={socket}"]
    with served(command, socket, {"GLIBC_TUNABLES": PEER_MALLOC}) as process:
        yield process


@contextmanager
def ours(program, row, images, socket, _aio):
    """The daemon under test, with its defaults: a state record, votes, private copies of writes."""
    with daemon(program, row, images, socket, ["--assume-clean"]) as process:
        yield process


@contextmanager
def without_record(program, row, images, socket, _aio):
    """The daemon under test, without a state record."""
    with daemon(program, row, images, socket, ["--record", "none"]) as process:
        yield process


@contextmanager
def daemon(program, row, images, socket, arguments):
    # The other servers have written to the images since: a record of before would make the daemon
    # compare them all in the background.
    for image in images:
        image.with_name(image.name + ".qrec").unlink(missing_ok=True)
    cache = "direct" if row.storage == "direct" else "buffered"
    command = [program, "serve", "--socket-path", socket, "--threshold", THRESHOLD]
    command += ["--cache", cache, "--log-level", "error", *arguments]
    for name, image in zip(NAMES, images):
        command += ["--replica", f"{image},name={name}"]
    with served(command, socket, {}) as process:
        yield process


@contextmanager
def served(command, socket, environment):
    """Runs a server until the block ends."""
    socket.unlink(missing_ok=True)
    log_path = socket.with_suffix(".log")
    with open(log_path, "wb") as log:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **environment},
        )
        try:

            def listens():
                if process.poll() is not None:
                    raise Failure(f"{command[0]} ended:\n{log_path.read_text()}")
                return socket.exists()

            wait_until(listens, 15, f"{command[0]}'s socket")
            yield process
        finally:
            stop_process(process)


def measure(front_end, row, socket, process, seconds, seed):
    """One run of the load. Returns the front-end's report."""
    command = [
        *(front_end, "--socket", socket, "--mix", row.mix, "--block-bytes", row.block_bytes),
        *("--depth", row.depth, "--seconds", seconds, "--server", process.pid, "--seed", seed),
    ]
    result = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=seconds + 60
    )
    if result.returncode != 0:
        raise Failure(f"the load failed: {result.stderr.strip()}")
    return json.loads(result.stdout)


class Samples:
    """The reports of one server on one row."""

    def __init__(self):
        self._reports = []

    def add(self, report):
        self._reports.append(report)

    def median(self, field):
        return statistics.median(report[field] for report in self._reports)


def run_row(row, arguments, images, folder):
    """Measures one row: a run of one server, a run of the other, and again."""
    servers = {"peer": peer} if arguments.peer_only else {"peer": peer, "ours": ours}
    if row.record_target is not None and not arguments.peer_only:
        servers["no record"] = without_record
    samples = {name: Samples() for name in servers}
    for seed in range(1, arguments.rounds + 1):
        for name, server in servers.items():
            socket = folder / f"{name}.sock"
            program = arguments.daemon
            with server(program, row, images, socket, arguments.peer_aio) as process:
                if row.storage == "cached":
                    fill_page_cache(images)
                # The first write to an extent is noted in the record; that is not what is measured.
                measure(arguments.front_end, row, socket, process, WARM_UP_SECONDS, seed)
                report = measure(
                    arguments.front_end, row, socket, process, arguments.seconds, seed
                )
            samples[name].add(report)
    return samples


HEADER = (
    f"{'work':<32}{'':>10}{'IOPS':>10}{'CPU us':>8}{'p50 us':>9}{'p99 us':>9}"
    f"{'ratio':>8}{'CPU':>7}  target"
)


def print_row(row, samples):
    """Prints the medians, and the ratios of ours to the peer's. Returns whether targets are met."""
    base = samples["peer"]
    met = True
    for name, each in samples.items():
        line = (
            f"{row.name if name == 'peer' else '':<32}{name:>10}"
            f"{each.median('requests_per_second'):>10.0f}"
            f"{each.median('cpu_us_per_request'):>8.2f}"
            f"{each.median('latency_us_p50'):>9.0f}{each.median('latency_us_p99'):>9.0f}"
        )
        if name == "ours":
            ratio = each.median("requests_per_second") / base.median("requests_per_second")
            cpu = each.median("cpu_us_per_request")
            cpu_ratio = cpu / base.median("cpu_us_per_request")
            targets = []
            if row.target is not None:
                met &= ratio >= row.target
                targets.append(f">= {row.target}x: {'met' if ratio >= row.target else 'MISSED'}")
            if row.cpu_target_us is not None:
                good = cpu <= row.cpu_target_us
                met &= good
                targets.append(f"<= {row.cpu_target_us} us CPU: {'met' if good else 'MISSED'}")
            if row.record_target is not None:
                bare = samples["no record"].median("requests_per_second")
                share = each.median("requests_per_second") / bare
                good = share >= row.record_target
                met &= good
                verdict = "met" if good else "MISSED"
                targets.append(f">= {row.record_target}x of no record: {share:.2f}x, {verdict}")
            line += f"{ratio:>7.2f}x{cpu_ratio:>6.2f}x  {', '.join(targets)}"
        print(line, flush=True)
    return met


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    target = target_folder()
    front_end = target / "bench-front-end" / "release" / "quorum-blk-bench-front-end"
    daemon = target / "dist" / "quorum-blk"
    parser.add_argument("--daemon", type=Path, default=daemon, help="the program under test")
    parser.add_argument("--front-end", type=Path, default=front_end, help="the load generator")
    parser.add_argument("--row", default="", help="only rows whose name contains this")
    parser.add_argument("--list", action="store_true", help="name the rows")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each server (default 5)")
    parser.add_argument("--seconds", type=float, default=3, help="of each run (default 3)")
    parser.add_argument("--peer-only", action="store_true", help="measure the peer alone")
    parser.add_argument("--peer-aio", choices=("threads", "native", "io_uring"))
    parser.add_argument("--check", action="store_true", help="fail if a target is missed")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    rows = [row for row in ROWS if arguments.row in row.name]
    restarts = arguments.row in restart.NAME and not arguments.peer_only
    if arguments.list:
        print("\n".join([row.name for row in rows] + [restart.NAME] * restarts))
        return 0
    # An interrupted run must leave no mounts, loop devices or servers behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    folder = scratch_folder("bench")
    met = True
    try:
        version = subprocess.run(["qemu-storage-daemon", "--version"], capture_output=True, text=True)
        print(f"peer: {version.stdout.splitlines()[0]}, quorum of 3, T={THRESHOLD}")
        print(
            f"replicas of {DISK_BYTES >> 20} MiB; "
            f"medians of {arguments.rounds} alternating runs of {arguments.seconds:g} s\n"
        )
        if rows:
            print(HEADER)
        for kind in dict.fromkeys(row.storage for row in rows):
            with STORAGE[kind](folder) as place:
                images = make_images(place)
                for row in rows:
                    if row.storage == kind:
                        met &= print_row(row, run_row(row, arguments, images, folder))
        if restarts:
            with direct_storage(folder / "restart") as place:
                images = make_images(place)
                samples = restart.measure(arguments.daemon, arguments.front_end, images, folder)
                met &= restart.print_row(samples)
    except Failure as failure:
        print(f"bench: {failure}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if met or not arguments.check else 1


if __name__ == "__main__":
    sys.exit(main())
