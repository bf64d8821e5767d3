"""Training data: Megatron-Core's datasets for a configuration.

Call `build_datasets` once on every rank, then `loader.global_batches` for each split.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_crnet.config.schema import Config
from megatron_crnet.data.fingerprint import check_tokenizer_of_data, digest_of_blend
from megatron_crnet.data.index_cache import DatasetBuilder, DatasetConfig, PackedDataset
from megatron_crnet.data.indexed import (
    SPLITS,
    WHOLE,
    Blend,
    IdRange,
    IndexedFiles,
    blends_of,
    check_ends,
    check_enough,
    check_index,
    check_token_ids,
    read_index,
)
from megatron_crnet.data.padded_dataset import PaddedDocumentDataset
from megatron_crnet.data.tokenizer import Tokenizer, check_vocabulary
from megatron_crnet.utils.errors import ConfigError

NOT_WANTED = {
    "train": "",
    "valid": ", or validate nothing with training.eval_steps 0",
    "test": ", or test nothing with training.test_steps 0",
}
"""How a run does without a split."""


@dataclass(frozen=True)
class Datasets:
    """One map-style dataset per split, None if no sample was asked for.

    A sample is a dict with int64 `tokens`, `labels`, `position_ids` [s] and float32 `loss_mask` [s]; with
    data.reset_attention_mask also `document_lengths`; samples of a blend also have `dataset_id`.
    """

    train: Any
    valid: Any
    test: Any


def build_datasets(
    config: Config,
    tokenizer: Tokenizer,
    num_train_samples: int,
    num_valid_samples: int,
    num_test_samples: int = 0,
    known_ids: Mapping[str, IdRange] | None = None,
    checked: Callable[[Callable[[], DatasetConfig]], DatasetConfig] = lambda check: check(),
) -> Datasets:
    """Build datasets of at least the given numbers of samples, over several epochs if need be.

    With torch.distributed, every rank calls this; rank 0 writes the index caches, the others read them. Everything is
    checked before, so that no rank fails while another builds.

    Args:
        known_ids: `id_range` of prefixes whose files have been checked already.
        checked: runs the checks of files and folders; where ranks may see others, `run_on_all_ranks`.

    Raises:
        ConfigError: the data section contradicts itself, or the vocabulary does not fit the model.
        DataError: files missing, damaged, made with another tokenizer, or too small for one sample.
    """
    check_vocabulary(tokenizer, config.model.vocab_size)
    sizes = dict(zip(SPLITS, (num_train_samples, num_valid_samples, num_test_samples), strict=True))
    blends = blends_of(config.data)
    for split, size in sizes.items():
        if size and split not in blends:
            raise ConfigError(
                f"{size} {split} samples are wanted, but the data section gives the {split} split nothing: "
                f"{'raise its part of data.split or ' if config.data.data_path else ''}set data.{split}_data_path"
                f"{NOT_WANTED[split]}"
            )
    # A split without samples is not built: one without documents would send Megatron-Core into an endless loop.
    blends = {split: blend for split, blend in blends.items() if sizes[split]}
    if not blends:
        return Datasets(None, None, None)

    def check() -> DatasetConfig:
        return _dataset_config(config, tokenizer, blends, _checked_files(config, tokenizer, blends, known_ids or {}))

    builder = DatasetBuilder(
        PaddedDocumentDataset if config.data.sample_format == "padded" else PackedDataset,
        list(sizes.values()),
        lambda: True,
        checked(check),
    )
    with warnings.catch_warnings():
        # A tokenizer without padding gives eod for it, which Megatron-Core would not mask. Neither do the two classes.
        warnings.filterwarnings("ignore", message="The pad token id")
        return Datasets(*builder.build())


def _checked_files(
    config: Config, tokenizer: Tokenizer, blends: dict[str, Blend], known_ids: Mapping[str, IdRange]
) -> dict[str, IndexedFiles]:
    """All .bin/.idx pairs by prefix, after every check."""
    prefixes = dict.fromkeys(prefix for blend in blends.values() for prefix in blend.prefixes)
    files = {prefix: read_index(prefix) for prefix in prefixes}
    for prefix, pair in files.items():
        if prefix not in known_ids:
            check_index(pair)
        check_token_ids(pair, tokenizer, known_ids.get(prefix))
        check_tokenizer_of_data(prefix, tokenizer)
        if config.data.reset_attention_mask or config.data.eod_mask_loss:
            check_ends(pair, tokenizer.eod)
    for split, blend in blends.items():
        for prefix in blend.prefixes:
            check_enough(files[prefix], split, blend.share, config)
    return files


def _dataset_config(
    config: Config, tokenizer: Tokenizer, blends: dict[str, Blend], files: dict[str, IndexedFiles]
) -> DatasetConfig:
    data, found = config.data, [blends.get(split) for split in SPLITS]
    weighted = [(blend.prefixes, _weights(blend, files, data.sample_format)) if blend else None for blend in found]
    together = bool(data.data_path)
    dataset_config = DatasetConfig(
        random_seed=config.training.seed,
        sequence_length=config.training.seq_length,
        blend=next(filter(None, weighted)) if together else None,
        blend_per_split=None if together else weighted,
        split=data.split if together else None,
        index_folder=_cache_folder(config, files),
        tokenizer=tokenizer,
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
        eod_mask_loss=data.eod_mask_loss,
        create_attention_mask=False,
    )
    if together:
        dataset_config.split_matrix = [blend.share if blend else None for blend in found]
    return dataset_config


def _weights(blend: Blend, files: dict[str, IndexedFiles], sample_format: str) -> list[float] | None:
    """The weights of a blend; by size if none are given, so that each document is seen equally often.

    Megatron-Core itself draws from an unweighted blend for one epoch and then stops.
    """
    if blend.weights is not None or len(blend.prefixes) == 1:
        return blend.weights
    pairs = [files[prefix] for prefix in blend.prefixes]
    return [float(pair.documents if sample_format == "padded" else pair.tokens_in(WHOLE)) for pair in pairs]


def _cache_folder(config: Config, files: dict[str, IndexedFiles]) -> str:
    """The folder of the index caches, named after the contents of the files.

    Megatron-Core names a cache by the path of the data: data that is preprocessed again under the same prefix would be
    read through the old index.
    """
    folder = cache_root(config, next(iter(files))) / digest_of_blend(sorted(files), None)[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        writable = False
    if not writable:
        raise ConfigError(f"data.cache_path {folder} cannot be written: set data.cache_path to a folder that can")
    return str(folder)


def cache_root(config: Config, first: str) -> Path:
    """The folder of all caches of data: `data.cache_path`, or beside the prefix `first`."""
    return Path(config.data.cache_path) if config.data.cache_path else Path(first).parent / "cache"


def data_fingerprint(config: Config) -> dict[str, str]:
    """A digest of the data of each split that `config` names; paths do not count, order and weights do.

    Raises:
        ConfigError, DataError: the data section contradicts itself; a file is missing or damaged.
    """
    found = {}
    for split, blend in blends_of(config.data).items():
        for prefix in blend.prefixes:
            read_index(prefix)
        found[split] = digest_of_blend(blend.prefixes, blend.weights)
    return found
