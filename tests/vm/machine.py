# SPDX-License-Identifier: Apache-2.0
"""A virtual machine: QEMU with one vhost-user disk, and the line on which the guest takes orders."""

import json
import re
import socket
import subprocess
import time

from guest import KERNEL_ARGUMENTS, find_program
from host import Failure, expect, stop_process, wait_until

BOOT_SECONDS = 90

# Not KVM: it is not everywhere, and where it is nested it may start and then fail. Not a thread
# for each virtual CPU: QEMU 10.0 then sometimes aborts (`iotlb_to_section: Assertion ...`) when
# the guest maps a device while another CPU runs.
ACCELERATOR = "tcg,thread=single"
QUEUES = 4
# How soon, and how often, QEMU looks for a daemon that has gone.
RECONNECT_MS = 50

# What the kernel says when a request on the disk fails or the ring is damaged.
KERNEL_COMPLAINTS = re.compile(
    r"I/O error|is not a head|Buffer I/O|EXT4-fs error|blocked for more than|Kernel panic|BUG:"
)


class Machine:
    """A running guest. Use as a context manager; leaving it ends QEMU whatever happened.

    With `incoming` it waits for a guest that migrates to it, at the address in `migration_uri`;
    `take_over` is to be called when it has come."""

    def __init__(self, guest, disk_socket, folder, name="vm", boot_from_disk=False, incoming=False):
        self._folder = folder
        self._name = name
        self._console = folder / f"{name}-console.log"
        self._command_path = folder / f"{name}-commands.sock"
        self._qmp_path = folder / f"{name}-qmp.sock"
        self._incoming = incoming
        self.migration_uri = f"unix:{folder / name}-migration.sock"
        self._log = open(folder / f"{name}-qemu.log", "wb")
        self._number = 0
        self._received = b""
        self._transcript = open(folder / f"{name}-commands.log", "wb")
        self._process = subprocess.Popen(
            self._command_line(guest, disk_socket, boot_from_disk),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )

    def _command_line(self, guest, disk_socket, boot_from_disk):
        kernel = ["-kernel", guest.kernel, "-initrd", guest.initrd, "-append", KERNEL_ARGUMENTS]
        words = [
            find_program("qemu-system-x86_64"),
            *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
            *("-machine", "q35,memory-backend=mem", "-accel", ACCELERATOR),
            *("-cpu", "max", "-smp", str(QUEUES), "-m", "512M"),
            *("-object", "memory-backend-memfd,id=mem,size=512M,share=on"),
            *("-serial", f"file:{self._console}"),
            *("-chardev", f"socket,id=commands,path={self._command_path},server=on,wait=off"),
            *("-device", "virtio-serial-pci"),
            *("-device", "virtserialport,chardev=commands,name=commands"),
            *("-chardev", f"socket,id=disk,path={disk_socket},reconnect-ms={RECONNECT_MS}"),
            *("-device", f"vhost-user-blk-pci,chardev=disk,num-queues={QUEUES},bootindex=1"),
            *("-drive", f"id=tools,if=none,format=raw,readonly=on,file={guest.tools}"),
            *("-device", "virtio-blk-pci,drive=tools,serial=tools"),
            *("-qmp", f"unix:{self._qmp_path},server=on,wait=off"),
            *([] if boot_from_disk else kernel),
            *(["-incoming", "defer"] if self._incoming else []),
        ]
        return [str(word) for word in words]

    def __enter__(self):
        try:
            self._connect()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        stop_process(self._process)
        self._log.close()
        self._transcript.close()

    def _connect(self):
        self._commands = wait_until(self._try_connect, 20, "QEMU's command socket")
        if self._incoming:
            wait_until(self._qmp_path.exists, 20, "QEMU's monitor")
            # Answered when it listens there.
            self.qmp("migrate-incoming", uri=self.migration_uri)
        else:
            self._wait_for_line(re.compile(rb"@@ ready"), BOOT_SECONDS)

    def _try_connect(self):
        """A connection to the guest's command port, or None while QEMU does not listen yet: the
        file is there a moment before."""
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(self._command_path))
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            return None
        return connection

    def run(self, command, seconds=120, check=True):
        """Runs a shell command in the guest. Returns what it printed, or with `check=False` the
        pair of that and its status."""
        expect("\n" not in command, "a command is one line")
        self._number += 1
        self._commands.sendall(f"{self._number} {command}\n".encode())
        pattern = re.compile(rb"@@ %d (\d+)" % self._number)
        output, match = self._wait_for_line(pattern, seconds, command)
        status = int(match.group(1))
        if not check:
            return output, status
        expect(status == 0, f"guest: `{command}` ended with status {status}:\n{output}")
        return output

    def start(self, name, command):
        """Starts a command in the background of the guest; `finish` waits for it."""
        self.run(f"({{ {command}; }} >/tmp/{name}.log 2>&1; echo $? >/tmp/{name}.rc) &")

    def is_running(self, name):
        """Whether a command begun by `start` has not ended."""
        return self.run(f"test -s /tmp/{name}.rc", check=False)[1] != 0

    def finish(self, name, seconds=120):
        """Waits for a command begun by `start`, which must end with status 0."""
        self.run(f"until test -s /tmp/{name}.rc; do usleep 50000; done", seconds)
        output = self.run(f"cat /tmp/{name}.log")
        status = int(self.run(f"cat /tmp/{name}.rc"))
        expect(status == 0, f"guest: {name} ended with status {status}:\n{output}")
        return output

    def check_kernel_log(self):
        """Fails if the guest's kernel has met an error on the disk."""
        for line in self.run("dmesg").splitlines():
            expect(not KERNEL_COMPLAINTS.search(line), f"guest kernel: {line}")

    def shut_down(self):
        """Lets the guest switch itself off and waits for QEMU to end."""
        self._commands.sendall(b"0 sync; poweroff -f\n")
        try:
            status = self._process.wait(30)
        except subprocess.TimeoutExpired as error:
            raise Failure("the guest did not switch itself off") from error
        expect(status == 0, f"QEMU ended with status {status}")

    def kill(self):
        """Ends QEMU at once, as a host does that loses the VMM."""
        self._process.kill()
        self._process.wait()

    def qmp(self, command, **arguments):
        """Gives QEMU one monitor command and returns its answer."""
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.settimeout(30)
            monitor.connect(str(self._qmp_path))
            stream = monitor.makefile("rw")
            stream.readline()
            execute(stream, "qmp_capabilities", {})
            # QEMU writes names with dashes; those of Python have none.
            named = {name.replace("_", "-"): value for name, value in arguments.items()}
            return execute(stream, command, named)

    def begin_migration(self, uri, pause_before_switchover=False, **parameters):
        """Lets the guest begin to move to `uri`; `parameters` are those of the migration."""
        capability = {"capability": "pause-before-switchover", "state": pause_before_switchover}
        self.qmp("migrate-set-capabilities", capabilities=[capability])
        self.qmp("migrate-set-parameters", **parameters)
        self.qmp("migrate", uri=uri)

    def await_migration(self, status, seconds=90):
        """Waits until the migration is in a state."""

        def arrived():
            found = self.qmp("query-migrate")
            failed = found["status"] in ("failed", "cancelled") and found["status"] != status
            expect(not failed, f"the migration is {found}")
            return found["status"] == status

        wait_until(arrived, seconds, f"the migration to be {status}")

    def await_copied_once(self, seconds=90):
        """Waits until all of the guest's memory has been copied once, and only what changes is."""

        def copied():
            found = self.qmp("query-migrate")
            expect(found["status"] in ("setup", "active"), f"the migration is {found}")
            return found.get("ram", {}).get("dirty-sync-count", 0) > 1

        wait_until(copied, seconds, "the memory to be copied once")

    def take_over(self, source):
        """Goes on with the guest that has come from the machine `source`."""
        self._number = source._number

    def _wait_for_line(self, pattern, seconds, what="boot"):
        """Reads on until a line matches and returns what came before it, and the match."""
        deadline = time.monotonic() + seconds
        lines = []
        while True:
            line, end, rest = self._received.partition(b"\n")
            if end:
                self._received = rest
                if match := pattern.match(line):
                    return b"\n".join(lines).decode(errors="replace").strip(), match
                lines.append(line)
                continue
            self._commands.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                received = self._commands.recv(65536)
            except TimeoutError as error:
                raise Failure(f"guest: {what}: no answer within {seconds} s") from error
            expect(received, f"guest: {what}: QEMU ended (see {self._folder})")
            self._transcript.write(received)
            self._received += received


def execute(stream, command, arguments):
    """Sends one command on a monitor that is open and returns what it answers."""
    stream.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
    stream.flush()
    # Events come in between.
    while "return" not in (answer := json.loads(stream.readline())):
        expect("error" not in answer, f"QEMU: {command}: {answer}")
    return answer["return"]
