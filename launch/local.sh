#!/usr/bin/env bash
# Trains on all accelerators of this machine and restarts training when it is interrupted.
#
#     launch/local.sh [--dry_run] -- --config=configs/digits.py --workdir=runs/digits
#
# The arguments after -- are passed to `python -m nvg_jax.train`. Paths are relative to the
# repository.
#
#     --processes=N    number of processes, connected through localhost (1): rehearses
#                      multi-machine training on the CPU
#     --port=PORT      port of their coordinator (12355)
#     --dry_run        print the commands without running them (DRY_RUN=1 does the same)
#
# The arguments are checked before anything starts.
#
# Environment: PYTHON (default python), JAX_COMPILATION_CACHE_DIR (default WORKDIR/jax_cache),
# and the variables of launch/restart.sh.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

processes=1
port=12355
while (($#)); do
    case $1 in
        --processes=*) processes=${1#*=} ;;
        --port=*) port=${1#*=} ;;
        --dry_run) dry_run=1 ;;
        --help) print_help && exit ;;
        --) shift && break ;;
        *) fail "unknown argument $1; training arguments come after --, see $0 --help" ;;
    esac
    shift
done
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "--processes must be a positive integer, not '$processes'"
[[ $port =~ ^[1-9][0-9]{0,4}$ ]] || fail "--port must be a number, not '$port'"
((processes == 1 || BASH_VERSINFO[0] > 4 || BASH_VERSINFO[0] == 4 && BASH_VERSINFO[1] > 2)) ||
    fail "--processes needs bash 4.3 or newer, this is $BASH_VERSION"
((port < 65536)) || fail "--port must be at most 65535, not $port"
take_train_arguments "$@"

run cd "$root"
restart=(bash launch/restart.sh "${PYTHON:-python}" -m nvg_jax.train "${train_arguments[@]}")
if ((processes == 1)); then
    run exec env "$jax_cache" "${restart[@]}"
    exit
fi

pids=()
signaled=
stop() {
    kill -TERM "${pids[@]}" 2>/dev/null || true
}
trap 'signaled=1; stop' TERM INT

for ((id = 0; id < processes; id++)); do
    process=(
        env "JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}" "$jax_cache" "${restart[@]}"
        "--coordinator_address=127.0.0.1:$port" "--num_processes=$processes" "--process_id=$id"
    )
    if [[ $dry_run ]]; then
        echo "$(quote "${process[@]}") &"
    else
        "${process[@]}" &
        pids+=($!)
    fi
done
if [[ $dry_run ]]; then
    echo wait
    exit
fi

code=0
while true; do
    ended=0
    wait -n || ended=$?
    if [[ $signaled ]]; then # the signal interrupted wait; no process has ended
        signaled=
        continue
    fi
    ((ended != 127)) || break # no process is left
    if ((ended && !code)); then
        code=$ended
        stop # the others would wait for this process
    fi
done
exit "$code"
