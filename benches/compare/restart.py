# SPDX-License-Identifier: Apache-2.0
"""How long a guest is without its disk when the daemon is replaced: from the start of the process to
the first request that the guest sees completed, as the daemon itself tells it.

The front-end is there before the daemon is, as with a socket that the service manager keeps, so
that nothing is measured but the daemon: opening and locking the replicas, reading the record and
beginning an epoch in it, starting the workers, and the front-end's messages.
"""

import json
import os
import signal
import socket
import statistics
import subprocess

from host import Failure, wait_until

NAME = "restart, clean record"
TARGET_MS = 100
ROUNDS = 20


def measure(arguments, images, folder):
    """Starts the daemon again and again on what the last one left. Returns milliseconds."""
    path = folder / "restart.sock"
    path.unlink(missing_ok=True)
    for image in images:
        image.with_name(image.name + ".qrec").unlink(missing_ok=True)
    samples = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        # The first one makes the record.
        for number in range(ROUNDS + 1):
            took = _one(arguments, images, folder, path, listener)
            if number > 0:
                samples.append(took)
    return samples


def _one(arguments, images, folder, path, listener):
    load = [arguments.front_end, "--socket", path, "--mix", "read", "--depth", 1]
    load += ["--warm-up-seconds", 0, "--seconds", 0.02]
    guest = subprocess.Popen(
        [str(word) for word in load], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    log_path = folder / "restart.log"
    command = [arguments.daemon, "serve", "--fd", listener.fileno(), "--assume-clean"]
    command += ["--log-format", "json"]
    for image in images:
        command += ["--replica", image]
    try:
        # It waits for an answer, and not for a connection.
        wait_until(lambda: _connected(guest.pid), 15, "the front-end")
        with open(log_path, "wb") as log:
            daemon = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno()],
            )
        try:
            wait_until(lambda: _told(log_path) is not None, 30, "a first request")
            _, complaint = guest.communicate(timeout=30)
            if guest.returncode != 0:
                raise Failure(f"the load failed: {complaint.strip()}")
        finally:
            daemon.send_signal(signal.SIGTERM)
            status = daemon.wait(60)
        if status != 0:
            raise Failure(f"the daemon ended with {status}:\n{log_path.read_text()}")
        return _told(log_path)
    finally:
        if guest.poll() is None:
            guest.kill()
            guest.wait()


def _connected(pid):
    """Whether the process has a socket."""
    descriptors = f"/proc/{pid}/fd"
    for descriptor in os.listdir(descriptors):
        try:
            if os.readlink(f"{descriptors}/{descriptor}").startswith("socket:"):
                return True
        except FileNotFoundError:
            pass
    return False


def _told(log_path):
    """What the daemon says, once it does."""
    for line in log_path.read_text().splitlines():
        if "ms_after_exec" in line and line.endswith("}"):
            return json.loads(line)["ms_after_exec"]
    return None


def print_row(samples):
    """Prints the row. Returns whether the target is met."""
    median, most = statistics.median(samples), max(samples)
    met = median < TARGET_MS
    print(
        f"{NAME:<40}{'ours':>10}  first request after {median:.0f} ms (median of {len(samples)}),"
        f" {most} ms at most  < {TARGET_MS} ms: {'met' if met else 'MISSED'}",
        flush=True,
    )
    return met
