#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, through xpk (pip install xpk).
#
#     launch/gke_xpk.sh --cluster=CLUSTER --name=nvg-d16 --tpu_type=v5p-128 \
#         -- --config=configs/imagenet256.py:d16 --workdir=gs://BUCKET/d16
#
# The arguments after -- are passed to `python -m nvg_jax.train --distributed`.
#
#     --cluster=NAME        the cluster (`xpk cluster create` makes one)
#     --name=NAME           name of the workload: at most 28 lower-case letters, digits and dashes
#     --tpu_type=TYPE       v5litepod-256, v5p-128, v6e-64, ...
#     --num_slices=N        number of slices (1)
#     --max_restarts=N      restarts of the whole workload (100)
#     --docker_image=IMAGE  an image with this repository as its working folder and all
#                           requirements installed; by default the current code is added to
#                           python:3.12 and every pod installs the requirements at start-up
#     --xpk_flags="..."     more flags for xpk: --zone=..., --project=..., --spot, --priority=...
#     --dry_run             print the commands without running them (DRY_RUN=1 does the same)
#
# The arguments are checked before anything is created. The code that git knows is sent, with
# uncommitted changes. At the end, the command that deletes the workload is printed.
#
# Environment: PYTHON (default python) checks the arguments; JAX_COMPILATION_CACHE_DIR (default
# WORKDIR/jax_cache).

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cluster=
name=
tpu_type=
num_slices=1
max_restarts=100
docker_image=
xpk_flags=()
while (($#)); do
    case $1 in
        --cluster=*) cluster=${1#*=} ;;
        --name=*) name=${1#*=} ;;
        --tpu_type=*) tpu_type=${1#*=} ;;
        --num_slices=*) num_slices=${1#*=} ;;
        --max_restarts=*) max_restarts=${1#*=} ;;
        --docker_image=*) docker_image=${1#*=} ;;
        --xpk_flags=*) read -d '' -ra xpk_flags <<<"${1#*=}" || true ;;
        --dry_run) dry_run=1 ;;
        --help) print_help && exit ;;
        --) shift && break ;;
        *) fail "unknown argument $1; training arguments come after --, see $0 --help" ;;
    esac
    shift
done
[[ $cluster ]] || fail "give --cluster=NAME; see $0 --help"
[[ $tpu_type ]] || fail "give --tpu_type=TYPE, such as v5p-128; see $0 --help"
[[ $name =~ ^[a-z]([-a-z0-9]{0,26}[a-z0-9])?$ ]] ||
    fail "--name must be at most 28 lower-case letters, digits and dashes, beginning with a letter, not '$name'"
take_train_arguments "$@"
require_shared_workdir
[[ $docker_image ]] || require_packed_config

# exec, because Kubernetes signals the process that xpk started, and that must be restart.sh.
# restart.sh restarts a crashed process in its pod. The exit codes it returns after a signal
# (75 and 128 + signal) restart the workload; 1 and 2 end it.
# Without JAX_PLATFORMS, JAX goes on with the CPU where it cannot start the TPU.
command="exec $(quote env JAX_PLATFORMS=tpu,cpu "$jax_cache" bash launch/restart.sh python -m nvg_jax.train --distributed "${train_arguments[@]}")"
if [[ $docker_image ]]; then
    image=("--docker-image=$docker_image")
else
    stage=${TMPDIR:-/tmp}/nvg_jax-$name
    run rm -rf "$stage"
    run mkdir -p "$stage"
    pack "$stage.tar.gz"
    run tar -xzf "$stage.tar.gz" -C "$stage"
    image=(--base-docker-image=python:3.12 "--script-dir=$stage")
    # xpk restarts a workload that ends with 75, and no other that ends by itself.
    command="{ pip install --quiet --requirement requirements.txt $packages || { sleep 60; exit 75; }; } && $command"
fi

# On every way out: a request that failed or was interrupted may have left a workload, too.
delete=(xpk workload delete "--cluster=$cluster" "--workload=$name")
for ((index = 0; index < ${#xpk_flags[@]}; index++)); do
    case ${xpk_flags[index]} in
        --zone=* | --project=*) delete+=("${xpk_flags[index]}") ;;
        --zone | --project) delete+=("${xpk_flags[@]:index:2}") ;;
    esac
done
remind() {
    echo "gke_xpk.sh: a workload $name runs until its training ends; this deletes it:" >&2
    echo "    $(quote "${delete[@]}")" >&2
}
if [[ ! $dry_run ]]; then
    trap remind EXIT
fi
run xpk workload create "--cluster=$cluster" "--workload=$name" "--tpu-type=$tpu_type" \
    "--num-slices=$num_slices" "--max-restarts=$max_restarts" --restart-on-exit-codes=75 \
    --termination-grace-period-seconds=300 "${image[@]}" ${xpk_flags[@]+"${xpk_flags[@]}"} \
    "--command=$command"
