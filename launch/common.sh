# shellcheck shell=bash disable=SC2034 # the variables are for the scripts that source this
# Sourced by the launchers: errors, help, dry runs, training arguments, packing of the code.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry_run=${DRY_RUN:-}
dry_run=${dry_run#0}

# Reports a user error.
fail() {
    echo "error: $*" >&2
    exit 2
}

# Prints the comment at the top of the script.
print_help() {
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

# Prints the words as one line that a shell splits into the same words.
quote() {
    local word line="" quoted="'\\''"
    for word; do
        if [[ ! $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
            word="'${word//\'/$quoted}'" # without inner quotes, which bash 3.2 would keep
        fi
        line+=" $word"
    done
    echo "${line# }"
}

# Runs a command, or prints it in a dry run.
run() {
    if [[ $dry_run ]]; then
        quote "$@"
    else
        "$@"
    fi
}

# Sets train_arguments, config_file (empty for a preset's name), workdir, jax_cache and packages (what
# training needs beside the requirements on TPUs, quoted) from the arguments after --, after training
# itself has checked them: with its own parser, without data and accelerators, also in a dry run.
take_train_arguments() {
    local argument config='' scheme code=0
    workdir=
    # Models to start from may be on the hub, and metrics may go to Weights & Biases.
    packages="'jax[tpu]' 'huggingface_hub>=2,<3' 'wandb>=0.19'"
    for argument; do
        case $argument in
            --config=*) config=${argument#*=} ;;
            --workdir=*) workdir=${argument#*=} ;;
            --check_only | --check_only=*) fail "--check_only is what the launchers ask first; --dry_run shows the rest" ;;
        esac
    done
    [[ $workdir == *://* ]] && scheme=${workdir%%://*}:// || scheme=
    workdir=${workdir#"$scheme"}
    while [[ $workdir == *//* ]]; do # as training reads it
        workdir=${workdir//\/\//\/}
    done
    workdir=$scheme${workdir%/}
    given_workdir=$workdir
    [[ $workdir != "~"/* ]] || workdir=$HOME/${workdir#"~/"} # as training reads it
    [[ $config ]] || fail "no --config=FILE among the training arguments, which come after --; see $0 --help"
    [[ $workdir ]] || fail "no --workdir=FOLDER among the training arguments, which come after --; see $0 --help"
    config_file=${config%%:*}
    [[ -f $root/$config_file || $config_file == /* ]] || config_file=
    train_arguments=("$@")
    # Only the first process writes the cache and all read it, so it is kept beside the checkpoints.
    jax_cache=JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$workdir/jax_cache}
    (cd "$root" && "${PYTHON:-python}" -m nvg_jax.train --check_only "$@") || code=$?
    ((code != 2)) || exit 2 # the error has been printed
    ((code == 0)) || fail "${PYTHON:-python} cannot check the training arguments, see above; install the requirements, or name the Python that has them with PYTHON=..."
}

# Requires a workdir that outlives the machines.
require_shared_workdir() {
    case $given_workdir in
        gs://* | /*) ;;
        *://*) fail "--workdir=$workdir: of the buckets, the launchers know gs:// alone" ;;
        *) fail "--workdir=$given_workdir would be lost with the machine; give gs://BUCKET/FOLDER or the absolute path of a folder on a file system that all machines mount" ;;
    esac
}

# The code that is sent: what git knows, or would know after `git add .`, without the tests.
packed=(git -C "$root" ls-files -z -co --exclude-standard -- . ':!tests')

# Requires that `pack` packs the config file, if it is a file.
require_packed_config() {
    [[ ! $config_file ]] ||
        "${packed[@]}" 2>/dev/null | grep -zxF -- "$config_file" >/dev/null ||
        fail "--config=$config_file is not among the files that are sent: put it below $root, for example in configs/, where git does not ignore it, and give its path from there"
}

# started_from HEARTBEAT: the part and the step that the process started from. They change only
# when a checkpoint was saved, so two runs with the same ones made no progress.
started_from() {
    local beat=$1
    echo "${beat%%, \"step\"*}"
}

# pack FILE: packs the code that is sent.
pack() {
    local file
    if [[ $dry_run ]]; then
        echo "$(quote "${packed[@]}") | $(quote tar -czf "$1" -C "$root" --null -T -)"
        return
    fi
    "${packed[@]}" | while IFS= read -r -d '' file; do
        if [[ -e $root/$file ]]; then # not deleted since the last commit
            printf '%s\0' "$file"
        fi
    done | tar -czf "$1" -C "$root" --null -T - ||
        fail "the code in $root cannot be packed, see above; outside a git checkout, run git init there"
}
