# shellcheck shell=bash
# What run.sh and run_multinode.sh share: read by them, not run by itself. The image's folder looks like the repository,
# so that every path and command of the documentation is the same inside.

readonly home_in_image=/opt/megatron_crnet

# what starts the processes of one node, as arguments of python3
# shellcheck disable=SC2034  # used by the two scripts
readonly launcher=(tools/launch.py)

# fail MESSAGE: a mistake of the user's, in one line, status 2 as everywhere in this project
fail() {
    echo "error: $1" >&2
    exit 2
}

# make_folders: an absent folder would be made by the engine, for root alone
make_folders() {
    mkdir -p "$DATA" "$OUTPUT" || fail "DATA $DATA and OUTPUT $OUTPUT must be folders that can be made or written: change them"
}

# container DOCKER-OPTIONS -- ARGUMENTS: replaces this shell by the container, or prints the command under --dry-run.
#   --init   its first process is a small one that passes signals on to the trainer and collects what it leaves
#   --user   files in DATA and OUTPUT belong to who started this; the image's home lets any user write caches
container() {
    local options=()
    while [[ $1 != -- ]]; do
        options+=("$1")
        shift
    done
    shift
    local absolute_data absolute_output extra=()
    absolute_data=$(realpath --canonicalize-missing "$DATA")
    absolute_output=$(realpath --canonicalize-missing "$OUTPUT")
    [[ $GPUS == none ]] || options+=(--gpus "$GPUS")
    # which network and adapters to use is set by such variables, for NCCL and for the host's own calls (gloo)
    local name
    for name in $(compgen -e | grep -E '^((NCCL|GLOO|UCX|TORCH|TORCHINDUCTOR|PYTORCH|TRITON|OMP|WANDB)_|CUDA_DEVICE_MAX)'); do
        options+=(--env "$name=${!name}")
    done
    # words of a variable that the user wrote as words
    read -r -a extra <<<"$DOCKER_OPTIONS"
    local command=("$DOCKER" run --rm --init --stop-timeout "$STOP_TIMEOUT" --user "$RUN_AS"
        --shm-size "$SHM_SIZE" --ulimit "memlock=$MEMLOCK" --ulimit "stack=67108864"
        --volume "$absolute_data:$home_in_image/data" --volume "$absolute_output:$home_in_image/runs"
        "${options[@]}" "${extra[@]}" --entrypoint python3 "$IMAGE" "$@")
    if [[ $dry_run == yes ]]; then
        printf '%q ' "${command[@]}"
        echo
        exit 0
    fi
    make_folders
    exec "${command[@]}"
}

dry_run=no
if [[ ${1:-} == --dry-run ]]; then
    dry_run=yes
    shift
fi
IMAGE=${IMAGE:-megatron_crnet}
DATA=${DATA:-data}
OUTPUT=${OUTPUT:-runs}
GPUS=${GPUS:-all}
SHM_SIZE=${SHM_SIZE:-16g}
MEMLOCK=${MEMLOCK:--1}
STOP_TIMEOUT=${STOP_TIMEOUT:-600}
RUN_AS=${RUN_AS:-$(id -u):$(id -g)}
DOCKER=${DOCKER:-docker}
DOCKER_OPTIONS=${DOCKER_OPTIONS:-}
