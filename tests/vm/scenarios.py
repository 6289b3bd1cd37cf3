# SPDX-License-Identifier: Apache-2.0
"""What happens to a guest's disk, one function a story.

A scenario is given a `Bench`, sets up replicas, serves them, boots a guest and raises `Failure` if
anything is not as it must be. Its docstring says what must hold. Rules and invariants (I15, ...)
are those of the project's consistency model.
"""

import json
import random
import re
import subprocess
import time
from contextlib import contextmanager

from host import expect
from machine import QUEUES
from replica import (
    FileReplica,
    LoopReplica,
    SlowReplica,
    SmallTmpfsReplica,
    expect_equal,
    first_difference,
)

DISK_BYTES = 128 << 20
SECTORS = DISK_BYTES // 512
NAMES = ("alpha", "beta", "gamma")

# Random direct writes from one process per virtual CPU, flushed now and then, then every block
# read back and its checksum compared.
FIO = (
    "fio --name={name} --directory=/mnt --rw=randwrite --bs=4k --size={mebibytes}m --numjobs=4"
    " --direct=1 --ioengine=libaio --iodepth=8 --cpus_allowed=0-3 --cpus_allowed_policy=split"
    " --verify=crc32c --verify_fatal=1 --do_verify={verify} --fsync=32 --group_reporting"
    " --output-format=json"
)
# The same on the disk itself, in an area of its own for each process, without a flush.
FIO_RAW = (
    "fio --name=raw --filename=/dev/disk --offset=32m --offset_increment=8m --size=2m --numjobs=4"
    " --rw=randwrite --bs=4k --direct=1 --ioengine=libaio --iodepth=8 --verify=crc32c"
    " --verify_fatal=1 --do_verify=1 --group_reporting --output-format=json"
)
# Only the reading half of the first, for files that an earlier run has written.
FIO_VERIFY_ONLY = " --verify_only"


def fio(name, mebibytes, verify=1):
    """The command line of one run, with `mebibytes` for each of its four processes."""
    return FIO.format(name=name, mebibytes=mebibytes, verify=verify)


def make_file_system(machine):
    machine.run("mkfs.ext4 -q /dev/disk && mount -t ext4 /dev/disk /mnt")


def read_whole_disk(machine):
    """Reads every sector past the guest's page cache, so that every sector is voted on."""
    machine.run("dd if=/dev/disk of=/dev/null bs=1M iflag=direct")


def read_until_repaired(machine, replicas, passes=2):
    """Reads the whole disk until the replicas are identical. The first pass finds every difference;
    the last of its repairs may still be under way when the guest has its data."""
    for _ in range(passes):
        read_whole_disk(machine)
        if all(first_difference(replicas[0].image, each.image) is None for each in replicas[1:]):
            return
    expect_equal(replicas)


def check_file_system(machine):
    machine.run("umount /mnt")
    machine.run("e2fsck -f -n /dev/disk")


@contextmanager
def three_replicas(bench, kind=FileReplica):
    """Three replicas of which the last is of the given kind."""
    with (
        FileReplica(bench.folder, NAMES[0], DISK_BYTES) as first,
        FileReplica(bench.folder, NAMES[1], DISK_BYTES) as second,
        kind(bench.folder, NAMES[2], DISK_BYTES) as third,
    ):
        yield [first, second, third]


def blamed(daemon):
    """Names of the replicas that events say were wrong."""
    return {event["node-name"] for event in daemon.events("QUORUM_REPORT_BAD")}


def expect_no_fault(daemon):
    for name in ("QUORUM_REPORT_BAD", "QUORUM_FAILURE"):
        events = daemon.events(name)
        expect(not events, f"without a fault there must be no {name}: {events[:3]}")


def healthy(bench):
    """Without faults: all four queues are used, the guest's flushes, discards and write zeroes
    arrive as such, the file system is clean, replicas are identical, nobody is blamed (I15)."""
    with three_replicas(bench) as replicas:
        with bench.serve(replicas) as daemon:
            with bench.boot(daemon) as machine:
                make_file_system(machine)
                machine.run(fio("verify", 6))
                queues = machine.run("ls /tmp/disk/mq | wc -l")
                expect(int(queues) == QUEUES, f"the guest uses {queues} queues, not {QUEUES}")
                for line in machine.run("grep virtio.-req /proc/interrupts").splitlines()[:QUEUES]:
                    interrupts = sum(map(int, re.findall(r"\s(\d+)(?=\s)", line)))
                    expect(interrupts > 0, f"a queue without an interrupt: {line}")

                machine.run("rm /mnt/verify*; /tools/bin/fstrim -v /mnt")
                check_file_system(machine)
                check_discard_and_write_zeroes(machine)
                machine.check_kernel_log()
                bench.expect_locked(replicas[0])
                machine.shut_down()
            daemon.stop()
            bench.expect_counters(daemon, "flush", "discard", "write-zeroes", "read", "write")
            expect_no_fault(daemon)
        expect_equal(replicas)


def check_discard_and_write_zeroes(machine):
    """Writes a pattern over 8 MiB, discards and zeroes parts of it and looks what is left."""
    machine.run("tr '\\0' '\\377' </dev/zero | dd of=/dev/disk bs=1M count=8 iflag=fullblock")
    machine.run("sync; /tools/bin/blkdiscard -o 1M -l 1M /dev/disk")
    machine.run("/tools/bin/blkdiscard -z -o 3M -l 1537k /dev/disk")
    machine.run("/tools/bin/fallocate -z -n -o 6M -l 64k /dev/disk")
    machine.run("echo 3 >/proc/sys/vm/drop_caches")
    zeroes = "dd if=/dev/disk bs=512 skip={} count={} 2>/dev/null | tr -d '\\0' | wc -c"
    for name, start, count in (("write zeroes", 6144, 3074), ("/tools/bin/fallocate -z", 12288, 128)):
        left = int(machine.run(zeroes.format(start, count)))
        expect(left == 0, f"{left} bytes are not zero after {name}")
    for start in (0, 4096, 6144 + 3074, 12288 + 128):
        kept = int(machine.run(zeroes.format(start, 1)))
        expect(kept == 512, f"sector {start} was changed by a neighbour's discard or zeroes")


def spoil_while_running(bench, choose, guilty):
    """Spoils sectors while the guest writes and verifies. `choose(random, sector)` says which
    replica may be wrong in a sector. The guest sees nothing; only the guilty are blamed, only for
    what was spoiled; at the end all replicas are identical again."""
    rng = random.Random(bench.seed)
    spoiled = {name: set() for name in NAMES}
    with three_replicas(bench) as replicas:
        with bench.serve(replicas) as daemon:
            with bench.boot(daemon) as machine:
                make_file_system(machine)
                machine.run(fio("before", 3))

                def spoil(count):
                    start = rng.randrange(SECTORS - 16)
                    for sector in range(start, start + count):
                        replica = replicas[choose(sector)]
                        replica.spoil(sector, 1, rng.random())
                        spoiled[replica.name].add(sector)

                for _ in range(200):
                    spoil(rng.randrange(1, 16))
                machine.start("during", fio("during", 3))
                while machine.is_running("during"):
                    spoil(rng.randrange(1, 8))
                    time.sleep(0.01)
                machine.finish("during")
                machine.run(fio("before", 3) + FIO_VERIFY_ONLY)
                check_file_system(machine)
                read_until_repaired(machine, replicas)
                machine.check_kernel_log()
                machine.shut_down()
            daemon.stop()
            expect(not daemon.events("QUORUM_FAILURE"), "a request found no winner")
            expect(blamed(daemon) == guilty, f"blamed {blamed(daemon)}, guilty {guilty}")
            for event in daemon.events("QUORUM_REPORT_BAD"):
                expect_blame_is_right(event, spoiled)
        expect_equal(replicas)


def expect_blame_is_right(event, spoiled):
    """Every sector an event names was spoiled on the replica it names."""
    sectors = range(event["sector-num"], event["sector-num"] + event["sectors-count"])
    innocent = set(sectors) - spoiled[event["node-name"]]
    expect(not innocent, f"{event} names sectors that were never spoiled: {innocent}")


def garbage_one(bench):
    """Garbage written into one replica while the guest works."""
    spoil_while_running(bench, lambda sector: 1, {NAMES[1]})


def garbage_two(bench):
    """Garbage in even sectors of one replica and odd sectors of another, so that within one
    request different pairs agree: only a vote by sector can give the right data."""
    spoil_while_running(bench, lambda sector: sector % 2, {NAMES[0], NAMES[1]})


def fail_while_running(bench, kind, fail):
    """One replica begins to fail while the guest works. The guest sees nothing, the two others are
    identical at the end, and the log or an event names the replica that failed."""
    with three_replicas(bench, kind) as replicas:
        with bench.serve(replicas) as daemon:
            with bench.boot(daemon) as machine:
                make_file_system(machine)
                machine.run(fio("before", 3))
                machine.start("during", fio("during", 6))
                time.sleep(0.5)
                fail(replicas[2])
                machine.finish("during")
                machine.run(fio("before", 3) + FIO_VERIFY_ONLY)
                machine.run(fio("after", 2))
                check_file_system(machine)
                machine.check_kernel_log()
                machine.shut_down()
            daemon.stop()
            expect(not daemon.events("QUORUM_FAILURE"), "a request found no winner")
            expect(blamed(daemon) <= {NAMES[2]}, f"blamed {blamed(daemon)}")
            expect(NAMES[2] in daemon.log(), "the log does not name the replica that failed")
            bench.expect_named(daemon, NAMES[2])
        expect_equal(replicas[:2])


def read_errors(bench):
    """A loop device gives EIO because its file was cut short."""
    fail_while_running(bench, LoopReplica, lambda replica: replica.truncate(4 << 20))


def no_space(bench):
    """Writes give ENOSPC because the file system of one replica is full."""
    fail_while_running(bench, SmallTmpfsReplica, lambda replica: replica.fill())


def truncated(bench):
    """One image is cut short: reads beyond its end are short, and a short read is an error, never
    zeroes (V4)."""
    fail_while_running(bench, FileReplica, lambda replica: replica.truncate(4 << 20))


def slow(bench):
    """One replica answers 500 ms late. The guest sees no error and right data, and its reads do not
    wait for it. Its writes do, within the write grace (W6): nothing could bring the replica back
    yet if it were left behind."""
    with three_replicas(bench, SlowReplica) as replicas:
        with bench.serve(replicas) as daemon:
            with bench.boot(daemon) as machine:
                make_file_system(machine)
                machine.run(fio("verify", 1))
                check_file_system(machine)
                # Without flushes, which do wait for it (up to flush-grace).
                output = machine.run(FIO_RAW)
                # Notes may come before the object.
                report = json.loads(output[output.index("{") :])
                for kind, limit_ms in (("read", 250), ("write", 1200)):
                    mean_ms = report["jobs"][0][kind]["clat_ns"]["mean"] / 1e6
                    expect(mean_ms < limit_ms, f"a {kind} took {mean_ms:.0f} ms in the mean")
                machine.check_kernel_log()
                machine.shut_down()
            daemon.stop(60)
            expect(not daemon.events("QUORUM_FAILURE"), "a request found no winner")
            expect(blamed(daemon) <= {NAMES[2]}, f"blamed {blamed(daemon)}")
            left_behind = daemon.events("QUORUM_BLK_REPLICA_BEHIND")
        expect_equal(replicas[:2] if left_behind else replicas)


def firmware(bench):
    """The firmware boots the guest from the disk itself: boot sector, loader, kernel and initial
    file system are read by SeaBIOS, then Linux takes over on the same connection. QEMU ends and is
    started again, on the same daemon."""
    with three_replicas(bench) as replicas:
        bench.guest.make_bootable(replicas[0].image)
        for other in replicas[1:]:
            subprocess.run(["cp", replicas[0].image, other.image], check=True)
        with bench.serve(replicas) as daemon:
            for name in ("first", "second"):
                with bench.boot(daemon, name, boot_from_disk=True) as machine:
                    machine.run("mount -t vfat /dev/disk /mnt")
                    machine.run("cat /mnt/linux >/mnt/copy; sync; cmp /mnt/linux /mnt/copy")
                    machine.run("rm /mnt/copy; umount /mnt")
                    read_whole_disk(machine)
                    machine.check_kernel_log()
                    machine.shut_down()
            # The third time the guest is killed instead of shutting down.
            with bench.boot(daemon, "third", boot_from_disk=True) as machine:
                machine.start("writer", "dd if=/dev/zero of=/dev/disk bs=64k seek=1024 count=512")
                machine.kill()
            with bench.boot(daemon, "fourth", boot_from_disk=True) as machine:
                read_whole_disk(machine)
                machine.shut_down()
            daemon.stop()
            expect_no_fault(daemon)
        expect_equal(replicas)


# In the order in which they are run.
SCENARIOS = {
    function.__name__.replace("_", "-"): function
    for function in (
        healthy,
        garbage_one,
        garbage_two,
        read_errors,
        no_space,
        truncated,
        slow,
        firmware,
    )
}
