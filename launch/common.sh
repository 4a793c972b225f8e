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
            word="'${word//\'/"$quoted"}'"
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

# Checks the arguments after -- and sets train_arguments, workdir and jax_cache.
take_train_arguments() {
    local argument config=
    workdir=
    for argument; do
        case $argument in
            --config=*) config=${argument#*=} ;;
            --workdir=*) workdir=${argument#*=} ;;
        esac
    done
    [[ $config ]] || fail "no --config=FILE among the training arguments, which come after --; see $0 --help"
    [[ $workdir ]] || fail "no --workdir=FOLDER among the training arguments, which come after --; see $0 --help"
    train_arguments=("$@")
    # Only the first process writes the cache and all read it, so it is kept beside the checkpoints.
    jax_cache=JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$workdir/jax_cache}
}

# Requires a workdir that outlives the machines.
require_shared_workdir() {
    case $workdir in
        gs://* | /*) ;;
        *) fail "--workdir=$workdir would be lost with the machine; give gs://BUCKET/FOLDER or the absolute path of a folder on a file system that all machines mount" ;;
    esac
}

# Packs the code as it is here, including uncommitted changes, but without the tests and their data.
pack() {
    run tar --exclude-vcs --exclude=./.venv --exclude=./.pytest_cache --exclude=./tests --exclude=./runs \
        --exclude=__pycache__ -czf "$1" -C "$root" .
}
