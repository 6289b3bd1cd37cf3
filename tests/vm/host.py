# SPDX-License-Identifier: Apache-2.0
"""What every part of these tests needs of the host: folders, privileged commands, waiting."""

import os
import subprocess
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


class Failure(Exception):
    """A test did not find what it must find. The message is for people."""


def target_folder():
    """Cargo's target folder, where everything that can be made again is kept."""
    return Path(os.environ.get("CARGO_TARGET_DIR", REPOSITORY / "target")).resolve()


def scratch_folder(name):
    """A new folder for images and sockets. Not in /tmp, which may be a tmpfs and then does not
    behave like a disk; not in the target folder, because socket paths must be short."""
    parent = os.environ.get("TMPDIR", "/var/tmp")
    return Path(tempfile.mkdtemp(prefix=f"quorum-blk-{name}-", dir=parent))


def privileged(*command):
    """Runs a command as root and returns what it printed."""
    prefix = [] if os.geteuid() == 0 else ["sudo", "-n"]
    result = subprocess.run(
        [*prefix, *map(str, command)], capture_output=True, text=True, timeout=60
    )
    if result.returncode != 0:
        words = " ".join(map(str, command))
        raise Failure(f"`{words}` failed (these tests need root): {result.stderr.strip()}")
    return result.stdout.strip()


def wait_until(condition, seconds, what):
    """Waits until `condition()` is true and returns its value; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise Failure(f"{what}: not within {seconds} s")
        time.sleep(0.02)


def stop_process(process, seconds=10):
    """Ends a process of ours and waits for it: first kindly, then not. Returns its status."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return process.returncode


def expect(condition, message):
    """Fails with `message` unless `condition` holds."""
    if not condition:
        raise Failure(message)
