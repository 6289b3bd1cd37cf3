# SPDX-License-Identifier: Apache-2.0
"""What is measured against what: the daemon, QEMU's quorum driver, and what could be reached."""

import json
import os
import subprocess
from contextlib import contextmanager

from host import Failure, stop_process, wait_until
from storage import NAMES

THRESHOLD = 2
# Without these the peer maps and unmaps memory for every large read, and is 3.6 times slower.
PEER_MALLOC = "glibc.malloc.mmap_threshold=67108864:glibc.malloc.trim_threshold=1073741824"
# What the three files of a row are read and written with where there is no server.
LIMIT = "limit"
# Both on one processor would be a measurement of the scheduler.
SERVER_CPU, FRONT_END_CPU = 0, 1


def pinned(command, cpu):
    """A command that stays on one processor."""
    return ["taskset", "--cpu-list", cpu, *command]


def peer_command(row, storage, socket, aio):
    """qemu-storage-daemon with its quorum driver, an I/O thread and a vhost-user-blk export."""
    command = ["qemu-storage-daemon", "--object", "iothread,id=worker"]
    for name, path in zip(NAMES, storage.paths):
        command += ["--blockdev", json.dumps({
            "driver": "file",
            "filename": str(path),
            "node-name": name,
            "aio": aio or row.peer_aio,
            "cache": {"direct": storage.direct},
            "discard": "unmap",
        })]
    command += ["--blockdev", json.dumps({
        "driver": "quorum",
        "node-name": "quorum",
        "children": list(NAMES),
        "vote-threshold": THRESHOLD,
    })]
    export = "vhost-user-blk,id=export,node-name=quorum,writable=on,num-queues=1,iothread=worker"
    return [*command, "--export", f"{export},addr.type=unix,addr.path={socket}"]


def our_command(program, storage, socket, arguments):
    """The daemon under test, with its defaults: a state record, votes, private copies of writes."""
    command = [program, "serve", "--socket-path", socket, "--threshold", THRESHOLD]
    command += ["--cache", "direct" if storage.direct else "buffered", "--log-level", "error"]
    for name, path in zip(NAMES, storage.paths):
        command += ["--replica", f"{path},name={name}"]
    return [*command, *arguments]


def forget_records(storage):
    """The other servers write to the images too: a record of before would make the daemon compare
    them all in the background."""
    for path in storage.paths:
        path.with_name(path.name + ".qrec").unlink(missing_ok=True)


@contextmanager
def served(name, row, storage, socket, arguments):
    """Runs the server of that name until the block ends, and yields its process."""
    environment = dict(os.environ)
    if name == "peer":
        command = peer_command(row, storage, socket, arguments.peer_aio)
        environment["GLIBC_TUNABLES"] = PEER_MALLOC
    else:
        forget_records(storage)
        record = ["--record", "none"] if name == "no record" else ["--assume-clean"]
        command = our_command(arguments.daemon, storage, socket, record)
    if row.alone:
        command = pinned(command, SERVER_CPU)
    socket.unlink(missing_ok=True)
    log_path = socket.with_suffix(".log")
    with open(log_path, "wb") as log:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
        )
        try:

            def listens():
                if process.poll() is not None:
                    raise Failure(f"{name} ended:\n{log_path.read_text()}")
                return socket.exists()

            wait_until(listens, 15, f"the socket of {name}")
            yield process
        finally:
            stop_process(process)
