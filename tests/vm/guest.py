# SPDX-License-Identifier: Apache-2.0
"""What the guest boots: a Debian cloud kernel, a small initial file system, a disk of tools.

The kernel comes from `scripts/install-test-deps`. The initial file system holds a static busybox,
the two modules that a virtio disk needs and `init`. Programs that are too large for it (fio and its
libraries, mke2fs, ...) are on a second, read-only disk, so that only the parts that run are read.
"""

import gzip
import lzma
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

from host import Failure, target_folder

HERE = Path(__file__).resolve().parent

# Loaded in this order, each after what it depends on; built-in ones are left out.
MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "nls_cp437", "nls_ascii", "vfat")

# Programs on the disk of tools.
TOOLS = ("fio", "mkfs.ext4", "e2fsck", "blkdiscard", "fallocate", "fstrim", "resize2fs")

# Quiet for speed; a panic ends QEMU, which is started with -no-reboot.
KERNEL_ARGUMENTS = "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable random.trust_cpu=on"


class Guest:
    """The files that QEMU is given to boot; made on first use, kept in the target folder."""

    def __init__(self):
        self._folder = target_folder() / "vm"
        self._folder.mkdir(parents=True, exist_ok=True)
        kernels = sorted((target_folder() / "vm-kernel" / "boot").glob("vmlinuz-*"))
        if not kernels:
            raise Failure("no guest kernel: run scripts/install-test-deps")
        self.kernel = kernels[-1]
        self._version = self.kernel.name.removeprefix("vmlinuz-")
        self.initrd = self._folder / "initrd"
        self.tools = self._folder / "tools.img"

    def build(self):
        """Makes what is missing or older than what it is made of."""
        inputs = [self.kernel, HERE / "init", HERE / "guest.py", find_program("busybox")]
        if not is_newer(self.initrd, inputs):
            self._build_initrd()
        if not is_newer(self.tools, [HERE / "guest.py"] + [find_program(name) for name in TOOLS]):
            self._build_tools()

    def make_bootable(self, image):
        """Puts a FAT file system with a boot loader, the kernel and the initial file system on an
        existing image, for a firmware to boot from."""
        configuration = self._folder / "syslinux.cfg"
        configuration.write_text(
            "SERIAL 0\nDEFAULT linux\nLABEL linux\nLINUX linux\nINITRD initrd\n"
            f"APPEND {KERNEL_ARGUMENTS}\n"
        )
        files = [(self.kernel, "linux"), (self.initrd, "initrd"), (configuration, "syslinux.cfg")]
        run(find_program("mkfs.vfat"), image)
        for source, name in files:
            run(find_program("mcopy"), "-i", image, source, f"::{name}")
        run(find_program("syslinux"), "--install", image)

    def _build_initrd(self):
        archive = CpioArchive()
        for folder in ("bin", "dev", "proc", "sys", "tmp", "mnt", "tools", "modules"):
            archive.add_folder(folder)
        archive.add_file("bin/busybox", find_program("busybox").read_bytes(), 0o755)
        archive.add_file("init", (HERE / "init").read_bytes(), 0o755)
        for position, module in enumerate(self._module_order()):
            name = module.name.split(".")[0]
            archive.add_file(f"modules/{position:02}-{name}.ko", read_module(module), 0o644)
        write_atomically(self.initrd, archive.finish())

    def _module_order(self):
        """Paths of the modules to load, each after those it depends on."""
        root = target_folder() / "vm-kernel" / "lib" / "modules" / self._version
        found = {}
        for path in root.glob("kernel/**/*.ko*"):
            found[path.name.split(".")[0].replace("-", "_")] = path
        order = []

        def visit(name):
            path = found.get(name)
            if path is None or path in order:
                return
            depends = re.search(rb"\0depends=([^\0]*)\0", read_module(path))
            for other in depends.group(1).decode().split(",") if depends else []:
                visit(other.replace("-", "_"))
            order.append(path)

        for module in MODULES:
            visit(module)
        return order

    def _build_tools(self):
        root = self._folder / "tools"
        shutil.rmtree(root, ignore_errors=True)
        for name in TOOLS:
            program = find_program(name)
            (root / "bin").mkdir(parents=True, exist_ok=True)
            shutil.copy(program, root / "bin" / name)
            copy_libraries(program, root)
        image = self._folder / "tools.img.new"
        image.unlink(missing_ok=True)
        size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
        with open(image, "wb") as file:
            file.truncate((size * 5 // 4 + (8 << 20)) & ~0xFFF)
        run(find_program("mkfs.ext4"), "-q", "-O", "^has_journal", "-d", root, image)
        shutil.rmtree(root)
        image.rename(self.tools)


class CpioArchive:
    """A "newc" archive, the format of an initial file system (kernel: early-userspace)."""

    def __init__(self):
        self._bytes = bytearray()
        self._inode = 0

    def add_folder(self, name):
        self._add(name, stat.S_IFDIR | 0o755, b"")

    def add_file(self, name, content, mode):
        self._add(name, stat.S_IFREG | mode, content)

    def finish(self):
        self._add("TRAILER!!!", 0, b"")
        return bytes(self._bytes)

    def _add(self, name, mode, content):
        self._inode += 1
        encoded = name.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, four device numbers, name length, check
        fields = (self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
        self._bytes += b"070701" + b"".join(b"%08x" % field for field in fields)
        self._bytes += encoded
        self._pad()
        self._bytes += content
        self._pad()

    def _pad(self):
        self._bytes += bytes(-len(self._bytes) % 4)


def read_module(path):
    """The bytes of a kernel module, which distributions may compress."""
    content = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(content)
    if path.suffix == ".gz":
        return gzip.decompress(content)
    return content


def copy_libraries(program, root):
    """Copies the shared libraries that a program names to `root`, at the same paths."""
    listing = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    for source in re.findall(r"(?:=> )?(/\S+) \(0x", listing):
        copy = root / source.lstrip("/")
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copy)


def find_program(name):
    """The path of a program of the host."""
    path = shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    if path is None:
        raise Failure(f"{name} is not installed: run scripts/install-test-deps")
    return Path(path)


def run(*command):
    """Runs a program of the host, which must succeed."""
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if result.returncode != 0:
        raise Failure(f"{command[0]} failed: {result.stderr.strip()}")


def is_newer(path, inputs):
    """Whether `path` exists and is no older than any of `inputs`."""
    return path.exists() and all(path.stat().st_mtime >= each.stat().st_mtime for each in inputs)


def write_atomically(path, content):
    new = path.with_suffix(".new")
    new.write_bytes(content)
    new.rename(path)
