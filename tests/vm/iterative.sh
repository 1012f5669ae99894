#!/bin/bash
# Runs in the virtual machine of tests/tests/vm_iterative.rs, which judges what this script leaves
# below $results: two hosts joined by a cable, and between them migrations of several rounds.
#
# A case is a function; each runs with daemons and directories of its own, and leaves its logs, its
# facts (`NAME VALUE` lines) and, if it came to its end, the file `done`.
set -euo pipefail

results=/tmp/results
opt=/tmp/opt
srv=/tmp/srv
target_address=10.77.0.2
cache_port=7000
# Where CRIU sends its pages: image-proxy's page server, or image-cache's.
pages_address=127.0.0.1
pages_port=27
proxy_options=()
cache_options=()
criu_options=()
declare -A init

die() {
    echo "FAILED: $*"
    exit 1
}

# wait_for SECONDS COMMAND...: until the command succeeds.
wait_for() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$deadline" ] || die "waited too long for: $*"
        sleep 0.05
    done
}

fact() {
    echo "$*" >>"$case_dir/facts"
    echo "  [$SECONDS s] $*"
}

only_child() {
    local children
    children=$(<"/proc/$1/task/$1/children")
    echo "${children% }"
}

# --- hosts --------------------------------------------------------------------------------------

# make_host NAME FIRST_PID: /run/images is memory of this host alone; the rest of the file system,
# with the programs and their logs, is the same on both, as on shared storage.
make_host() {
    local name=$1 unshare answer
    mkfifo "/run/$name.in" "/run/$name.out"
    # Its pids begin elsewhere than on the other host, so that a migrated one is free there.
    # shellcheck disable=SC2016 # expanded in the host
    unshare --mount --net --pid --fork --mount-proc --propagation private bash -euc '
        mount -t tmpfs -o mode=755 images /run/images
        ip link set lo up
        echo "$1" >/proc/sys/kernel/ns_last_pid
        exec "$2"' sh "$2" "$srv/init" <"/run/$name.in" >"/run/$name.out" &
    unshare=$!
    # The host lives as long as somebody has this open, that is us.
    # shellcheck disable=SC2034
    exec {holder}>"/run/$name.in"
    read -r -t 20 answer <"/run/$name.out"
    [ "$answer" = ready ]
    init[$name]=$(only_child "$unshare")
}

# on HOST COMMAND...
on() {
    local host=$1
    shift
    nsenter --target "${init[$host]}" --mount --net --pid -- "$@"
}

on_source() { on source "$@"; }
on_target() { on target "$@"; }

make_cable() {
    ip link add cable netns "${init[source]}" type veth peer name cable netns "${init[target]}"
    on_source ip address add 10.77.0.1/24 dev cable
    on_target ip address add "$target_address/24" dev cable
    on_source ip link set cable up
    on_target ip link set cable up
}

# --- daemons ------------------------------------------------------------------------------------

# start_daemon HOST PROGRAM OPTION...: returns when all of its sockets accept.
start_daemon() {
    local host=$1 name=$2 fifo
    fifo=$(mktemp -u /run/ready.XXXXXX)
    shift 2
    mkfifo "$fifo"
    on "$host" "$opt/$name" "$@" -v4 -o "$case_dir/$name.log" --status-fd 3 3>"$fifo" \
        >"$case_dir/$name.out" 2>&1 &
    job_of[$name]=$!
    [ "$(timeout 30 head -c 1 "$fifo" | od -An -tx1)" = ' 00' ] || die "$name does not get ready"
}

# The source's daemon has its sockets in the directories given, and $proxy_options besides.
start_daemons() {
    local dir options=()
    for dir in "$@"; do
        on_source mkdir -p "$dir"
        options+=(-D "$dir")
    done
    declare -gA job_of=()
    on_target mkdir -p "$images"
    start_daemon target image-cache --insecure-listen --port "$cache_port" -D "$images" "${cache_options[@]}"
    start_daemon source image-proxy --address "$target_address" --port "$cache_port" \
        --page-server "127.0.0.1:$pages_port" "${options[@]}" "${proxy_options[@]}"
}

stop_daemon() {
    local name=$1 shell=${job_of[$1]} status=0
    # Its child is nsenter, whose child is the daemon.
    kill -TERM "$(only_child "$(only_child "$shell")")"
    wait "$shell" || status=$?
    fact "exit-$name $status"
}

# --- the program --------------------------------------------------------------------------------

# launch NAME ARGUMENT...: sets $pid, its number on either host.
launch() {
    local name=$1
    shift
    log=$case_dir/program.log
    pid=$(on_source "$srv/launch" "$srv/$name" "$log" "$@")
    wait_for 60 grep -q '^ready' "$log"
}

# contain NAME ARGUMENT...: the same as process 1 of a container, at the same addresses in each.
contain() {
    local name=$1 outside
    shift
    # Each in a directory of its own, as containers are: CRIU's parasite makes one called
    # proc.crtools in it (pie/parasite.c), and two that do so in the same one fail.
    mkdir "$log.dir"
    outside=$(on_source "$srv/launch" /usr/bin/unshare --pid --fork --wd "$log.dir" setsid setarch -R \
        "$srv/$name" "$log" "$@")
    wait_for 60 grep -q '^ready' "$log"
    # In the pid namespace of the source, which is not ours.
    pid=$(on_source cat "/proc/$outside/task/$outside/children")
    pid=${pid% }
}

ticks() { grep -c '^tick ' "$log"; }
has_ticks() { [ "$(ticks)" -ge "$1" ]; }

# More than a writer takes to write each of its pages.
goes_on() { wait_for 60 has_ticks $(($(ticks) + 40)); }

# A line of its own about itself.
report() {
    local before
    before=$(grep -c '^report ' "$log" || true)
    on "$1" kill -USR1 "$pid"
    wait_for 60 has_reports $((before + 1))
}
has_reports() { [ "$(grep -c '^report ' "$log")" -ge "$1" ]; }

# --- CRIU ---------------------------------------------------------------------------------------

# criu HOST NAME ARGUMENT...: its log is NAME/NAME.log.
criu() {
    local host=$1 name=$2 work=$case_dir/$2 status=0
    shift 2
    mkdir -p "$work"
    on "$host" timeout -k 5 90 criu "$@" -W "$work" -o "$name.log" -v4 --manage-cgroups=ignore \
        >"$work/criu.out" 2>&1 || status=$?
    fact "criu-$name $status"
    return "$status"
}

# round pre-dump|dump DIR [PARENT]
round() {
    local verb=$1 dir=$2 options=()
    [ $# -lt 3 ] || options=(--prev-images-dir "../$3")
    on_source mkdir -p "$images/$dir"
    criu source "$dir" "$verb" --track-mem -D "$images/$dir" "${options[@]}" --page-server \
        --address "$pages_address" --port "$pages_port" --action-script "$opt/image-proxy" -t "$pid" \
        "${criu_options[@]}"
}

pre_dump() {
    round pre-dump "$@" || die "pre-dump $1 failed"
    goes_on
}

move() {
    round dump "$@" || die "the dump failed"
    ! on_source kill -0 "$pid" 2>/dev/null || die "the dumped process still runs on the source"
    fact "ticks-at-dump $(ticks)"
    on_source find /run /tmp -name '*.img' >"$case_dir/source-images"
    criu target restore restore --stream -D "$images" -d || die "the restore failed"
    on_target kill -0 "$pid" || die "no process $pid on the target"
    goes_on
    report target
    # But for the daemon's own lock and mark.
    on_target find "$images" ! -type d ! -type s ! -name '.image-*' >"$case_dir/target-files"
}

finish() {
    on_target kill -KILL "$pid"
    stop_daemon image-proxy
    stop_daemon image-cache
    : >"$case_dir/done"
}

# --- cases --------------------------------------------------------------------------------------

# Every round's directory is one of image-proxy's; the script finds it by its socket there.
counter_moves() {
    start_daemons "$images/1" "$images/2" "$images/3"
    launch counter
    pre_dump 1
    pre_dump 2 1
    move 3 2
    finish
}

# One directory for the daemon, other ones for CRIU: so is it with container engines.
family_moves() {
    start_daemons "$images"
    export IMAGE_PROXY_CONTROL=$images/image-proxy-control.sock
    launch family 1
    report source
    pre_dump 1
    pre_dump 2 1
    move 3 2
    on_target ps -C family -o uid= >"$case_dir/target-users"
    finish
    # The children of a killed parent are their own masters.
    on_target pkill -KILL -x family
}

writer_moves() {
    start_daemons "$images"
    export IMAGE_PROXY_CONTROL=$images/image-proxy-control.sock
    launch writer 256 50
    goes_on
    pre_dump 1
    pre_dump 2 1
    move 3 2
    finish
}

# Pages straight to the target, the other images and the commit through image-proxy.
direct_moves() {
    pages_address=$target_address
    cache_options=(--page-server "$target_address:$pages_port")
    start_daemons "$images"
    export IMAGE_PROXY_CONTROL=$images/image-proxy-control.sock
    launch writer 64 50
    goes_on
    pre_dump 1
    pre_dump 2 1
    move 3 2
    finish
}

# cut_after BYTES: from then on nothing more leaves for the cache, whatever the machine's speed. mend_cut
# takes that back, and tells how many bytes have left.
cut_after() {
    on_source nft -f - <<EOF
table inet cut {
    chain out {
        type filter hook output priority 0
        tcp dport $cache_port quota over $1 bytes drop
        tcp dport $cache_port counter
    }
}
EOF
}

mend_cut() {
    on_source nft list chain inet cut out | sed -n 's/.*counter packets [0-9]* bytes \([0-9]*\).*/\1/p'
    on_source nft delete table inet cut
}

# The second round breaks off in the middle: what it had taken off CRIU's hands, and what it had
# not, comes with the next one, although the kernel takes neither for dirty any more.
cut_link() {
    local status=0
    start_daemons "$images"
    export IMAGE_PROXY_CONTROL=$images/image-proxy-control.sock
    launch writer 128 8
    goes_on
    pre_dump 1
    cut_after $((8 << 20))
    round pre-dump 2 1 || status=$?
    fact "cut-after $(mend_cut)"
    fact "cut-round $status"
    on_source kill -0 "$pid" || die "the process died of the cut"
    goes_on
    pre_dump 3 1
    move 4 3
    finish
}

# round_fails ARGUMENT...: and the process goes on.
round_fails() {
    ! round "$@" || die "round $2 did not fail"
    goes_on
}

# Rounds in the mode in which CRIU sends wrong pages to a page server. image-proxy sees the CRIU and refuses its round.
# image-cache does not see that of another host, but no dump may build on its round.
read_mode() {
    cache_options=(--page-server "$target_address:$pages_port")
    start_daemons "$images"
    export IMAGE_PROXY_CONTROL=$images/image-proxy-control.sock
    launch writer 16 10
    goes_on
    pre_dump 1
    criu_options=(--pre-dump-mode read)
    round_fails pre-dump 2 1
    pages_address=$target_address
    pre_dump 3
    criu_options=()
    round_fails dump 4 3
    # What that round brought waits for a dump that never comes.
    on_target "$opt/image-cache" drop --control "$images/image-cache-control.sock" \
        "$(sed -n 's/.* page server round begins session=\([^ ]*\) .*/\1/p' "$case_dir/image-cache.log")"
    pages_address=127.0.0.1
    pre_dump 5 1
    move 6 5
    finish
}

# twin NAME: takes $pid and $log of this one.
twin() {
    pid=${pid_of[$1]}
    log=$case_dir/$1.log
}

# twins COMMAND...: for each of them at once, with its name as %.
twins() {
    local name waiting=() job
    for name in a b; do
        (twin "$name" && "${@//%/$name}") &
        waiting+=($!)
    done
    for job in "${waiting[@]}"; do
        wait "$job" || die "failed for one of the two: $*"
    done
}

# Two processes with the same pid and the same addresses, of which only some pages differ, at once.
twins_move() {
    local name stride=20
    declare -A pid_of
    proxy_options=(--session twin)
    start_daemons "$images"
    export IMAGE_PROXY_CONTROL=$images/image-proxy-control.sock
    for name in a b; do
        log=$case_dir/$name.log
        : >"$log"
        contain writer 32 "$stride"
        fact "pid-$name" "$(on_source grep NSpid: "/proc/$pid/status")"
        pid_of[$name]=$pid
        stride=30
    done
    # One after the other, so that it is known whose session is called what.
    twin a
    pre_dump a1
    twin b
    pre_dump b1
    twins pre_dump %2 %1
    twins round dump %3 %2
    for name in a b; do
        twin "$name"
        ! on_source kill -0 "$pid" 2>/dev/null || die "the dumped $name still runs on the source"
    done
    restore_twin a twin
    restore_twin b twin-2
    stop_daemon image-proxy
    stop_daemon image-cache
    : >"$case_dir/done"
}

# restore_twin NAME SESSION
restore_twin() {
    twin "$1"
    criu target "restore-$1" restore --stream -D "$images/sessions/$2" -d --pidfile "$case_dir/$1.pid" ||
        die "the restore of $1 failed"
    pid=$(<"$case_dir/$1.pid")
    goes_on
    report target
    on_target kill -KILL "$pid"
}

# run_case FUNCTION: its failure is not the others'.
run_case() {
    case_dir=$results/$1
    images=/run/images/dump
    mkdir -p "$case_dir"
    on_source rm -rf "$images"
    on_target rm -rf "$images"
    echo "== $1 [$SECONDS s]"
    # In the background, because bash ignores errors in what is itself a condition.
    "$1" &
    wait $! && return
    local file
    for file in "$case_dir"/{,*/}*.{log,out}; do
        [ ! -s "$file" ] || { echo "--- $file" && tail -n 40 "$file"; }
    done
    # Not in the way of what comes next, whatever the case has left running.
    on_source pkill -KILL -x 'criu|image-proxy|counter|family|writer' || true
    on_target pkill -KILL -x 'criu|image-cache|counter|family|writer' || true
    on_source ip link set cable up
}

mkdir -p "$results" /run/images
# sysfs shows the interfaces of the namespace in which it was mounted.
make_host source 10000
make_host target 20000
on_source mount -t sysfs sysfs /sys
make_cable
on_source criu --version
for name in "$@"; do
    run_case "$name"
done
