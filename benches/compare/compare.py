#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measures the daemon against QEMU's quorum driver: same files, same front-end, in turn.

Each row is a load on a kind of storage. All servers are started on the same three files, run for
a moment in alternating rounds, and the medians are compared. Needs root for mounts.

  compare.py                      all rows
  compare.py --row 'randread'     rows whose name contains this; --list names them
  compare.py --row restart        only how long a restart of the daemon takes
  compare.py --peer-only          leave the daemon out, to try other settings of the peer
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "vm"))

import plot  # noqa: E402
import restart  # noqa: E402
from host import Failure, scratch_folder, target_folder  # noqa: E402
from rows import ROWS  # noqa: E402
from servers import FRONT_END_CPU, LIMIT, SERVER_CPU, THRESHOLD, pinned, served  # noqa: E402
from storage import DISK_BYTES, STORAGE  # noqa: E402
from table import HEADER, Result  # noqa: E402

# Enough for a random load to meet every extent.
WARM_UP_SECONDS = 0.7
# Of an idle server, where that is looked at.
IDLE_SECONDS = 1
# Pool of buffers by default, and what the daemon may take beside it with three replicas.
POOL_MIB, BESIDE_MIB = 64, 40


def run(command, seconds):
    """Runs the load generator. Returns its report."""
    words = [str(word) for word in command]
    result = subprocess.run(words, capture_output=True, text=True, timeout=seconds + 60)
    if result.returncode != 0:
        raise Failure(f"the load failed: {result.stderr.strip()}")
    return json.loads(result.stdout)


def load(arguments, row, seconds, seed):
    """The command line of one run, but for what it is about."""
    command = [arguments.front_end, "--mix", row.mix, "--block-bytes", row.block_bytes]
    command += ["--depth", row.depth, "--seconds", seconds, "--seed", seed]
    return pinned(command, FRONT_END_CPU) if row.alone else command


def measure(arguments, row, name, storage, folder, seed):
    """One run of the server of that name. Returns the report."""
    seconds = max(arguments.seconds, row.seconds_min)
    storage.prepare(name)
    if name == LIMIT:
        storage.ready()
        direct = ["--direct"] if storage.direct else []
        return run([*load(arguments, row, seconds, seed), *direct, "--files", *storage.paths],
                   seconds)
    socket = folder / f"{name.replace(' ', '-')}.sock"
    with served(name, row, storage, socket, arguments) as process:
        storage.ready()
        # The first write to an extent is noted in the record; that is not what is measured.
        run([*load(arguments, row, WARM_UP_SECONDS, seed), "--socket", socket], WARM_UP_SECONDS)
        command = [*load(arguments, row, seconds, seed), "--socket", socket]
        command += ["--server", process.pid]
        if row.alone:
            command += ["--idle-seconds", IDLE_SECONDS]
        return run(command, seconds)


def measure_row(arguments, row, storage, folder):
    """Measures one row: a run of each server, and again."""
    names = ["peer"] if arguments.peer_only else [*row.servers, "ours"]
    result = Result(row)
    for seed in range(1, arguments.rounds + 1):
        for name in names:
            result.add(name, measure(arguments, row, name, storage, folder, seed))
    return result


def machine():
    """What it was measured on."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    version = subprocess.run(["qemu-storage-daemon", "--version"], capture_output=True, text=True)
    return {
        "date": datetime.date.today().isoformat(),
        "processor": model,
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "peer": version.stdout.splitlines()[0],
    }


def print_memory(results):
    """Prints the most memory the daemon had resident. Returns whether it is within its target."""
    most = max(result.median("ours", "server_rss_mib") for result in results)
    met = most <= POOL_MIB + BESIDE_MIB
    print(
        f"\nmemory: at most {most:.0f} MiB resident, of which {POOL_MIB} MiB may be buffers; "
        f"target <= {POOL_MIB + BESIDE_MIB} MiB: {'met' if met else 'MISSED'}"
    )
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
    parser.add_argument("--seconds", type=float, default=1, help="of each run (default 1)")
    parser.add_argument("--peer-only", action="store_true", help="measure the peer alone")
    parser.add_argument("--peer-aio", choices=("threads", "native", "io_uring"))
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--plot", type=Path, help="draw the ratios into this file (SVG)")
    parser.add_argument("--check", action="store_true", help="fail if a target is missed")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    rows = [row for row in ROWS if arguments.row in row.name]
    restarts = arguments.row in restart.NAME and not arguments.peer_only
    if arguments.list:
        print("\n".join([row.name for row in rows] + [restart.NAME] * restarts))
        return 0
    if not rows and not restarts:
        print(f"bench: no row has '{arguments.row}' in its name; see --list", file=sys.stderr)
        return 2
    # An interrupted run must leave no mounts, loop devices or servers behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    folder = scratch_folder("bench")
    results = []
    try:
        facts = machine()
        print(f"{facts['date']}, {facts['cpus']} x {facts['processor']}, Linux {facts['kernel']}")
        print(f"peer: {facts['peer']}, quorum of 3, T={THRESHOLD}")
        print(
            f"replicas of {DISK_BYTES >> 20} MiB; "
            f"medians of {arguments.rounds} alternating runs of {arguments.seconds:g} s; "
            f"pinned rows: server on processor {SERVER_CPU}, front-end on {FRONT_END_CPU}\n"
        )
        if rows:
            print(HEADER)
        for kind in dict.fromkeys(row.storage for row in rows):
            with STORAGE[kind](folder) as storage:
                for row in rows:
                    if row.storage == kind:
                        results.append(measure_row(arguments, row, storage, folder))
                        results[-1].print()
        met = all(result.is_met() for result in results)
        milliseconds = []
        if restarts:
            with STORAGE["direct"](folder) as storage:
                milliseconds = restart.measure(arguments, storage.paths, folder)
                met &= restart.print_row(milliseconds)
        if results and not arguments.peer_only:
            met &= print_memory(results)
        if arguments.json:
            rows = [result.to_json() for result in results]
            figures = {"machine": facts, "rows": rows, "restart_ms": milliseconds}
            arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
        if arguments.plot:
            arguments.plot.write_text(plot.svg(results))
    except Failure as failure:
        print(f"bench: {failure}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if met or not arguments.check else 1


if __name__ == "__main__":
    sys.exit(main())
