# SPDX-License-Identifier: Apache-2.0
"""Scenarios in which the daemon is killed again and again while the guest works.

How many times is up to `--kills`; QEMU reconnects (`reconnect-ms`), as it does for a user. The same
with a front-end in the test process, which sees more and does it in thousands: tests/storm.
"""

import random
import re
import time

from host import expect, wait_until
from replica import FaultyReplica, expect_equal, expect_equal_soon
from scenarios import (
    FIO_VERIFY_ONLY,
    LENIENT,
    check_file_system,
    fio,
    make_file_system,
    three_replicas,
)

# Rounds of writing and verifying on a file system, and beside them reads and writes of many sizes
# on files of their own, until somebody makes the file.
WORK = "while ! test -e /tmp/enough; do {} && {} || exit 1; done"
MIXED = (
    "fio --name=mixed --directory=/mnt --rw=randrw --bsrange=4k-64k --size=1m"
    " --numjobs=4 --direct=1 --ioengine=libaio --iodepth=16 --cpus_allowed=0-3"
    " --cpus_allowed_policy=split --verify=crc32c --verify_fatal=1 --do_verify=1 --fsync=64"
    " --group_reporting --output-format=json"
)
# After so many kills the guest must get something done before the next.
KILLS_WITHOUT_REST = 10
EXECUTED_AGAIN = re.compile(r"requests in flight are executed again.*?marked=(\d+)")


class SluggishReplica(FaultyReplica):
    """An image that is a little late with every answer: what waits for it, such as a request that
    overlaps another, is overtaken by what does not."""

    DELAY_SECONDS = 0.01


def kill_storm(bench):
    """The daemon is killed at random moments, also while it starts and while QEMU reconnects, and
    another is started. The guest's verified writes and reads on four queues meet no error and no
    wrong byte, its kernel sees nothing (no I/O error, no `is not a head!`), the file system is
    sound, and all replicas are identical in the end (I11)."""
    rng = random.Random(bench.seed)
    with three_replicas(bench, SluggishReplica) as replicas, Served(bench, replicas) as served:
        with bench.boot(served.daemon) as machine:
            make_file_system(machine)
            machine.start("work", WORK.format(fio("verify", 2), MIXED))
            for number in range(bench.kills):
                if number % KILLS_WITHOUT_REST == 0:
                    expect(machine.is_running("work"), "fio has ended")
                    await_progress(machine)
                # A third of them before QEMU can have found the daemon, or just when it does.
                longest = 0.2 if rng.random() < 0.3 else 1.2
                time.sleep(rng.uniform(0, longest))
                served.replace()
            machine.run("touch /tmp/enough")
            machine.finish("work")
            machine.run(fio("verify", 2) + FIO_VERIFY_ONLY)
            check_file_system(machine)
            replicas[2].tell("delay 0")
            expect_equal_soon(replicas, 60)
            machine.check_kernel_log()
            machine.shut_down()
        served.daemon.stop()
        log = served.daemon.log()
        expect("panicked" not in log, "a daemon panicked")
        expect(not served.daemon.events("QUORUM_FAILURE"), "a request found no winner")
        again = sum(int(marked) for marked in EXECUTED_AGAIN.findall(log))
        expect(bench.peer or again > bench.kills, f"only {again} requests were in flight at kills")
        print(f"  {bench.kills} kills, {again} requests executed again", flush=True)
        expect_equal(replicas)


class Served:
    """A disk and one daemon after the other that serves it. Use as a context manager."""

    def __init__(self, bench, replicas):
        self._serve = lambda: bench.serve(replicas, *LENIENT, "--lock-timeout", 25)

    def __enter__(self):
        self.daemon = self._serve().__enter__()
        return self

    def __exit__(self, *exception):
        self.daemon.__exit__(*exception)

    def replace(self):
        """Kills the daemon and starts another."""
        self.daemon.kill()
        self.daemon.__exit__()
        self.daemon = self._serve().__enter__()


def await_progress(machine):
    """Waits until requests on the disk have been completed from now on."""

    def completed():
        fields = machine.run("cat /tmp/disk/stat").split()
        return int(fields[0]) + int(fields[4])

    before = completed()
    wait_until(lambda: completed() > before + 8, 30, "requests of the guest to be completed")


# In the order in which they are run, after the scenarios.
STORMS = {"kill-storm": kill_storm}
