#!/usr/bin/env bash
# Submit a chain of jobs that continue each other, for clusters that do not let jobs requeue themselves.
#
#   examples/slurm/chain.sh 5 --nodes=4 --time=12:00:00 examples/slurm/pretrain.sbatch --training.train_steps 20000
#
# The first argument is the number of jobs, the others are sbatch's. Each job starts when the one before has ended
# well: complete, or saved before its time was over. After a crash, or a start without progress, the rest is cancelled.
# Jobs after completion find nothing to do and end at once. Prints the numbers of the jobs.
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "error: usage: chain.sh JOBS [SBATCH OPTIONS] SCRIPT [ARGUMENTS], not '$*'" >&2
    exit 2
fi
jobs=$1
shift
# the script ends with 0 instead of requeueing, and counts starts without progress over the whole chain
CHAIN=chain-$(date +%s)-$$
export CHAIN
previous=
for ((number = 1; number <= jobs; number++)); do
    previous=$(sbatch --parsable ${previous:+--dependency=afterok:$previous --kill-on-invalid-dep=yes} "$@")
    previous=${previous%%;*} # federations add ;CLUSTER
    echo "$previous"
done
