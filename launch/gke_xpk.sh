#!/usr/bin/env bash
# Training on TPU slices of a GKE cluster, submitted with xpk (pip install xpk).
#
#     launch/gke_xpk.sh --cluster=CLUSTER --name=nvg-d16 --tpu_type=v5p-128 \
#         -- --config=configs/imagenet256.py:d16 --workdir=gs://BUCKET/d16
#
# What stands after -- goes to `python -m nvg_jax.train --distributed`.
#
#     --cluster=NAME        the cluster (xpk cluster create makes one)
#     --name=NAME           of the workload: small letters, digits, dashes; at most 28
#     --tpu_type=TYPE       v5litepod-256, v5p-128, v6e-64, ...
#     --num_slices=N        (1)
#     --max_restarts=N      restarts of the whole workload (100)
#     --docker_image=IMAGE  an image with this repository in its working folder and
#                           everything installed; without it the code as it stands here is
#                           put on python:3.12 and every pod installs at its start
#     --xpk_flags="..."     more flags for xpk: --zone=..., --project=..., --spot, --priority=...
#     --dry_run             prints the commands and runs none (so does DRY_RUN=1)
#
# Environment: JAX_COMPILATION_CACHE_DIR (WORKDIR/jax_cache).

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
        --xpk_flags=*) read -ra xpk_flags <<<"${1#*=}" ;;
        --dry_run) dry_run=1 ;;
        --help) print_help && exit ;;
        --) shift && break ;;
        *) fail "unknown argument $1; training arguments stand after --, see $0 --help" ;;
    esac
    shift
done
[[ $cluster ]] || fail "give --cluster=NAME; see $0 --help"
[[ $tpu_type ]] || fail "give --tpu_type=TYPE, such as v5p-128; see $0 --help"
[[ $name =~ ^[a-z]([-a-z0-9]{0,26}[a-z0-9])?$ ]] ||
    fail "--name must be of small letters, digits and dashes, begin with a letter and have at most 28, not '$name'"
take_train_arguments "$@"
require_shared_workdir

# exec: the signal of a preemption goes to what xpk has started, and must reach restart.sh.
# restart.sh starts a crashed process again where it is. The codes with which it ends after
# the signal (75 and 128 + signal) restart the workload; 1 and 2 end it.
command="exec $(quote env "$jax_cache" bash launch/restart.sh python -m nvg_jax.train --distributed "${train_arguments[@]}")"
if [[ $docker_image ]]; then
    image=("--docker-image=$docker_image")
else
    stage=${TMPDIR:-/tmp}/nvg_jax-$name
    run mkdir -p "$stage"
    pack "$stage.tar.gz"
    run tar -xzf "$stage.tar.gz" -C "$stage"
    image=(--base-docker-image=python:3.12 "--script-dir=$stage")
    command="pip install --quiet --requirement requirements.txt 'jax[tpu]' && $command"
fi
run xpk workload create "--cluster=$cluster" "--workload=$name" "--tpu-type=$tpu_type" \
    "--num-slices=$num_slices" "--max-restarts=$max_restarts" --restart-on-exit-codes=75 \
    --termination-grace-period-seconds=300 "${image[@]}" ${xpk_flags[@]+"${xpk_flags[@]}"} \
    "--command=$command"
