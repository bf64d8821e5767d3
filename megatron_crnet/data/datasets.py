"""Training data: Megatron-Core's datasets for a configuration.

Order of use: `build_datasets` once on every rank, then `global_batches` for each split.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

from megatron_crnet.config.schema import Config
from megatron_crnet.data.fingerprint import check_tokenizer_of_data, digest_of_blend
from megatron_crnet.data.index_cache import DatasetBuilder, PackedDataset
from megatron_crnet.data.indexed import (
    SPLITS,
    Blend,
    IdRange,
    IndexedFiles,
    Source,
    check_cache_folder,
    check_ends,
    check_enough,
    check_index,
    check_token_ids,
    read_index,
    sources_of,
)
from megatron_crnet.data.padded_dataset import PaddedDocumentDataset
from megatron_crnet.data.tokenizer import Tokenizer, check_vocabulary
from megatron_crnet.utils.errors import ConfigError


@dataclass(frozen=True)
class Datasets:
    """One map-style dataset a split, None where no sample was asked for.

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
) -> Datasets:
    """Build the datasets of a run: at least the given number of samples each, over several epochs if need be.

    With torch.distributed, every rank calls this; rank 0 writes the index caches, the others read them.
    Everything is checked before, and in the same way on every rank, so a mistake in the configuration raises
    everywhere and no rank waits for another.

    Args:
        known_ids: `id_range` of prefixes whose files have been looked through already.

    Raises:
        ConfigError: the data section contradicts itself, or the vocabulary does not fit the model.
        DataError: files missing, damaged, made with another tokenizer, or too small for one sample.
    """
    check_vocabulary(tokenizer, config.model.vocab_size)
    sizes = dict(zip(SPLITS, (num_train_samples, num_valid_samples, num_test_samples), strict=True))
    sources = _wanted(sources_of(config.data), sizes)
    if not sources:
        return Datasets(None, None, None)
    files = _checked_files(config, tokenizer, sources, known_ids or {})
    builder = DatasetBuilder(
        PaddedDocumentDataset if config.data.sample_format == "padded" else PackedDataset,
        list(sizes.values()),
        lambda: True,
        _dataset_config(config, tokenizer, sources, files),
    )
    with warnings.catch_warnings():
        # A tokenizer without padding gives eod for it, which Megatron-Core would not mask. Neither do the two classes.
        warnings.filterwarnings("ignore", message="The pad token id")
        return Datasets(*builder.build())


def _wanted(sources: dict[str, Source], sizes: dict[str, int]) -> dict[str, Source]:
    """The sources of the splits that samples are asked of; each must have one."""
    for split, size in sizes.items():
        if size and split not in sources:
            raise ConfigError(
                f"{size} {split} samples are wanted, but the data section gives the {split} split nothing: "
                f"raise its part of data.split or set data.{split}_data_path"
            )
    return {split: source for split, source in sources.items() if sizes[split]}


def _checked_files(
    config: Config, tokenizer: Tokenizer, sources: dict[str, Source], known_ids: Mapping[str, IdRange]
) -> dict[str, IndexedFiles]:
    """All .bin/.idx pairs by prefix, after every check."""
    prefixes = dict.fromkeys(prefix for source in sources.values() for prefix in source.blend.prefixes)
    files = {prefix: read_index(prefix) for prefix in prefixes}
    for pair in files.values():
        if pair.prefix not in known_ids:
            check_index(pair)
        check_token_ids(pair, tokenizer, known_ids.get(pair.prefix))
        check_tokenizer_of_data(pair.prefix, tokenizer)
        if config.data.reset_attention_mask or config.data.eod_mask_loss:
            check_ends(pair, tokenizer.eod)
    for split, source in sources.items():
        for prefix in source.blend.prefixes:
            check_enough(files[prefix], split, source.share, config)
    return files


def _dataset_config(
    config: Config, tokenizer: Tokenizer, sources: dict[str, Source], files: dict[str, IndexedFiles]
) -> GPTDatasetConfig:
    blends = [
        (blend.prefixes, _weights(blend, files, config.data.sample_format))
        if (blend := sources[split].blend if split in sources else None)
        else None
        for split in SPLITS
    ]
    together = bool(config.data.data_path)
    dataset_config = GPTDatasetConfig(
        random_seed=config.training.seed,
        sequence_length=config.training.seq_length,
        blend=next(filter(None, blends)) if together else None,
        blend_per_split=None if together else blends,
        split=config.data.split if together else None,
        path_to_cache=_cache_folder(config, files),
        tokenizer=tokenizer,
        reset_position_ids=config.data.reset_position_ids,
        reset_attention_mask=config.data.reset_attention_mask,
        eod_mask_loss=config.data.eod_mask_loss,
        create_attention_mask=False,
    )
    if together:
        # A split without samples is not built: one without documents would send Megatron-Core into an endless loop.
        dataset_config.split_matrix = [sources[split].share if split in sources else None for split in SPLITS]
    return dataset_config


def _weights(blend: Blend, files: dict[str, IndexedFiles], sample_format: str) -> list[float] | None:
    """The weights of a blend; by size where none are given, so that each document is seen equally often.

    Left to itself Megatron-Core draws from an unweighted blend for one epoch and then stops.
    """
    if blend.weights is not None or len(blend.prefixes) == 1:
        return blend.weights
    everything = (0.0, 1.0)
    if sample_format == "padded":
        return [float(files[prefix].documents) for prefix in blend.prefixes]
    return [float(files[prefix].tokens_in(everything)) for prefix in blend.prefixes]


def _cache_folder(config: Config, files: dict[str, IndexedFiles]) -> str:
    """Where the index caches go: a folder named after the contents of the files.

    Megatron-Core names a cache by the path of the data, not by its content: data that is preprocessed again
    under the same prefix would be read through the old index.
    """
    folder = cache_root(config, next(iter(files))) / digest_of_blend(sorted(files), None)[:16]
    check_cache_folder(folder)
    return str(folder)


def cache_root(config: Config, first: str) -> Path:
    """The folder of everything that is kept of data, by content.

    Args:
        first: the prefix beside which it lies unless `data.cache_path` is set.
    """
    return Path(config.data.cache_path) if config.data.cache_path else Path(first).parent / "cache"


def data_fingerprint(config: Config) -> dict[str, str]:
    """A digest of the data of each split that `config` names, by its name; paths do not count, order and weights do.

    Raises:
        ConfigError, DataError: the data section contradicts itself; a file is missing or damaged.
    """
    found = {}
    for split, source in sources_of(config.data).items():
        for prefix in source.blend.prefixes:
            read_index(prefix)
        found[split] = digest_of_blend(source.blend.prefixes, source.blend.weights)
    return found
