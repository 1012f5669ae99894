# Sourced by the other scripts: messages, and the installation of missing Debian packages.
# shellcheck shell=bash

say() { printf '%s\n' "$*" >&2; }

die() {
    say "${0##*/}: $*"
    exit 1
}

need_root() {
    [ "$(id -u)" -eq 0 ] || die "must run as root (namespaces, mounts and CRIU need it)"
}

# need COMMAND=PACKAGE...: installs the packages of those commands that are missing. A machine that
# has everything is left alone, so that the scripts also work where no package server is reachable.
need() {
    local pair missing=()
    for pair in "$@"; do
        command -v "${pair%%=*}" >/dev/null 2>&1 || missing+=("${pair#*=}")
    done
    install_packages "${missing[@]}"
}

install_packages() {
    [ $# -gt 0 ] || return 0
    need_root
    command -v apt-get >/dev/null 2>&1 ||
        die "missing: $*; they can only be installed here on Debian (no apt-get)"
    say "installing $*"
    apt_get install -y --no-install-recommends "$@" 2>/dev/null && return 0
    # Fresh machines have no package lists, old ones have stale lists. A source that is of no use
    # to us may be out of reach, so what counts is whether the installation works afterwards.
    apt_get update || say "apt-get update failed, trying all the same"
    apt_get install -y --no-install-recommends "$@" || die "cannot install $*"
}

# Other apt runs (unattended upgrades, a second test run) are waited for, but not for ever.
apt_get() {
    DEBIAN_FRONTEND=noninteractive timeout 600 \
        apt-get -q -o DPkg::Lock::Timeout=300 "$@" >&2 </dev/null
}

# Keep in step with rust-version in Cargo.toml.
rust_version=1.85

# Puts a Rust that is new enough for us into PATH: the one that is there, else Debian's.
need_cargo() {
    local codename
    rust_is_new_enough && return 0
    # rustup's place, which is not in everybody's PATH (sudo, cron, CI).
    PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
    export PATH
    rust_is_new_enough && return 0
    # shellcheck source=/dev/null
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    # Debian 12's own Rust is too old, but it gets newer ones for its browsers' sake.
    case $codename in
    bookworm) install_packages cargo-web rustc-web gcc libc6-dev ca-certificates ;;
    *) install_packages cargo rustc gcc libc6-dev ca-certificates ;;
    esac
    rust_is_new_enough || die "needs Rust $rust_version or newer"
}

rust_is_new_enough() {
    local found
    command -v cargo >/dev/null 2>&1 || return 1
    found=$(rustc --version 2>/dev/null | awk '{ print $2 }')
    [ "$(printf '%s\n' "$rust_version" "${found:-0}" | sort -V | head -n 1)" = "$rust_version" ]
}

# need_tool NAME VERSION RUST: a program that cargo builds, in target/tools, and its directory in $tools; builds it if it is
# not there. 1 if this Rust is older than RUST. One version, so that a new release cannot change what passes.
need_tool() {
    local name=$1 version=$2 rust=$3 found
    need_cargo
    tools=${CARGO_TARGET_DIR:-$PWD/target}/tools
    [ "$("$tools/bin/$name" --version 2>/dev/null)" != "$name $version" ] || return 0
    found=$(rustc --version | awk '{ print $2 }')
    if [ "$(printf '%s\n' "$rust" "$found" | sort -V | head -n 1)" != "$rust" ]; then
        say "$name is left out: it needs Rust $rust, this is $found"
        return 1
    fi
    say "building $name $version (once)"
    mkdir -p -- "$tools"
    # Not optimized: it runs for seconds, and is built five times as fast.
    timeout 800 cargo install --debug --quiet --locked --version "=$version" --root "$tools" --target-dir "$tools/build" \
        "$name" || die "cannot build $name"
    rm -rf -- "$tools/build"
}
