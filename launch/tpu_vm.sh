#!/usr/bin/env bash
# Trains on TPU VMs: requests them, installs the code, trains on all workers, and requests new
# ones after a preemption. Needs gcloud, logged in, and `ssh-add ~/.ssh/google_compute_engine`.
#
#     launch/tpu_vm.sh run --name=nvg-d16 --zone=us-east5-a --type=v5p-128 --spot \
#         -- --config=configs/imagenet256.py:d16 --workdir=gs://BUCKET/d16
#     launch/tpu_vm.sh logs --name=nvg-d16 --zone=us-east5-a
#     launch/tpu_vm.sh delete --name=nvg-d16 --zone=us-east5-a
#
# `run` waits until training ends and exits with its exit code; run again, it resumes watching, or
# starts what has failed again. Other arguments are another training: one that goes on is refused.
# The arguments after -- are passed to `python -m nvg_jax.train --distributed`. `logs` follows
# the log of the first worker. Nothing is deleted at the end without --delete_at_end.
#
#     --name=NAME              name of the queued resource and its nodes
#     --zone=ZONE
#     --type=TYPE              v5litepod-256, v5p-128, v6e-64, ...
#     --slices=N               number of slices (1)
#     --spot                   cheaper, but may be preempted at any time
#     --runtime_version=NAME   runtime version, by default the usual one of the type
#     --create_flags="..."     more flags for `queued-resources create`: --reserved, ...
#     --ssh_flags="..."        more flags for ssh and scp: --tunnel-through-iap, ...
#     --setup="COMMANDS"       run on every worker after the installation, to mount the data
#                              for example; the first that fails ends the attempt
#     --stall=SECONDS          without a sign of life (a new heartbeat in the workdir) for this
#                              long, training is started again, unless there is one that cannot
#                              be read (the log says so); without one from workers that cannot be
#                              reached, or from gcloud, the script gives up. Also the time limit
#                              of an installation. (3600; 0: never)
#     --attempts=N             give up after so many attempts in a row (to request TPU VMs, to
#                              install, to train) without a new checkpoint (5)
#     --poll_seconds=N         seconds between two checks (60)
#     --delete_at_end          delete the TPU VMs on every way out of this script: training has
#                              ended or failed, the script gave up, Ctrl-C, SIGTERM, SIGHUP
#     --dry_run                print the commands without running them (DRY_RUN=1 does the same)
#
# The training arguments are checked before anything is created. The code that git knows is sent,
# with uncommitted changes. Every worker adds its output to ~/train.log and copies it to
# WORKDIR/logs every minute. Without --delete_at_end the script ends with what still runs and the
# command that deletes it.
#
# Environment: PYTHON (default python) checks the arguments; JAX_COMPILATION_CACHE_DIR (default
# WORKDIR/jax_cache); CLOUDSDK_CORE_PROJECT (default: gcloud's project at the start).

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

action=${1:-}
case $action in
    run | logs | delete) shift ;;
    --help) print_help && exit ;;
    *) fail "give run, logs or delete first, not '$action'; see $0 --help" ;;
esac
name=
zone=
type=
slices=1
runtime_version=
stall=3600
max_attempts=5
poll_seconds=60
spot=()
create_flags=()
ssh_flags=()
setup=
delete_at_end=
while (($#)); do
    case $1 in
        --name=*) name=${1#*=} ;;
        --zone=*) zone=${1#*=} ;;
        --type=*) type=${1#*=} ;;
        --slices=*) slices=${1#*=} ;;
        --spot) spot=(--spot) ;;
        --runtime_version=*) runtime_version=${1#*=} ;;
        --create_flags=*) read -d '' -ra create_flags <<<"${1#*=}" || true ;;
        --ssh_flags=*) read -d '' -ra ssh_flags <<<"${1#*=}" || true ;;
        --setup=*) setup=${1#*=} ;;
        --stall=*) stall=${1#*=} ;;
        --attempts=*) max_attempts=${1#*=} ;;
        --poll_seconds=*) poll_seconds=${1#*=} ;;
        --delete_at_end) delete_at_end=1 ;;
        --dry_run) dry_run=1 ;;
        --help) print_help && exit ;;
        --) shift && break ;;
        *) fail "unknown argument $1; training arguments come after --, see $0 --help" ;;
    esac
    shift
done
[[ $name ]] || fail "give --name=NAME; see $0 --help"
[[ $name =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
    fail "--name must be at most 63 lower-case letters, digits and dashes, beginning with a letter, not '$name'"
[[ $zone ]] || fail "give --zone=ZONE; see $0 --help"

queued=(gcloud compute tpus queued-resources)
delete=("${queued[@]}" delete "$name" "--zone=$zone" --force --quiet)
describe=("${queued[@]}" describe "$name" "--zone=$zone")

# on_workers WORKERS COMMAND: sets ssh to what runs a command there.
on_workers() {
    ssh=("${queued[@]}" ssh "$name" "--zone=$zone" ${ssh_flags[@]+"${ssh_flags[@]}"}
        "--node=$1" "--worker=$1" "--command=$2")
}

case $action in
    logs)
        on_workers 0 'tail -n 100 -F train.log'
        run "${ssh[@]}"
        exit
        ;;
    delete)
        run "${delete[@]}"
        exit
        ;;
esac

[[ $type ]] || fail "give --type=TYPE, such as v5p-128; see $0 --help"
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices must be a positive integer, not '$slices'"
for number in "$stall" "$max_attempts" "$poll_seconds"; do
    [[ $number =~ ^[0-9]+$ ]] ||
        fail "--stall, --attempts and --poll_seconds must be whole numbers, not '$number'"
done
if [[ ! $runtime_version ]]; then
    case $type in
        v6e-*) runtime_version=v2-alpha-tpuv6e ;;
        v5p-*) runtime_version=v2-alpha-tpuv5 ;;
        v5litepod-*) runtime_version=v2-alpha-tpuv5-lite ;;
        v[234]-*) runtime_version=tpu-ubuntu2204-base ;;
        *) fail "no runtime version is known for --type=$type; give --runtime_version=NAME" ;;
    esac
fi
take_train_arguments "$@"
require_packed_config
require_shared_workdir
for flag in ${create_flags[@]+"${create_flags[@]}"} ${ssh_flags[@]+"${ssh_flags[@]}"}; do
    [[ $flag != --project* && $flag != --zone* ]] ||
        fail "give the zone as --zone=ZONE and the project as CLOUDSDK_CORE_PROJECT, for all commands, not $flag for some"
done
for program in gcloud timeout git; do
    [[ $dry_run ]] || command -v "$program" >/dev/null || fail "there is no command '$program'"
done
nodes=("--node-id=$name")
if ((slices > 1)); then
    nodes=("--node-count=$slices" "--node-prefix=$name")
fi

create=("${queued[@]}" create "$name" "--zone=$zone" "--accelerator-type=$type"
    "--runtime-version=$runtime_version" "${nodes[@]}" ${spot[@]+"${spot[@]}"}
    ${create_flags[@]+"${create_flags[@]}"} --async)

say() {
    echo "tpu_vm.sh: $(date +%H:%M:%S) $*" >&2
}

give_up() {
    say "$*; giving up"
    exit 1
}

# call SECONDS COMMAND: runs a command for at most this long (ssh waits for a lost worker for ever).
# Bash handles signals during the wait, but not before a command in the foreground ends.
call() {
    if [[ $dry_run ]]; then
        quote "${@:2}"
        return
    fi
    timeout --kill-after=10 "$@" &
    wait $!
}

pause() {
    local before=$SECONDS
    call 0 sleep "$poll_seconds"
    touch -c "$archive" # some systems remove what is old from temporary folders
    if ((SECONDS - before > poll_seconds + 60)); then
        alive=$SECONDS # this machine was asleep, not the TPU
    fi
}

# state: sets now to the state of the request, NOT_FOUND, or unknown if gcloud fails, which says
# nothing about the TPU.
state() {
    if call 120 "${describe[@]}" '--format=value(state.state)' >"$answer" 2>"$answer.error"; then
        now=$(<"$answer")
    elif grep -q NOT_FOUND "$answer.error"; then
        now=NOT_FOUND
    else
        now=unknown
        cat "$answer.error" >&2
    fi
}

ours= # whether this command requested them, or found its training there: others are not deleted

# On every way out: deletes the TPU VMs, or says what still runs and how to delete it. Nothing stops
# it: no signal, and no terminal or pipe that is gone.
finish() {
    local code=$? try now
    set +e
    trap - EXIT
    trap '' HUP INT PIPE TERM
    # shellcheck disable=SC2046 # one word for each job
    kill $(jobs -p) 2>/dev/null
    for try in 1 2 3 4; do
        state
        if [[ $now == NOT_FOUND ]]; then
            say "$name does not exist (any more); nothing runs"
            break
        elif [[ ! $delete_at_end || ! $ours ]] || ((try == 4)); then
            say "$name is $now and may cost money; this deletes it:"
            echo "    CLOUDSDK_CORE_PROJECT=$CLOUDSDK_CORE_PROJECT $(quote "${delete[@]}")" >&2
            break
        fi
        say "deleting $name"
        if call 1200 "${delete[@]}" >"$answer" 2>&1; then
            say "$name is deleted"
            break
        fi
        cat "$answer" >&2
        pause
    done
    rm -rf "$folder"
    exit "$code"
}

# Without JAX_PLATFORMS, JAX goes on with the CPU where it cannot start the TPU.
train="cd nvg_jax && $(quote env JAX_PLATFORMS=tpu,cpu "$jax_cache" NVG_LOG=../train.log "NVG_LOG_FOLDER=$workdir/logs" \
    bash launch/restart.sh ../env/bin/python -m nvg_jax.train --distributed "${train_arguments[@]}")"
train+='; echo $? >../exit_code'
# What a worker was told to train last.
command=$(cksum <<<"$train" | tr ' ' -)

running='tmux has-session -t nvg_jax 2>/dev/null'
# One line per worker: training=idle, training=running, training=other (another command goes on, or
# that of another user) or training=EXIT_CODE.
# shellcheck disable=SC2016 # expanded on the worker
others='ps -eo euid=,args= | awk -v "me=$(id -u)" "\$1 != me && /nvg_jax[.]train/ { found = 1 } END { exit ! found }"'
# shellcheck disable=SC2016
look='$same && echo training=running || echo training=other; elif $same && [ -s exit_code ]; then echo training=$(cat exit_code); else echo training=idle; fi'
look="same='grep -qxs $command command'; if $others; then echo training=other; elif $running; then $look"

# The runtime's own Python is too old; uv installs a newer one.
install='rm -rf nvg_jax && mkdir nvg_jax && tar -xzf nvg_jax.tar.gz -C nvg_jax'
install+=' && python3 -m pip install --user --quiet uv'
install+=' && ~/.local/bin/uv venv --quiet --allow-existing --python 3.12 env'
install+=" && ~/.local/bin/uv pip install --quiet --python env --requirement nvg_jax/requirements.txt $packages"
install+=${setup:+" && bash -ec $(quote "$setup")"}
# Training may no longer react to other signals. The process of the pane leads the group of all.
# shellcheck disable=SC2016 # expanded on the worker
stop='kill -KILL -- -$(tmux list-panes -t nvg_jax -F "#{pane_pid}"); tmux kill-session -t nvg_jax; true'

# A worker whose training goes on keeps its code. No exit code of an earlier attempt is left before
# the first worker starts. gcloud may skip workers and succeed: training starts only where the code
# that was sent has been installed.
install_and_start() {
    local sum=CHECKSUM
    [[ $dry_run ]] || sum=$(cksum <"$archive" | tr ' ' -)
    call "$stall" "${queued[@]}" scp "$archive" "$name:nvg_jax.tar.gz" "--zone=$zone" \
        ${ssh_flags[@]+"${ssh_flags[@]}"} --node=all --worker=all || return
    on_workers all "$running || { rm -f exit_code installed; [ \$(cksum <nvg_jax.tar.gz | tr ' ' -) = $sum ] && $install && echo $sum >installed; }"
    call "$stall" "${ssh[@]}" || return
    on_workers all "$running || { grep -qx $sum installed && echo $command >command && tmux new-session -d -s nvg_jax bash -c $(quote "$train"); }"
    call 300 "${ssh[@]}"
}

read_heartbeat=(gcloud storage cat "$workdir/heartbeat.json")
if [[ $workdir != gs://* ]]; then
    on_workers 0 "cat $(quote "$workdir/heartbeat.json")"
    read_heartbeat=("${ssh[@]}")
fi

if [[ $dry_run ]]; then
    archive=${TMPDIR:-/tmp}/nvg_jax.tar.gz
    pack "$archive"
    show_state=("${describe[@]}" '--format=value(state.state)')
    quote "${show_state[@]}"
    echo "# if it does not exist:"
    quote "${create[@]}"
    echo "# every $poll_seconds seconds:"
    quote "${show_state[@]}"
    echo "# if ACTIVE:"
    quote "${read_heartbeat[@]}"
    on_workers all "$look"
    quote "${ssh[@]}"
    echo "# if a worker is idle, was stopped by a signal, or failed before this script began:"
    install_and_start
    echo "# if the heartbeat stood still for $stall seconds, before it is started again:"
    on_workers all "$stop"
    quote "${ssh[@]}"
    echo "# if SUSPENDED or FAILED after it was ACTIVE:"
    quote "${delete[@]}"
    quote "${create[@]}"
    if [[ $delete_at_end ]]; then
        echo "# on every way out:"
        quote "${delete[@]}"
    fi
    exit
fi

# gcloud's default may change while this runs.
export CLOUDSDK_CORE_PROJECT=${CLOUDSDK_CORE_PROJECT:-$(timeout 120 gcloud config get-value project 2>/dev/null)}
[[ $CLOUDSDK_CORE_PROJECT ]] || fail "gcloud knows no project; give CLOUDSDK_CORE_PROJECT, or see: gcloud config get-value project"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
answer=$folder/answer
archive=$folder/nvg_jax.tar.gz
pack "$archive"
state
[[ $now != unknown ]] || fail "gcloud cannot tell whether $name exists, see above; nothing was requested"
trap finish EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 141' PIPE
trap 'exit 143' TERM

alive=$SECONDS # time of the last sign of life
silent() {
    ((stall && SECONDS - alive > stall))
}

attempts=0
beat=
last_start=
# attempt WHAT: begins an attempt, or gives up after too many without a new checkpoint.
attempt() {
    local start
    start=$(started_from "$beat")
    if [[ $start != "$last_start" ]]; then
        attempts=0
        last_start=$start
    fi
    ((attempts < max_attempts)) || give_up "$attempts attempts in a row without a new checkpoint"
    attempts=$((attempts + 1))
    alive=$SECONDS
    say "$* (attempt $attempts of $max_attempts)"
}

if [[ $now == NOT_FOUND ]]; then
    ours=1
    if ! call 300 "${create[@]}"; then
        for _ in 1 2 3; do # only the answer may be lost
            state
            [[ $now == unknown ]] || break
            pause
        done
        [[ $now != NOT_FOUND && $now != unknown ]] || give_up "the request for $name failed, see above"
    fi
fi
wanted= # what was preempted is deleted, and not requested again yet
was_active=
watched=
shown=
while true; do
    state
    if [[ $now != "$shown" ]]; then
        say "$name is $now"
        shown=$now
    fi
    case $now in
        ACTIVE)
            was_active=1
            wanted=
            unread= # whether there may be a heartbeat that cannot be read
            if call 120 "${read_heartbeat[@]}" >"$answer" 2>"$folder/unread"; then
                if [[ $(<"$answer") != "$beat" ]]; then
                    beat=$(<"$answer")
                    alive=$SECONDS
                fi
            elif ! grep -qE 'matched no objects|No such file' "$folder/unread"; then
                unread=1
            fi
            reached=1
            on_workers all "$look"
            call 120 "${ssh[@]}" >"$answer" || reached=
            grep -q 'training=' "$answer" || reached= # gcloud may skip workers and succeed
            codes=$(grep -oE 'training=[0-9]+' "$answer" | cut -d= -f2 | sort -un) || true
            final=$(grep -vxE '0|75|134|137|143' <<<"$codes" | head -n 1) || true
            if grep -q 'training=other' "$answer"; then
                delete_at_end=
                say "error: $name trains something else; wait for its end, log in as who started it, give another --name, or stop it with CLOUDSDK_CORE_PROJECT=$CLOUDSDK_CORE_PROJECT launch/tpu_vm.sh delete --name=$name --zone=$zone"
                exit 2
            fi
            if grep -q 'training=running' "$answer" && [[ ! $final ]]; then
                watched=1 # a final code that comes later is of this training
            fi
            if grep -qE 'training=(running|[0-9])' "$answer"; then
                ours=1
            fi
            if [[ $final && $watched ]]; then
                say "training ended with exit code $final; its logs are in $workdir/logs"
                exit "$final"
            elif [[ ! $reached ]]; then
                say "not all workers can be reached; last sign of life $((SECONDS - alive)) s ago"
                ! silent || give_up "not all workers can be reached"
            elif [[ $final ]] || grep -qE 'training=(idle|75|134|137|143)' "$answer"; then
                attempt "installing and starting on all workers"
                if install_and_start; then
                    watched=1 # an exit code is of this attempt
                    say "training; CLOUDSDK_CORE_PROJECT=$CLOUDSDK_CORE_PROJECT launch/tpu_vm.sh logs --name=$name --zone=$zone shows its log"
                    alive=$SECONDS
                else
                    say "the installation failed"
                fi
            elif [[ $codes == 0 ]] && ! grep -q 'training=running' "$answer"; then
                say "training is done"
                exit 0
            elif silent && [[ $unread ]]; then
                say "the heartbeat in $workdir cannot be read, so training that stands still would not be started again: $(grep . "$folder/unread" || echo "no answer in 120 s")"
                alive=$SECONDS
            elif silent; then
                say "no new heartbeat in $workdir for $((SECONDS - alive)) s; stopping training to start it again"
                cat "$folder/unread" >&2
                on_workers all "$stop"
                call 120 "${ssh[@]}" || true
            fi
            ;;
        SUSPENDED | FAILED)
            if [[ $now == FAILED && ! $was_active ]]; then
                call 120 "${describe[@]}" '--format=value(state)' >&2 || true
                give_up "the request for $name failed"
            fi
            attempt "requesting new TPU VMs"
            ours=1
            wanted=1
            if call 1200 "${delete[@]}" && call 300 "${create[@]}"; then
                wanted=
                shown=
            fi
            ;;
        NOT_FOUND)
            if [[ $wanted ]]; then
                attempt "requesting new TPU VMs"
                ! call 300 "${create[@]}" || wanted=
            else
                ! silent || give_up "$name does not exist any more for $((SECONDS - alive)) s"
            fi
            ;;
        unknown) ! silent || give_up "nothing is known of $name for $((SECONDS - alive)) s" ;;
        DELETING) alive=$SECONDS ;;
        *) # waiting, which costs nothing
            alive=$SECONDS
            wanted=
            ;;
    esac
    pause
done
