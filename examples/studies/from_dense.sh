#!/usr/bin/env bash
# The dense models that from_dense.yaml goes on from, of half its budget each, and what crnet init makes of them; the
# ranks in methods_rates.yaml and methods.yaml are chosen by the first. From the root of the repository.
set -eu
for seed in 1234 1 2; do
    crnet train --config examples/quickstart.yaml --model.variant full_rank --model.hidden_size 128 --model.ffn_hidden_size 344 \
        --optimizer.lr 6e-3 --optimizer.lr_warmup_steps 8 --training.train_steps 73 --training.eval_interval 0 --training.eval_steps 64 \
        --training.seed "$seed" --logging.output_dir "runs/from_dense/dense_$seed"
    crnet init "runs/from_dense/dense_$seed" "runs/from_dense/crnet_$seed/checkpoints" --model.rank 32 --prefix data/quickstart/train
done
crnet ranks runs/from_dense/dense_1234 --like-rank 32 --prefix data/quickstart/train --output runs/from_dense/ranks.yaml
