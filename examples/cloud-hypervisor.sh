#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Usage: examples/cloud-hypervisor.sh SOCKET [OPTIONS...]
# Starts cloud-hypervisor with the disk that quorum-blk serves on SOCKET. A kernel and a system
# disk follow as options of cloud-hypervisor.
set -eu
socket=${1:?usage: cloud-hypervisor.sh SOCKET [OPTIONS...]}
shift
# Guest memory must be shared: the back-end works in it.
exec cloud-hypervisor \
    --cpus boot=4 --memory size=2G,shared=on \
    --disk "vhost_user=true,socket=$socket,num_queues=4,queue_size=256" \
    "$@"
