#!/usr/bin/env bash
# Pre-train with DeepSpeed's own launcher, on machines without a scheduler.
#
#   examples/deepspeed/pretrain.sh --training.train_steps 20000      # on every node of HOSTFILE, without ssh
#   SSH=1 examples/deepspeed/pretrain.sh ...                        # on the first node alone: pdsh starts the others,
#                                                                   # with NCCL_* of here; GLOO_SOCKET_IFNAME=ib0 and
#                                                                   # the like go into a file .deepspeed_env, one a line
#
# Arguments are pretrain_crnet.py's. Run it from the repository's root, which is at the same path on every node.
#
# Exit status: that of the first process of this node that failed, so 75 where the trainer saved because it was asked
# to by SIGUSR1 (send it to any training process, not to the launcher). SIGTERM to the launcher ends the
# processes, with 30 s to save, and gives 1. With SSH=1 pdsh gives 0 or 1 for all of these. See docs/cluster.md.
set -euo pipefail

# ===== settings: edit here, or set them in the environment =====================================================
: "${HOSTFILE:=examples/deepspeed/hostfile}"
: "${CONFIG:=examples/llama2_7b.yaml}" # YAML files, separated by spaces; later ones override
: "${NODE_RANK:=}"                     # empty: this host's place in HOSTFILE
: "${MASTER_ADDR:=}"                   # empty: the first host of HOSTFILE
: "${MASTER_PORT:=29500}"
: "${SSH:=0}"
: "${DEEPSPEED:=}" # empty: .venv/bin/deepspeed if it is there, else deepspeed
# ===============================================================================================================

fail() { # WORDS...
    echo "error: $*" >&2
    exit 2
}

[[ -f pretrain_crnet.py ]] || fail "no pretrain_crnet.py here: run this from the repository's root"
[[ -f $HOSTFILE ]] || fail "HOSTFILE $HOSTFILE is not there: write one, a line NAME slots=GPUS a node"
# not mapfile < <(sed): nobody waits for that sed once exec has replaced this shell, and a zombie stays with the run
names=$(sed -n 's/^[[:space:]]*\([^#[:space:]]\+\)[[:space:]]\+slots=.*/\1/p' "$HOSTFILE")
[[ -n $names ]] || fail "HOSTFILE $HOSTFILE names no node: write a line NAME slots=GPUS for each"
mapfile -t hosts <<<"$names"
if [[ -z $DEEPSPEED ]]; then
    DEEPSPEED=deepspeed
    [[ -x .venv/bin/deepspeed ]] && DEEPSPEED=.venv/bin/deepspeed
fi
options=(--hostfile "$HOSTFILE" --master_addr "${MASTER_ADDR:-${hosts[0]}}" --master_port "$MASTER_PORT")
options+=(--no_local_rank) # the trainer reads LOCAL_RANK

if [[ $SSH != 1 ]]; then
    for index in "${!hosts[@]}"; do
        # names with and without the domain are the same host
        [[ -z $NODE_RANK && ${hosts[index]%%.*} == "$(hostname -s)" ]] && NODE_RANK=$index
    done
    [[ -n $NODE_RANK ]] || fail "this host, $(hostname -s), is not in $HOSTFILE: correct the file or set NODE_RANK"
    options+=(--no_ssh --node_rank "$NODE_RANK")
fi

read -ra configs <<<"$CONFIG"
exec "$DEEPSPEED" "${options[@]}" pretrain_crnet.py "${configs[@]/#/--config=}" "$@"
