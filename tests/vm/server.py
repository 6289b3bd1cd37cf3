# SPDX-License-Identifier: Apache-2.0
"""Who serves the disk: the daemon under test, or QEMU's quorum driver for comparison."""

import json
import re
import signal
import subprocess

from guest import find_program
from host import Failure, expect, stop_process, wait_until

THRESHOLD = 2

# A row of the table of guest requests that the daemon prints at its end.
COUNTER_ROW = re.compile(r"^\s*(read|write|flush|discard|write-zeroes|get-id)\s+(\d+)\s", re.M)


class Daemon:
    """`quorum-blk serve` on a set of replicas. Use as a context manager. Two of them at a time need
    different names."""

    def __init__(self, program, folder, replicas, *options, name=""):
        self.socket = folder / f"{name}disk.sock"
        self._events = folder / f"{name}events.jsonl"
        self._log_path = folder / f"{name}daemon.log"
        self._log = open(self._log_path, "ab")
        command = [
            *(program, "serve", "--socket-path", self.socket, "--threshold", THRESHOLD),
            *(word for replica in replicas for word in ("--replica", replica.argument)),
            *("--events", self._events, *options),
        ]
        self._process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )

    def __enter__(self):
        try:
            wait_until(self._is_listening, 15, "the daemon's socket")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        stop_process(self._process)
        self._log.close()

    def _is_listening(self):
        if self._process.poll() is not None:
            log = self._log_path.read_text(errors="replace")
            raise Failure(f"the daemon ended with status {self._process.returncode}:\n{log}")
        return self.socket.exists()

    @property
    def pid(self):
        return self._process.pid

    def stop(self, seconds=20):
        """SIGTERM: the daemon finishes what it has begun and ends with status 0."""
        self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise Failure(f"the daemon runs {seconds} s after SIGTERM") from error
        expect(status == 0, f"the daemon ended with status {status} after SIGTERM")

    def await_log(self, text, seconds=20):
        """Waits until it has logged something."""
        wait_until(lambda: text in self.log(), seconds, f"the daemon to log '{text}'")

    def show_status(self):
        """SIGUSR1: it logs how the disk is."""
        self._process.send_signal(signal.SIGUSR1)

    def kill(self):
        """Ends it at once, in the middle of whatever it does."""
        self._process.kill()
        self._process.wait()
        # What it could not take away itself; the next one makes its own.
        self.socket.unlink(missing_ok=True)

    def state(self, replica):
        """The state that was last told of a replica; it began in sync."""
        changes = self.events("QUORUM_BLK_REPLICA_STATE")
        states = [event["to"] for event in changes if event["replica"] == replica.name]
        return states[-1] if states else "in-sync"

    def await_state(self, replica, state, seconds=60):
        """Waits until a replica was told to be in a state."""
        what = f"{replica.name} to be {state}"
        wait_until(lambda: self.state(replica) == state, seconds, what)

    def await_kick(self, replica, cause, seconds=30):
        """Waits until a replica was left out for this cause."""

        def is_kicked():
            kicks = self.events("QUORUM_BLK_REPLICA_KICKED")
            return any((kick["replica"], kick["cause"]) == (replica.name, cause) for kick in kicks)

        wait_until(is_kicked, seconds, f"{replica.name} to be left out ({cause})")

    def log(self):
        """Everything it has written to standard error."""
        return self._log_path.read_text(errors="replace")

    def counters(self):
        """Guest requests by kind, as printed last."""
        return {kind: int(count) for kind, count in COUNTER_ROW.findall(self.log())}

    def events(self, name=None):
        """The data of the events so far, or of those with one name."""
        if not self._events.exists():
            return []
        # The last line may still be under way.
        lines = self._events.read_text().split("\n")[:-1]
        events = [json.loads(line) for line in lines]
        return [event["data"] for event in events if name in (None, event["event"])]


class Peer:
    """QEMU's quorum driver in qemu-storage-daemon, with the same three files."""

    def __init__(self, _program, folder, replicas, *_options):
        self.socket = folder / "disk.sock"
        self._log = open(folder / "daemon.log", "ab")
        command = [find_program("qemu-storage-daemon")]
        for replica in replicas:
            driver = "host_device" if str(replica.path).startswith("/dev/") else "file"
            command += ["--blockdev", json.dumps({
                "driver": driver,
                "filename": str(replica.path),
                "node-name": replica.name,
                "cache": {"direct": replica.cache == "direct"},
                "discard": "unmap",
            })]
        command += ["--blockdev", json.dumps({
            "driver": "quorum",
            "node-name": "quorum",
            "children": [replica.name for replica in replicas],
            "vote-threshold": THRESHOLD,
            "rewrite-corrupted": True,
        })]
        export = "vhost-user-blk,id=export,node-name=quorum,writable=on,num-queues=4"
        command += ["--export", f"{export},addr.type=unix,addr.path={self.socket}"]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log)

    def __enter__(self):
        wait_until(self.socket.exists, 10, "qemu-storage-daemon's socket")
        return self

    def __exit__(self, *_):
        stop_process(self._process)
        self._log.close()

    @property
    def pid(self):
        return self._process.pid

    def stop(self, seconds=20):
        expect(stop_process(self._process, seconds) == 0, "qemu-storage-daemon failed")

    def kill(self):
        self._process.kill()
        self._process.wait()
        self.socket.unlink(missing_ok=True)

    def log(self):
        return ""

    def events(self, name=None):
        return []
