#!/usr/bin/env bash
# What only a GPU can tell, as far as 8 minutes go: the tests marked gpu, exactness to the bit, speed and memory.
#
#     tools/gpu_check.sh FOLDER          # a new folder: JSON of each part, the logs, and table.md with all figures
#     tools/gpu_check.sh --dry FOLDER    # the same path at tiny sizes on a CPU
#
# PYTHON names the interpreter (python). A part that fails or runs out of time is named, and the others go on; then the
# exit status is 1. SECONDS_IN_ALL (460) is the time of all parts together, PARTS names those to run (all; `compile`
# comes first), VARIANTS the variants (full_rank crnet low_rank cola).
set -uo pipefail

dry=false
if [ "${1:-}" = --dry ]; then
    dry=true
    shift
fi
if [ $# -ne 1 ] || [ -z "$1" ]; then
    echo "error: $# folders are given, but the figures go into one: tools/gpu_check.sh [--dry] FOLDER" >&2
    exit 2
fi
if [ -e "$1" ]; then
    echo "error: $1 exists already: give a new folder, or remove it" >&2
    exit 2
fi
known="compile gpu_tests exactness 7b_16_layers 1b 60m 7b_replay 350m 1b_strategies report"
for name in ${PARTS:-}; do
    if [[ " $known " != *" $name "* ]]; then
        echo "error: PARTS has $name, but the parts are: $known" >&2
        exit 2
    fi
done
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python}
slower=$($dry && echo 20 || echo 1) # times as long as on a GPU
deadline=$((SECONDS + ${SECONDS_IN_ALL:-460} * slower))
failed=()

wanted() { # NAME
    [ -z "${PARTS:-}" ] || [[ " $PARTS " == *" $1 "* ]]
}

# part NAME SECONDS COMMAND...: at most as long as is left; interrupted, a benchmark writes what it has measured
part() {
    local name=$1 limit=$(($2 * slower)) left=$((deadline - SECONDS)) started=$SECONDS status
    shift 2
    wanted "$name" || return
    if [ "$left" -lt 10 ]; then
        echo "FAILED $name: no time left"
        failed+=("$name")
        return
    fi
    timeout --signal=INT --kill-after=30 $((limit < left ? limit : left)) "$@" >"$out/$name.txt" 2>"$out/$name.log"
    status=$?
    if $dry && [ "$name,$status" = gpu_tests,5 ]; then # all were skipped
        status=0
    fi
    if [ -e "$out/$name.json" ] && grep -qE '"error": "|"complete": false' "$out/$name.json"; then
        status=1
    fi
    if [ $status -eq 0 ]; then
        echo "ok     $name: $((SECONDS - started)) s"
    else
        echo "FAILED $name: status $status after $((SECONDS - started)) s: $(tail -n 1 "$out/$name.log")"
        failed+=("$name")
    fi
    { echo "## $name"; echo; cat "$out/$name.txt"; echo; } >>"$out/table.md"
}

base=("$python" -m megatron_crnet benchmark --training.dtype bf16 --no-counts --warm-up 1 --threads 4)
base+=(--deepspeed.zero_optimization.reduce_bucket_size 50000000)

# measure NAME SECONDS EXAMPLE OPTIONS...
measure() {
    local name=$1 limit=$2 example=$3
    shift 3
    part "$name" "$limit" "${base[@]}" --config "examples/$example.yaml" --json "$out/$name.json" --repeats "$repeats" \
        "$@" "${tiny[@]}"
}

# compile EXAMPLE OPTIONS...: in the background, fill the caches of Inductor and Triton with what a model needs
compile() {
    local example=$1
    shift
    timeout 120 "${base[@]}" --config "examples/$example.yaml" --repeats 1 "$@" "${tiny[@]}" --model.num_layers 2 \
        >"$out/compile_$example.log" 2>&1 &
    compiling[$example]=$!
}

batch() { # MICRO NUMBER LENGTH
    echo "--training.micro_batch_size $1 --training.global_batch_size $(($1 * $2)) --training.seq_length $3"
}

repeats=5
tiny=()
variants=()
for variant in ${VARIANTS:-full_rank crnet low_rank cola}; do
    variants+=(--row "$variant: --model.variant $variant")
done
strategies=(--sweep recompute)
large_zero=2 # without the copy of all gradients, with which full rank would not fit into 80 GB
if $dry; then
    export CUDA_VISIBLE_DEVICES=
    repeats=1
    tiny=(--model.num_layers 2 --model.hidden_size 32 --model.ffn_hidden_size 48 --model.num_attention_heads 2)
    tiny+=(--model.vocab_size 64 --model.rank 8 --training.seq_length 16 --training.micro_batch_size 1)
    tiny+=(--training.global_batch_size 2)
    variants=("${variants[@]:0:4}")
    strategies=(--row 'inverse: --recompute.strategy inverse')
elif [ "$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -n 1)" -gt 100000 ]; then
    large_zero=1
fi
read -ra of_7b <<<"$(batch 1 4 4096)"
read -ra of_7b_whole <<<"$(batch 1 1 4096)"
read -ra of_1b <<<"$(batch 2 4 4096)"
read -ra of_small <<<"$(batch 128 1 256)"

if wanted compile; then
    declare -A compiling
    compile llama2_7b "${of_7b[@]}"
    compile llama2_1b "${of_1b[@]}"
    compile llama2_60m "${of_small[@]}"
    compile llama2_350m "${of_small[@]}"
    for example in "${!compiling[@]}"; do
        if ! wait "${compiling[$example]}"; then
            echo "FAILED compile: $example: $(tail -n 1 "$out/compile_$example.log")"
            failed+=(compile)
        fi
    done
    echo "done   compile: $SECONDS s"
fi

mapfile -t files < <(grep -rl --include='*.py' 'mark\.gpu' tests)
part gpu_tests 120 "$python" -m pytest -m gpu -q -p no:cacheprovider "${files[@]}"
# large updates, so that other gradients would soon be other losses
exact=(--optimizer.lr 0.01 --optimizer.lr_warmup_steps 0 --training.deterministic true --same-bits)
read -ra shape <<<"$(batch 8 2 256)"
measure exactness 60 llama2_60m "${shape[@]}" "${exact[@]}" --row 'none: --recompute.strategy none' \
    --row 'replay: --recompute.strategy replay' --row 'full: --recompute.strategy full' \
    --row 'without a graph: --training.cuda_graphs false'
measure 7b_16_layers 120 llama2_7b "${of_7b[@]}" --model.num_layers 16 \
    --deepspeed.zero_optimization.stage "$large_zero" --alone "${variants[@]}"
measure 1b 120 llama2_1b "${of_1b[@]}" --alone "${variants[@]}" --row 'replay: --recompute.strategy replay'
measure 60m 60 llama2_60m "${of_small[@]}" --alone "${variants[@]}"
measure 7b_replay 90 llama2_7b "${of_7b_whole[@]}" --recompute.strategy replay --alone --row 'adamw:' \
    --row 'adamw8bit: --optimizer.name adamw8bit'
measure 350m 80 llama2_350m "${of_small[@]}" --alone "${variants[@]}"
measure 1b_strategies 120 llama2_1b "${of_1b[@]}" --alone "${strategies[@]}"

part report 60 "$python" -m megatron_crnet report "$out"/*.json -o "$out/report.html"
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}; the logs are in $out"
    exit 1
fi
echo "all figures: $out/table.md"
