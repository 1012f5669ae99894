# Sourced by scripts/check and scripts/test: steps that are timed and counted, and those that both have.
# shellcheck shell=bash

failed=()

# step SECONDS TITLE COMMAND...: runs the command, at most for so long.
step() {
    local limit=$1 title=$2 began=$SECONDS status=0
    shift 2
    printf '\n== %s\n' "$title"
    timeout -k 20 "$limit" "$@" </dev/null || status=$?
    case $status in
    0) printf '== %s: ok, %d s\n' "$title" $((SECONDS - began)) ;;
    124 | 137) failed+=("$title: not done within $limit s") ;;
    *) failed+=("$title: exit status $status") ;;
    esac
    [ "$status" -eq 0 ] || printf '== FAILED: %s\n' "${failed[-1]}"
}

# Says what failed, and gives 1 then; else for how long it took.
finish() {
    if [ ${#failed[@]} -gt 0 ]; then
        printf 'FAILED: %s\n' "${failed[@]}"
        return 1
    fi
    printf 'all is well, after %d s\n' "$SECONDS"
}

# What needs no build: in the repository's directory.
static_steps() {
    local scripts
    step 120 'formatting' cargo fmt --all --check
    step 120 'formatting of the fuzzers' cargo fmt --manifest-path fuzz/Cargo.toml --check
    mapfile -t scripts < <(grep -lE '^#!/bin/bash|^#!/usr/bin/env bash|^# shellcheck shell=' \
        scripts/* scripts/lib/* tests/vm/* .ci/* 2>/dev/null)
    step 120 'shell scripts' shellcheck -x -P SCRIPTDIR -- "${scripts[@]}"
    step 900 'lints' cargo clippy --locked --workspace --all-targets -- -D warnings
}

# rustfmt and clippy of the Rust that need_cargo found.
need_lints() {
    local codename
    lints_are_there && return 0
    # shellcheck source=/dev/null
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    if command -v rustup >/dev/null 2>&1; then
        timeout 300 rustup component add rustfmt clippy
    elif [ "$codename" = bookworm ]; then
        install_packages rustfmt-web rust-web-clippy
    else
        install_packages rustfmt rust-clippy
    fi
    lints_are_there || die "needs cargo fmt and cargo clippy"
}

lints_are_there() {
    cargo fmt --version >/dev/null 2>&1 && cargo clippy --version >/dev/null 2>&1
}
