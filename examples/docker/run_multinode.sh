#!/usr/bin/env bash
# Train in containers on several nodes: start this on each of them, with the same arguments and its own NODE_RANK.
#
#   NODES=2 NODE_RANK=0 MASTER_ADDR=node0 PROCESSES=8 DATA=/shared/c4 OUTPUT=/shared/runs \
#       examples/docker/run_multinode.sh --config examples/llama2_7b.yaml            on node0
#   NODES=2 NODE_RANK=1 MASTER_ADDR=node0 PROCESSES=8 DATA=/shared/c4 OUTPUT=/shared/runs \
#       examples/docker/run_multinode.sh --config examples/llama2_7b.yaml            on node1
#   ... examples/docker/run_multinode.sh --dry-run --config ...                      print the command, start nothing
#
# The containers use the host's network, so that ranks reach each other as if there were no containers. OUTPUT must be
# the same folder on all nodes, because every rank writes and reads its part of a checkpoint there.
#
#   NODES        number of nodes
#   NODE_RANK    this node's number, from 0
#   MASTER_ADDR  name or address of node 0 that the others reach
#   MASTER_PORT  a free port there (29500)
#   PROCESSES    processes on each node, one for each GPU (8)
#   NCCL_*, GLOO_*, UCX_*, TORCH_*, PYTORCH_*, TORCHINDUCTOR_*, TRITON_*, OMP_*, WANDB_*, CUDA_DEVICE_MAX_CONNECTIONS
#                each such variable is handed on. Most needed: NCCL_SOCKET_IFNAME and
#                GLOO_SOCKET_IFNAME (network to start over), NCCL_IB_HCA (InfiniBand adapters to use), NCCL_DEBUG=INFO
#                (say which way was taken)
#   and those of run.sh: IMAGE, PROGRAM, GPUS, DATA, OUTPUT, RUN_AS, SHM_SIZE, MEMLOCK, STOP_TIMEOUT, DOCKER,
#   DOCKER_OPTIONS
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=container.sh
source "$(dirname "${BASH_SOURCE[0]}")/container.sh"

PROGRAM=${PROGRAM:-pretrain_crnet.py}
PROCESSES=${PROCESSES:-8}
MASTER_PORT=${MASTER_PORT:-29500}
for name in NODES NODE_RANK MASTER_ADDR; do
    [[ -n ${!name:-} ]] || fail "$name is not set, but every node needs it: see the top of $0"
done
for name in NODES NODE_RANK MASTER_PORT PROCESSES; do
    [[ ${!name} =~ ^[0-9]+$ ]] || fail "$name is ${!name}, but must be a whole number: change it"
done
((NODE_RANK < NODES)) || fail "NODE_RANK is $NODE_RANK, but ranks of $NODES nodes go from 0 to $((NODES - 1)): change it"

options=(--network host)
[[ ! -e /dev/infiniband ]] || options+=(--device /dev/infiniband)

container "${options[@]}" -- "${launcher[@]}" \
    "--nnodes=$NODES" "--node_rank=$NODE_RANK" "--master_addr=$MASTER_ADDR" "--master_port=$MASTER_PORT" \
    "--nproc_per_node=$PROCESSES" "$PROGRAM" "$@"
