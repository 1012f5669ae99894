# Runs as process 1 of a new host, in its new namespaces but still on the machine's root; makes the
# host's root, moves into it and becomes its init. All mounts live in this mount namespace only.
set -eu
root=$1 daemons=$2 programs=$3 name=$4 first_pid=$5

# Recursively, because the lab's shared tmpfs is already mounted on $root/mnt.
mount --rbind "$root" "$root"
mount -o remount,bind,ro "$root"
cd "$root"

mount -t proc proc proc
mount -t sysfs -o ro sysfs sys
mount -t tmpfs -o mode=755 dev dev
for device in null zero full random urandom tty; do
    [ -e "/dev/$device" ] || continue
    : >"dev/$device"
    mount --bind "/dev/$device" "dev/$device"
done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
mount -t tmpfs shm dev/shm
mount -t tmpfs tmp tmp
mount -t tmpfs run run
mkdir run/images run/log run/criu
for pair in "$daemons:opt" "$programs:srv"; do
    mount --bind "${pair%:*}" "${pair##*:}"
    mount -o remount,bind,ro "${pair##*:}"
done

echo "$name" >proc/sys/kernel/hostname
# Each host numbers its processes from elsewhere, so that a migrated pid is free on the other.
echo "$first_pid" >proc/sys/kernel/ns_last_pid
ip link set lo up

pivot_root . .
umount -l .
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C /srv/init
