#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Usage: examples/qemu.sh SOCKET [QEMU OPTIONS...]
# Starts QEMU with the disk that quorum-blk serves on SOCKET. Everything else of the machine (a
# kernel, a system disk, a network) follows as options of QEMU, of which later ones win: add
# "-machine accel=tcg" where /dev/kvm is there but does not work.
set -eu
socket=${1:?usage: qemu.sh SOCKET [QEMU OPTIONS...]}
shift
accel=tcg
[ -w /dev/kvm ] && accel=kvm
# Guest memory must be shared: the back-end works in it. Queues follow the number of CPUs.
# reconnect-ms lets the guest wait for a daemon that was restarted (QEMU 9.2; before: reconnect=1).
exec qemu-system-x86_64 \
    -machine "q35,accel=$accel,memory-backend=mem" -smp 4 -m 2G \
    -object memory-backend-memfd,id=mem,size=2G,share=on \
    -chardev "socket,id=disk,path=$socket,reconnect-ms=1000" \
    -device vhost-user-blk-pci,chardev=disk,id=disk1 \
    "$@"
