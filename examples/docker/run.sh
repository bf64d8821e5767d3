#!/usr/bin/env bash
# Train in a container on one node.
#
#   examples/docker/run.sh --config examples/quickstart.yaml                       one process on one GPU
#   PROCESSES=8 DATA=/scratch/c4 OUTPUT=/scratch/runs \
#       examples/docker/run.sh --config examples/llama2_1b.yaml                    eight GPUs
#   IMAGE=megatron_crnet:cpu GPUS=none PROCESSES=2 \
#       examples/docker/run.sh --config examples/quickstart.yaml \
#       --training.micro_batch_size 4                                              two processes on CPUs
#   examples/docker/run.sh --dry-run --config ...                                  print the command, start nothing
#   PROGRAM=tools/preprocess_data.py examples/docker/run.sh data/text ...          one of the tools
#
# `--dry-run` as the first argument is this script's; everything after it goes to the program. Ctrl-C and `docker stop`
# send a signal to the trainer.
#
#   IMAGE           image to run (megatron_crnet)
#   PROGRAM         program of the image's folder (pretrain_crnet.py)
#   PROCESSES       processes of the program, one for each GPU (1)
#   GPUS            the engine's --gpus: all, or '"device=0,1"'; none for the CPU image (all)
#   DATA            folder of the host that is data/ inside; index caches are written into it (./data)
#   OUTPUT          folder of the host that is runs/ inside (./runs)
#   RUN_AS          user:group to run as, to whom the files in OUTPUT will belong (who starts this)
#   SHM_SIZE        shared memory, which NCCL and data workers need (16g)
#   MEMLOCK         bytes that may be locked in memory, which InfiniBand needs; -1: no limit (-1)
#   STOP_TIMEOUT    seconds that `docker stop` waits before it kills: at least what writing a checkpoint takes (600)
#   NCCL_*, GLOO_*, UCX_*, TORCH_*, PYTORCH_*, TORCHINDUCTOR_*, TRITON_*, OMP_*, WANDB_*, CUDA_DEVICE_MAX_CONNECTIONS
#                each such variable is handed on
#   DOCKER          docker or podman (docker)
#   DOCKER_OPTIONS  more options for the engine, divided by spaces: '--env WANDB_API_KEY --env HF_TOKEN' ()
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=container.sh
source "$(dirname "${BASH_SOURCE[0]}")/container.sh"

PROGRAM=${PROGRAM:-pretrain_crnet.py}
PROCESSES=${PROCESSES:-1}
[[ $PROCESSES =~ ^[1-9][0-9]*$ ]] || fail "PROCESSES is $PROCESSES, but must be a number from 1: set it to the GPUs to use"

if ((PROCESSES == 1)); then
    container -- "$PROGRAM" "$@"
else
    container -- "${launcher[@]}" --standalone "--nproc_per_node=$PROCESSES" "$PROGRAM" "$@"
fi
