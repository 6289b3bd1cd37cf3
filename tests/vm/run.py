#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Boots real guests on a disk that the daemon keeps on three replicas, and breaks replicas.

  run.py                         all scenarios with target/release/quorum-blk
  run.py --scenario healthy      one of them; --list names them
  run.py --scenario kill-storm --kills 1000
                                 the daemon is killed so often
  run.py --peer                  the same against QEMU's quorum driver, for comparison
  run.py --interactive           boot a guest and hand over its shell

What a failed scenario leaves (logs, console, commands) is kept under target/vm.
"""

import argparse
import fcntl
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

from guest import Guest, find_program
from host import Failure, expect, scratch_folder, target_folder
from machine import Machine
from scenarios import SCENARIOS, three_replicas
from server import Daemon, Peer
from storms import STORMS

# Everything that can be run, in this order.
ALL = SCENARIOS | STORMS


class Bench:
    """What a scenario works with: a folder of its own, a guest, a way to serve a disk."""

    def __init__(self, guest, program, folder, seed, peer, kills):
        self.guest = guest
        self.folder = folder
        self.seed = seed
        self._program = program
        self._server = Peer if peer else Daemon
        self.peer = peer
        # How often a storm kills the daemon.
        self.kills = kills

    def serve(self, replicas, *options, **more):
        """Starts whoever is under test on these replicas."""
        return self._server(self._program, self.folder, replicas, *options, **more)

    def control(self, control, *words):
        """Asks a daemon that was given this control socket."""
        words = ["ctl", "--control", control, *map(str, words)]
        done = subprocess.run([self._program, *words], capture_output=True, text=True)
        expect(done.returncode == 0, f"{words}: {done.stderr}")
        return done.stdout

    def forget_events(self):
        """Removes what earlier daemons have told."""
        (self.folder / "events.jsonl").unlink(missing_ok=True)

    def boot(self, daemon, name="vm", **more):
        """Boots a guest on the disk of a daemon."""
        return Machine(self.guest, daemon.socket, self.folder, name, **more)

    def expect_counters(self, daemon, *names):
        """Fails unless the daemon has counted guest requests of each of these kinds."""
        if self.peer:
            return
        counters = daemon.counters()
        for name in names:
            expect(counters.get(name, 0) > 0, f"the daemon counted no {name}: {counters}")

    def expect_named(self, daemon, name):
        """Fails unless some event names this replica."""
        if self.peer:
            return
        events = daemon.events()
        expect(any(event.get("replica") == name for event in events), f"no event names {name}")

    def expect_locked(self, replica):
        """Fails unless QEMU refuses to write to an image that is being served (rule K1)."""
        if self.peer:
            return
        command = [find_program("qemu-io"), "-f", "raw", "-c", "read 0 512", replica.image]
        result = subprocess.run(command, capture_output=True, text=True)
        expect("lock" in result.stderr, f"qemu-io opens an image that is served: {result}")


def bench_for(arguments, guest, folder):
    """The bench that the command line asks for."""
    seed, peer, kills = arguments.seed, arguments.peer, arguments.kills
    return Bench(guest, arguments.daemon, folder, seed, peer, kills)


def run_scenario(name, arguments, guest):
    """Runs one scenario and prints its line. Returns whether it passed."""
    folder = scratch_folder(name)
    bench = bench_for(arguments, guest, folder)
    start = time.monotonic()
    try:
        ALL[name](bench)
        problem = None
    except Failure as failure:
        problem = str(failure)
    except Exception:  # Whatever it is, the other scenarios are still worth running.
        problem = traceback.format_exc()
    seconds = time.monotonic() - start
    if problem is None:
        print(f"vm {name} ... ok ({seconds:.1f} s)", flush=True)
        if arguments.keep_logs:
            print(f"  logs: {keep_logs(folder, f'passed-{name}')}", flush=True)
    else:
        kept = keep_logs(folder, f"failed-{name}")
        print(f"vm {name} ... FAILED ({seconds:.1f} s)", flush=True)
        print(f"  {problem}\n  logs: {kept}; seed: {arguments.seed}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    return problem is None


def keep_logs(folder, name):
    """Copies logs, not images, to the target folder."""
    kept = target_folder() / "vm" / name
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    for path in folder.glob("*"):
        if path.suffix in (".log", ".jsonl"):
            shutil.copy(path, kept)
    return kept


def hand_over(arguments, guest):
    """Boots a guest on three fresh replicas and runs what is typed, until the end of input."""
    folder = scratch_folder("vm")
    bench = bench_for(arguments, guest, folder)
    try:
        with three_replicas(bench) as replicas, bench.serve(replicas) as daemon:
            with bench.boot(daemon) as machine:
                print(f"The disk is /dev/disk in the guest; its replicas are in {folder}.")
                print("One shell command a line; end with Ctrl-D.")
                for line in iter(lambda: read_line("guest# "), None):
                    print(machine.run(line, seconds=3600, check=False)[0])
                machine.shut_down()
            daemon.stop()
            print(daemon.log())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_line(prompt):
    try:
        return input(prompt)
    except EOFError:
        return None


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = target_folder() / "release" / "quorum-blk"
    parser.add_argument("--daemon", type=Path, default=default, help="the program under test")
    parser.add_argument("--scenario", action="append", choices=ALL, help="only these")
    parser.add_argument("--keep-logs", action="store_true", help="also of what has passed")
    parser.add_argument("--list", action="store_true", help="name the scenarios")
    parser.add_argument("--peer", action="store_true", help="serve with qemu-storage-daemon")
    parser.add_argument("--interactive", action="store_true", help="a guest to type in")
    parser.add_argument("--seed", type=int, default=1, help="chooses what is spoiled (default 1)")
    parser.add_argument("--kills", type=int, default=100, help="of a storm (default 100)")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    if arguments.list:
        print("\n".join(ALL))
        return 0
    # An interrupted run must leave no mounts, loop devices or processes behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        expect(
            arguments.peer or arguments.daemon.exists(),
            f"{arguments.daemon} does not exist: run cargo build --release",
        )
        guest = Guest()
        # A guest has four virtual CPUs: two of them at once would only be slow. And whoever comes
        # first builds the images that all use.
        turn = open(target_folder() / "vm" / "turn", "w")
        fcntl.flock(turn, fcntl.LOCK_EX)
        guest.build()
    except Failure as failure:
        print(f"vm: {failure}", file=sys.stderr)
        return 1
    if arguments.interactive:
        hand_over(arguments, guest)
        return 0
    names = arguments.scenario or list(ALL)
    passed = sum(run_scenario(name, arguments, guest) for name in names)
    print(f"vm: {passed} passed, {len(names) - passed} failed")
    return 0 if passed == len(names) else 1


if __name__ == "__main__":
    sys.exit(main())
