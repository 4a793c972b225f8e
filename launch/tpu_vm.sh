#!/usr/bin/env bash
# Trains on TPU VMs: requests them, installs the code, trains on all workers, and requests new
# ones after a preemption. Needs gcloud, logged in, and `ssh-add ~/.ssh/google_compute_engine`.
#
#     launch/tpu_vm.sh run --name=nvg-d16 --zone=us-east5-a --type=v5p-128 --spot \
#         -- --config=configs/imagenet256.py:d16 --workdir=gs://BUCKET/d16
#     launch/tpu_vm.sh logs --name=nvg-d16 --zone=us-east5-a
#     launch/tpu_vm.sh delete --name=nvg-d16 --zone=us-east5-a
#
# `run` waits until training ends and exits with its exit code; run again, it resumes watching.
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
#     --setup="COMMAND"        run on every worker after the installation, to mount the data
#                              for example
#     --poll_seconds=N         seconds between two checks (60)
#     --delete_at_end          delete the TPU VMs when training has ended or failed
#     --dry_run                print the commands without running them (DRY_RUN=1 does the same)
#
# Environment: JAX_COMPILATION_CACHE_DIR (default WORKDIR/jax_cache); CLOUDSDK_CORE_PROJECT
# selects a project other than gcloud's default.

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
        --create_flags=*) read -ra create_flags <<<"${1#*=}" ;;
        --ssh_flags=*) read -ra ssh_flags <<<"${1#*=}" ;;
        --setup=*) setup=${1#*=} ;;
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
[[ $zone ]] || fail "give --zone=ZONE; see $0 --help"

queued=(gcloud compute tpus queued-resources)

delete() {
    run "${queued[@]}" delete "$name" "--zone=$zone" --force --quiet
}

# on_workers WORKERS COMMAND
on_workers() {
    run "${queued[@]}" ssh "$name" "--zone=$zone" ${ssh_flags[@]+"${ssh_flags[@]}"} \
        "--node=$1" "--worker=$1" "--command=$2"
}

case $action in
    logs)
        on_workers 0 'tail -n 100 -F train.log'
        exit
        ;;
    delete)
        delete
        exit
        ;;
esac

[[ $type ]] || fail "give --type=TYPE, such as v5p-128; see $0 --help"
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices must be a positive integer, not '$slices'"
take_train_arguments "$@"
require_shared_workdir
if [[ ! $runtime_version ]]; then
    case $type in
        v6e-*) runtime_version=v2-alpha-tpuv6e ;;
        v5p-*) runtime_version=v2-alpha-tpuv5 ;;
        v5litepod-*) runtime_version=v2-alpha-tpuv5-lite ;;
        v[234]-*) runtime_version=tpu-ubuntu2204-base ;;
        *) fail "no runtime version is known for --type=$type; give --runtime_version=NAME" ;;
    esac
fi
nodes=("--node-id=$name")
if ((slices > 1)); then
    nodes=("--node-count=$slices" "--node-prefix=$name")
fi

say() {
    echo "tpu_vm.sh: $(date +%H:%M:%S) $*" >&2
}

create() {
    run "${queued[@]}" create "$name" "--zone=$zone" "--accelerator-type=$type" \
        "--runtime-version=$runtime_version" "${nodes[@]}" ${spot[@]+"${spot[@]}"} \
        ${create_flags[@]+"${create_flags[@]}"} --async
}

state() {
    run "${queued[@]}" describe "$name" "--zone=$zone" '--format=value(state.state)'
}

# One line per worker: training=idle, training=running or training=EXIT_CODE.
worker_states() {
    # shellcheck disable=SC2016 # expanded on the worker
    on_workers all 'if tmux has-session -t nvg_jax 2>/dev/null; then echo training=running; elif [ -f exit_code ]; then echo training=$(cat exit_code); else echo training=idle; fi'
}

# The runtime's own Python is too old; uv installs a newer one.
archive=${TMPDIR:-/tmp}/nvg_jax-$name.tar.gz
install='mkdir -p nvg_jax && tar -xzf nvg_jax.tar.gz -C nvg_jax'
install+=' && python3 -m pip install --user --quiet uv'
install+=' && ~/.local/bin/uv venv --quiet --allow-existing --python 3.12 env'
install+=" && ~/.local/bin/uv pip install --quiet --python env --requirement nvg_jax/requirements.txt 'jax[tpu]'"
install+=${setup:+" && $setup"}
train="cd nvg_jax && $(quote env "$jax_cache" bash launch/restart.sh ../env/bin/python -m nvg_jax.train --distributed "${train_arguments[@]}")"
train+=' >>../train.log 2>&1; echo $? >../exit_code'
start="tmux has-session -t nvg_jax 2>/dev/null || { rm -f exit_code; tmux new-session -d -s nvg_jax bash -c $(quote "$train"); }"

install_and_start() {
    pack "$archive" &&
        run "${queued[@]}" scp "$archive" "$name:nvg_jax.tar.gz" "--zone=$zone" \
            ${ssh_flags[@]+"${ssh_flags[@]}"} --node=all --worker=all &&
        on_workers all "$install" &&
        on_workers all "$start"
}

finish() {
    if [[ $delete_at_end ]]; then
        delete
    else
        say "the TPU VMs are still running; launch/tpu_vm.sh delete --name=$name --zone=$zone deletes them"
    fi
}

if [[ $dry_run ]]; then
    state
    echo "# if it does not exist:"
    create
    echo "# every $poll_seconds seconds:"
    state
    echo "# if ACTIVE:"
    worker_states
    echo "# if a worker is idle or was stopped by a signal:"
    install_and_start
    echo "# if SUSPENDED or FAILED after it was ACTIVE:"
    delete
    create
    if [[ $delete_at_end ]]; then
        echo "# when training has ended:"
        delete
    fi
    exit
fi

if ! state >/dev/null 2>&1; then
    create
fi
was_active=
failures=0
shown=
while true; do
    now=$(state) || now=unknown # a failed check says nothing about the TPU
    if [[ $now != "$shown" ]]; then
        say "$name is $now"
        shown=$now
    fi
    case $now in
        ACTIVE)
            was_active=1
            workers=$(worker_states) || workers=
            [[ $workers ]] || say "no worker can be reached; retrying"
            codes=$(grep -oE 'training=[0-9]+' <<<"$workers" | cut -d= -f2 | sort -un) || true
            final=$(grep -vxE '0|75|134|137|143' <<<"$codes" | head -n 1) || true
            if [[ $final ]]; then
                say "training ended with exit code $final; launch/tpu_vm.sh logs shows why"
                finish
                exit "$final"
            elif grep -qE 'training=(idle|75|134|137|143)' <<<"$workers"; then
                say "installing and starting on all workers"
                if install_and_start; then
                    failures=0
                    say "training; launch/tpu_vm.sh logs --name=$name --zone=$zone shows its log"
                else
                    failures=$((failures + 1))
                    ((failures < 5)) || fail "the installation failed $failures times in a row; see above"
                    say "the installation failed; retrying"
                fi
            elif [[ $codes == 0 ]] && ! grep -q 'training=running' <<<"$workers"; then
                say "training is done"
                finish
                exit 0
            fi
            ;;
        SUSPENDED | FAILED)
            if [[ $now == FAILED && ! $was_active ]]; then
                fail "the request for $name failed: $("${queued[@]}" describe "$name" "--zone=$zone" '--format=value(state)')"
            fi
            say "requesting new TPU VMs"
            if delete && create; then
                shown=
            fi
            ;;
    esac
    sleep "$poll_seconds"
done
