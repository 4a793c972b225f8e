#!/usr/bin/env bash
# Runs a command and restarts it until it is done. All launchers share this rule.
#
#     launch/restart.sh [--dry_run] COMMAND...
#
#     exit code of the command
#     0        done: exits with 0
#     2        a mistake that a restart cannot mend, or a loss that is not finite: exits with 2
#     75       preempted, state saved: restarts the command at once
#     other    crashed or killed: restarts the command after a pause; exits with 1 after too
#              many crashes in a row
#
# SIGTERM and Ctrl-C are forwarded to the command, which saves its state. This script then exits
# with the command's exit code and does not restart it, since the machine is going away.
#
# Environment:
#     NVG_MAX_CRASHES=5       restarts after consecutive crashes
#     NVG_RESTART_PAUSE=15    seconds between a crash and the restart
#     NVG_LONG_RUN=600        a run of at least this many seconds resets the crash count

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

while (($#)); do
    case $1 in
        --help) print_help && exit ;;
        --dry_run) dry_run=1 ;;
        -*) fail "unknown argument $1; see $0 --help" ;;
        *) break ;;
    esac
    shift
done
(($#)) || fail "no command to run; see $0 --help"
max_crashes=${NVG_MAX_CRASHES:-5}
pause=${NVG_RESTART_PAUSE:-15}
long_run=${NVG_LONG_RUN:-600}
for number in "$max_crashes" "$pause" "$long_run"; do
    [[ $number =~ ^[0-9]+$ ]] ||
        fail "NVG_MAX_CRASHES, NVG_RESTART_PAUSE and NVG_LONG_RUN must be whole numbers, not '$number'"
done
if [[ $dry_run ]]; then
    quote "$@"
    exit
fi
command -v -- "$1" >/dev/null || fail "there is no command '$1'"

say() {
    echo "restart.sh: $*" >&2
}

child=
stopping=
signaled=
pass_on() {
    stopping=1
    signaled=1
    if [[ $child ]]; then
        kill -TERM "$child" 2>/dev/null || true
    fi
}
trap pass_on TERM INT

# Runs a command in the background and sets code to its exit code.
run_child() {
    "$@" &
    child=$!
    if [[ $stopping ]]; then # the signal arrived before the child's id was known
        pass_on
    fi
    while true; do
        signaled=
        code=0
        wait "$child" || code=$? # a signal interrupts this wait
        [[ $signaled ]] || break
    done
    child=
}

crashes=0
while true; do
    started=$SECONDS
    run_child "$@"
    if ((code == 0 || code == 2)) || [[ $stopping ]]; then
        exit "$code"
    fi
    if ((code == 75)); then
        crashes=0
        say "exit code 75 (preempted, state saved); restarting"
        continue
    fi
    if ((SECONDS - started >= long_run)); then
        crashes=0
    fi
    crashes=$((crashes + 1))
    if ((crashes > max_crashes)); then
        say "exit code $code; $crashes crashes in a row; giving up"
        exit 1
    fi
    say "exit code $code (crash $crashes of at most $max_crashes in a row); restarting in $pause s"
    run_child sleep "$pause"
    if [[ $stopping ]]; then
        exit 143
    fi
done
