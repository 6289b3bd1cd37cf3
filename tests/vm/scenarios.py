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

from host import Failure, expect, wait_until
from machine import QUEUES
from replica import (
    BufferingReplica,
    FaultyReplica,
    FileReplica,
    LoopReplica,
    SlowReplica,
    SmallTmpfsReplica,
    expect_equal,
    expect_equal_soon,
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
# However often a replica fails, it is not given up: these scenarios are about what happens when it
# does not fail any more.
LENIENT = ("--max-write-errors", 0, "--max-kicks", 0, "--max-repairs", 0)
# Writes that reach the disk and that nobody syncs, without an end.
NOISE = "while :; do dd if=/dev/urandom of=/mnt/noise bs=16k count=64 {}; done".format(
    "conv=notrunc oflag=direct"
)
# What a daemon logs when its guest is on its way to another.
LET_GO = "the guest is being moved"
# A migration that need not be gentle to the network, and may stop a guest without hardware
# acceleration for as long as the rest of its memory takes.
QUICK = {"max_bandwidth": 1 << 30, "downtime_limit": 3000}
# One that does not end by itself while the guest works.
SLOW = {"max_bandwidth": 64 << 20, "downtime_limit": 1}
# The size of what is read while the guest moves.
WITNESS_MIB = 16
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


@contextmanager
def noting_late(daemon, late):
    """Adds to `late` the names of replicas that were left behind for being late."""
    try:
        yield
    finally:
        behind = daemon.events("QUORUM_BLK_REPLICA_BEHIND")
        late.update(event["replica"] for event in behind if event["cause"] == "late")


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
    """Tells the same story again if a replica was late meanwhile: it does not vote where it is
    behind (W6), and with what is spoiled that is one fault more than can be borne. A machine that
    is busy with something else makes it so."""
    for _ in range(3):
        late = set()
        try:
            spoil_once(bench, choose, guilty, late)
            return
        except Failure:
            if not late:
                raise
            print(f"  told again: {', '.join(late)} was late", flush=True)
            bench.forget_events()
    raise Failure("a replica was late each time: this machine is too busy")


def spoil_once(bench, choose, guilty, late):
    """Spoils sectors while the guest writes and verifies. `choose(random, sector)` says which
    replica may be wrong in a sector. The guest sees nothing; only the guilty are blamed, only for
    what was spoiled; at the end all replicas are identical again."""
    rng = random.Random(bench.seed)
    spoiled = {name: set() for name in NAMES}
    with three_replicas(bench) as replicas:
        with bench.serve(replicas, *LENIENT) as daemon, noting_late(daemon, late):
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
    """One replica answers 500 ms late. The guest sees no error and right data, and neither its
    reads nor its writes wait for it, but for the first few (W6). When it is quick again, it gets
    what it missed."""
    with three_replicas(bench, SlowReplica) as replicas:
        with bench.serve(replicas, *LENIENT) as daemon:
            with bench.boot(daemon) as machine:
                make_file_system(machine)
                machine.run(fio("verify", 1))
                check_file_system(machine)
                # Without flushes.
                output = machine.run(FIO_RAW)
                # Notes may come before the object.
                report = json.loads(output[output.index("{") :])
                # A guest without hardware acceleration needs most of this for itself.
                for kind, limit_ms in (("read", 250), ("write", 250)):
                    times = report["jobs"][0][kind]["clat_ns"]
                    mean_ms, max_ms = times["mean"] / 1e6, times["max"] / 1e6
                    expect(mean_ms < limit_ms, f"a {kind} took {mean_ms:.0f} ms in the mean")
                    expect(max_ms < 1500, f"a {kind} took {max_ms:.0f} ms")
                expect(daemon.events("QUORUM_BLK_REPLICA_LAGGING"), "it is waited for still")
                replicas[2].tell("delay 0")
                daemon.await_state(replicas[2], "in-sync")
                machine.check_kernel_log()
                machine.shut_down()
            daemon.stop(60)
            expect(not daemon.events("QUORUM_FAILURE"), "a request found no winner")
            expect(blamed(daemon) <= {NAMES[2]}, f"blamed {blamed(daemon)}")
        expect_equal(replicas)


@contextmanager
def let_go(replica):
    """Lets a replica that hangs answer in the end, whatever happened: before that a daemon cannot
    even be killed."""
    try:
        yield
    finally:
        if isinstance(replica, FaultyReplica):
            replica.tell("resume")


def fail_and_recover(bench, kind, fail, recover, *options):
    """One replica fails while the guest writes and verifies, and after a while it does not any
    more. `fail` and `recover` are given the replica and the daemon. The guest sees nothing of it;
    the replica gets what it missed, and within a bounded time all are identical."""
    with three_replicas(bench, kind) as replicas:
        with bench.serve(replicas, *LENIENT, *options) as daemon, let_go(replicas[2]):
            with bench.boot(daemon) as machine:
                make_file_system(machine)
                machine.run(fio("before", 2))
                machine.start("during", fio("during", 4))
                time.sleep(0.5)
                fail(replicas[2], daemon)
                machine.finish("during")
                machine.start("after", fio("after", 3))
                time.sleep(0.5)
                recover(replicas[2], daemon)
                machine.finish("after")
                machine.run(fio("before", 2) + FIO_VERIFY_ONLY)
                machine.run(fio("during", 4) + FIO_VERIFY_ONLY)
                check_file_system(machine)
                daemon.await_state(replicas[2], "in-sync")
                read_whole_disk(machine)
                expect_equal_soon(replicas)
                machine.check_kernel_log()
                machine.shut_down()
            daemon.stop()
            expect(not daemon.events("QUORUM_FAILURE"), "a request found no winner")
            expect(blamed(daemon) <= {NAMES[2]}, f"blamed {blamed(daemon)}")
            bench.expect_named(daemon, NAMES[2])
        expect_equal(replicas)


def stale_return(bench):
    """A replica's file is moved away while the guest writes, and put back without what was written
    meanwhile; then, in the same way, an older copy takes its place."""

    def fail(replica, daemon):
        replica.take_away()
        daemon.await_kick(replica, "vanished")
        time.sleep(1)
        replica.put_back()
        daemon.await_state(replica, "in-sync")
        replica.copy_aside()

    def recover(replica, daemon):
        replica.put_back()
        daemon.await_state(replica, "syncing")

    fail_and_recover(bench, FileReplica, fail, recover)


def hang(bench):
    """A replica's file does not answer at all for a while: it is left out, and opened again when
    its last operation has ended."""

    def fail(replica, daemon):
        replica.tell("hang")
        daemon.await_kick(replica, "hung")

    def recover(replica, daemon):
        replica.tell("resume")

    fail_and_recover(bench, FaultyReplica, fail, recover, "--io-timeout", 2)


def full(bench):
    """The file system of a replica is full for a while."""

    def fail(replica, daemon):
        replica.fill()
        daemon.await_state(replica, "syncing")

    fail_and_recover(bench, SmallTmpfsReplica, fail, lambda replica, daemon: replica.free())


def eio(bench):
    """A replica fails all it is asked for, for a while."""

    def fail(replica, daemon):
        for operation in ("write", "read", "fsync"):
            replica.tell(f"eio {operation} on")

    def recover(replica, daemon):
        for operation in ("write", "read", "fsync"):
            replica.tell(f"eio {operation} off")

    fail_and_recover(bench, FaultyReplica, fail, recover)


def power_loss(bench):
    """Guest and daemon are killed, and what replicas had not flushed is lost: first that of one,
    then that of all. The guest boots again; its file system is sound, and every file that was
    synced is intact."""
    rng = random.Random(bench.seed)
    sums = {}
    with (
        BufferingReplica(bench.folder, NAMES[0], DISK_BYTES) as first,
        BufferingReplica(bench.folder, NAMES[1], DISK_BYTES) as second,
        BufferingReplica(bench.folder, NAMES[2], DISK_BYTES) as third,
    ):
        replicas = [first, second, third]
        for name, losers in (("first", [third]), ("second", replicas), ("third", [])):
            with bench.serve(replicas, *LENIENT) as daemon:
                with bench.boot(daemon, name) as machine:
                    if sums:
                        expect_intact(machine, sums)
                    else:
                        make_file_system(machine)
                    if losers:
                        # Much that nobody syncs, beside what is synced.
                        machine.start("noise", NOISE)
                        for number in range(12):
                            path = f"/mnt/{name}{number}"
                            machine.run(f"dd if=/dev/urandom of={path} bs=48k count=4 conv=fsync")
                            sums[path] = machine.run(f"md5sum {path}").split()[0]
                        time.sleep(rng.random())
                        machine.kill()
                        daemon.kill()
                    else:
                        machine.run("dd if=/dev/zero of=/dev/disk bs=512 count=1 conv=fsync")
                        expect_equal_soon(replicas)
                        machine.check_kernel_log()
                        machine.shut_down()
                        daemon.stop()
                        expect(not daemon.events("QUORUM_FAILURE"), "a request found no winner")
            for loser in losers:
                lost = loser.tell(f"drop {rng.randrange(1000)}" if losers is replicas else "drop")
                expect(lost > 0, f"{loser.name} had nothing to lose")
        expect_equal(replicas)


def expect_intact(machine, sums):
    """Fails unless the file system is sound and every synced file holds what it held."""
    # The journal is replayed by mounting it.
    machine.run("mount -t ext4 /dev/disk /mnt")
    check_file_system(machine)
    machine.run("mount -t ext4 /dev/disk /mnt")
    for path, expected in sums.items():
        found = machine.run(f"md5sum {path}").split()[0]
        expect(found == expected, f"{path} was synced and is not what it was")


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


def grow(bench):
    """The disk becomes longer while the guest writes to it: Linux sees the new size without being
    asked to look, the file system grows onto it, its data are intact, and replicas stay
    identical."""
    control = bench.folder / "control"
    with three_replicas(bench) as replicas:
        with bench.serve(replicas, "--control", control) as daemon:
            with bench.boot(daemon) as machine:
                make_file_system(machine)
                machine.run("dd if=/dev/urandom of=/mnt/kept bs=1M count=40; sync")
                kept = machine.run("md5sum /mnt/kept").split()[0]
                device = machine.run("basename $(readlink -f /dev/disk)").strip()
                size = f"cat /sys/block/{device}/size"
                expect(int(machine.run(size)) == SECTORS, "the size at first")
                machine.start("load", fio("load", 8))
                for factor in (2, 3):
                    bench.control(control, "resize", factor * DISK_BYTES)
                    wait_until(
                        lambda: int(machine.run(size)) == factor * SECTORS,
                        20,
                        "the guest to see the new size",
                    )
                    wait_until(
                        lambda: ", 0 of them to be settled" in bench.control(control, "status"),
                        60,
                        "what is new to be equal on all replicas",
                    )
                machine.finish("load", 240)
                machine.run("resize2fs /dev/disk")
                machine.run("dd if=/dev/zero of=/mnt/large bs=1M count=200; sync")
                machine.run(fio("verify", 6))
                found = machine.run("echo 3 >/proc/sys/vm/drop_caches; md5sum /mnt/kept").split()[0]
                expect(found == kept, "a file of before the growth is not what it was")
                check_file_system(machine)
                machine.check_kernel_log()
                machine.shut_down()
            daemon.stop()
            expect_no_fault(daemon)
        for replica in replicas:
            length = replica.image.stat().st_size
            expect(length == 3 * DISK_BYTES, f"{replica.name} has {length} bytes")
        expect_equal(replicas)


def migrate(bench):
    """The guest moves from one QEMU to another while it writes and verifies, each with a daemon of
    its own on the same replicas (Q5). First it is called back at the last moment, when its rings
    are stopped and the daemon has let go of the disk: it goes on where it was. Then it moves: the
    source lets go, the destination opens the disk, the guest sees nothing of it and no byte is
    wrong, neither on the disk nor in memory; and all replicas are identical."""
    with three_replicas(bench) as replicas:
        with (
            bench.serve(replicas, *LENIENT, name="source-") as source,
            bench.boot(source, "source") as machine,
        ):
            make_file_system(machine)
            machine.run(f"dd if=/dev/urandom of=/mnt/witness bs=1M count={WITNESS_MIB} conv=fsync")
            witness = machine.run("md5sum /mnt/witness")
            machine.start("during", f"until test -e /tmp/stop; do {fio('during', 2)} || exit; done")
            machine.begin_migration("exec:cat >/dev/null", pause_before_switchover=True, **QUICK)
            machine.await_migration("pre-switchover")
            source.await_log(LET_GO)
            source.show_status()
            source.await_log("closed: waiting for the guest")
            machine.qmp("migrate_cancel")
            machine.await_migration("cancelled")
            machine.run("true")
            expect(source.log().count("opening the disk") == 1, "it is not opened again")

            with (
                bench.serve(replicas, *LENIENT, "--incoming", name="destination-") as destination,
                bench.boot(destination, "destination", incoming=True) as arrival,
            ):
                expect("opening" not in destination.log(), "it is opened before the guest comes")
                machine.run("echo 3 >/proc/sys/vm/drop_caches")
                machine.begin_migration(arrival.migration_uri, **SLOW)
                machine.await_copied_once()
                # Pages that nobody but the daemon writes to, and that were copied before.
                machine.run("cat /mnt/witness >/dev/null")
                machine.qmp("migrate-set-parameters", **QUICK)
                machine.await_migration("completed")
                expect(source.log().count(LET_GO) == 2, "the source has not let go")
                # It is not needed any more.
                machine.kill()
                source.stop()
                expect_no_fault(source)
                arrival.take_over(machine)
                found = arrival.run("md5sum /mnt/witness")
                expect(found == witness, f"memory was not logged: {found} instead of {witness}")
                arrival.run("touch /tmp/stop")
                arrival.finish("during")
                arrival.run(fio("during", 2) + FIO_VERIFY_ONLY)
                arrival.run(fio("after", 2))
                check_file_system(arrival)
                arrival.check_kernel_log()
                arrival.shut_down()
                destination.stop()
                expect_no_fault(destination)
                expect("opening the disk" in destination.log(), "nothing was opened here")
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
        stale_return,
        hang,
        full,
        eio,
        power_loss,
        grow,
        firmware,
        migrate,
    )
}
