#!/usr/bin/env bash
# Runs a command and restarts it until it is done. All launchers share this rule.
#
#     launch/restart.sh [--dry_run] COMMAND...
#
#     exit code of the command
#     0        done: exits with 0
#     2        a mistake that a restart cannot mend, or a loss that is not finite: exits with 2
#     75       preempted, state saved: restarts the command at once
#     other    crashed, killed or stood still: restarts the command after a pause; exits with 1
#              after too many crashes in a row without a new checkpoint
#
# SIGTERM, SIGHUP (of a terminal that closes) and Ctrl-C are forwarded to the command, which saves
# its state. This script then exits with the command's exit code and does not restart it, since the
# machine is going away.
#
# Environment:
#     NVG_MAX_CRASHES=5       restarts after consecutive crashes; training that goes on from
#                             another checkpoint than the run before, or exits with 75, resets
#                             the count
#     NVG_RESTART_PAUSE=15    seconds between a crash and the restart
#     NVG_LOG=FILE            add all output to this file, and
#     NVG_LOG_FOLDER=FOLDER   copy the file to TIME-HOST.log there (also in gs://BUCKET, with
#                             gcloud), every NVG_LOG_SECONDS=60 and at the end

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
for number in "$max_crashes" "$pause"; do
    [[ $number =~ ^[0-9]+$ ]] ||
        fail "NVG_MAX_CRASHES and NVG_RESTART_PAUSE must be whole numbers, not '$number'"
done
[[ ! ${NVG_LOG:-} || ${NVG_LOG_FOLDER:-} ]] || fail "NVG_LOG needs NVG_LOG_FOLDER"
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
trap pass_on TERM INT HUP

# Runs a command in the background and sets code to its exit code.
run_child() {
    (trap '' HUP && exec "$@") & # a terminal that closes, or tmux, sends it to all
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

# Training writes its heartbeat there, too: the one in the workdir may be in a bucket.
NVG_HEARTBEAT=$(mktemp)
export NVG_HEARTBEAT
trap 'rm -f "$NVG_HEARTBEAT"' EXIT

if [[ ${NVG_LOG:-} ]]; then
    exec >>"$NVG_LOG" 2>&1
    log_copy=$NVG_LOG_FOLDER/$(date +%Y%m%d-%H%M%S)-$(hostname).log
    copy_log() {
        case $log_copy in
            gs://*) timeout 300 gcloud storage cp --quiet "$NVG_LOG" "$log_copy" ;;
            *) mkdir -p "$NVG_LOG_FOLDER" && cp "$NVG_LOG" "$log_copy" ;;
        esac >/dev/null 2>&1 || true
    }
    while sleep "${NVG_LOG_SECONDS:-60}"; do
        copy_log
    done &
    copier=$!
    trap 'rm -f "$NVG_HEARTBEAT"; kill "$copier" 2>/dev/null || true; copy_log' EXIT
fi

crashes=0
last_start=
while true; do
    run_child "$@"
    if ((code == 0 || code == 2)) || [[ $stopping ]]; then
        exit "$code"
    fi
    if ((code == 75)); then
        crashes=0
        say "exit code 75 (preempted, state saved); restarting"
        continue
    fi
    start=$(started_from "$(<"$NVG_HEARTBEAT")")
    if [[ $start != "$last_start" ]]; then
        crashes=0
        last_start=$start
    fi
    crashes=$((crashes + 1))
    if ((crashes > max_crashes)); then
        say "exit code $code; $crashes crashes in a row without a new checkpoint; giving up"
        exit 1
    fi
    say "exit code $code (crash $crashes of at most $max_crashes in a row); restarting in $pause s"
    run_child sleep "$pause"
    if [[ $stopping ]]; then
        exit 143
    fi
done
