# Sourced by scripts/vm: the cached Debian image that the virtual machine boots from.
# shellcheck shell=bash

# What every image has besides the kernel: iproute2 because the machine's own init needs it.
vm_base_packages=linux-image-amd64,initramfs-tools,iproute2

# The mirror from which this machine has its own release; the same one has the other suites.
vm_mirror() {
    local codename found
    # shellcheck source=/dev/null
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    # shellcheck disable=SC2016
    found=$(apt-get indextargets --format '$(RELEASE) $(CODENAME) $(COMPONENT) $(REPO_URI)' 2>/dev/null |
        awk -v r="$codename" '($1 == r || $2 == r) && $3 == "main" { print $4; exit }')
    [ -n "$found" ] || die "apt's configuration names no mirror for $codename main"
    echo "$found"
}

# The first program of the machine. All that it does is to hand over to the init on the second
# disk, which is made anew for each run: so the image need not change with what is run in it.
vm_stub() {
    cat <<'EOF'
#!/bin/sh
mount -t ext4 /dev/vdb /vm && exec /vm/init
EOF
}

# vm_image DIR SUITE PACKAGES: makes sure that there is an image of SUITE with these packages
# (comma-separated, may be empty) below DIR and prints its directory, which has disk.img, vmlinuz
# and initrd.img. Safe to call several times and at once.
vm_image() {
    local dir=$1 suite=$2 packages key image
    packages=$(printf '%s' "$vm_base_packages,$3" | tr , '\n' | sed '/^$/d' | sort -u | paste -sd,)
    key=$({ echo "$packages"; vm_stub; } | sha256sum | cut -c1-12)
    image=$dir/$suite-$key
    if [ ! -d "$image" ]; then
        mkdir -p -- "$dir"
        exec 9>"$dir/.lock"
        flock -w 1800 9 || die "another run holds $dir/.lock for 30 minutes"
        [ -d "$image" ] || vm_build_image "$image" "$suite" "$packages" 9>&-
        exec 9>&-
    fi
    echo "$image"
}

vm_build_image() {
    local image=$1 suite=$2 packages=$3 new=$1.new log=$1.log root kib
    root=$new/root
    need_root
    need debootstrap=debootstrap mke2fs=e2fsprogs
    [ -e /usr/share/keyrings/debian-archive-keyring.gpg ] ||
        install_packages debian-archive-keyring
    # What an interrupted run left; nobody else can be at it, we hold the lock.
    rm -rf -- "$new"
    mkdir -p -- "$new"
    say "building $image (once, about two minutes)"
    if ! timeout 1500 debootstrap --variant=minbase --include="$packages" \
        "$suite" "$root" "$(vm_mirror)" >"$log" 2>&1 </dev/null; then
        tail -n 15 "$log" >&2
        rm -rf -- "$new"
        die "debootstrap failed, see $log"
    fi
    rm -rf -- "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
    mkdir -p -- "$root/vm"
    vm_stub >"$root/sbin/vm-init"
    chmod 755 "$root/sbin/vm-init"
    cp -- "$root"/boot/vmlinuz-* "$new/vmlinuz"
    cp -- "$root"/boot/initrd.img-* "$new/initrd.img"
    # No journal: each run writes to a scratch layer above the image, never to the image itself.
    kib=$(du -sk -- "$root" | cut -f1)
    mke2fs -q -t ext4 -O ^has_journal -d "$root" "$new/disk.img" "$((kib + kib / 4 + 2097152))k" \
        >>"$log" 2>&1 || die "mke2fs failed, see $log"
    rm -rf -- "$root"
    mv -T -- "$new" "$image"
    say "built $image"
}
