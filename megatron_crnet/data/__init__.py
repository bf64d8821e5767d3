"""Text to ids to micro-batches.

In: Text, JSON lines, Parquet; a tokenizer.
Out: `.bin`/`.idx` files; samples and micro-batches with the documents in them.
May import: config, utils.
Start with preprocess.py for the way in, datasets.py for the way out.
"""
