#!/bin/bash
# Runs in the virtual machine of scripts/fault-matrix: points with page server rounds, for which the kernel has to track
# dirty pages. faults.sh LOGS OPTION...
set -euo pipefail

[ -z "$1" ] || export REAL_CRIU_LOGS=$1
shift
mkdir -p /tmp/results /tmp/root
# The machine's own system is the hosts' root; without what is mounted on it.
mount --bind / /tmp/root
# For the memory group of image-cache.
mountpoint -q /sys/fs/cgroup || mount -t cgroup2 cgroup2 /sys/fs/cgroup
exec /tmp/opt/fault-matrix --rounds --save /tmp/results/counts --in /tmp/root /tmp/srv /tmp/opt /tmp/tls "$@"
