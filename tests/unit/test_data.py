"""Training data: samples, splits, blends, layouts, caches, entropy, and what is refused before anything is built."""

from __future__ import annotations

import itertools
import multiprocessing
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_crnet.data import Datasets, build_datasets
from megatron_crnet.data_checks import SCAN_BYTES, parse_blend, parse_split, read_index
from megatron_crnet.data_loading import global_batches
from megatron_crnet.errors import ConfigError, DataError
from megatron_crnet.unigram import unigram_entropy
from tests.unit.data_helpers import PlainTokenizer, data_config, random_documents, write_indexed

VOCAB, SEQ = 128, 16


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    return random_documents(200, VOCAB, seed=1)


@pytest.fixture
def prefix(tmp_path: Path, documents: list[list[int]]) -> str:
    return write_indexed(tmp_path / "data", documents)


def build(train: int, valid: int = 0, test: int = 0, *, tokenizer: Any = None, seed: int = 1234, **data: Any) -> Datasets:
    config = data_config(vocab_size=VOCAB, seq_length=SEQ, seed=seed, **data)
    return build_datasets(config, tokenizer or PlainTokenizer(VOCAB), train, valid, test)


def windows(documents: list[list[int]]) -> set[tuple[int, ...]]:
    """All runs of s + 1 ids inside documents; seeds make them unlike between corpora."""
    return {tuple(d[i : i + SEQ + 1]) for d in documents for i in range(len(d) - SEQ)}


def whole(sample: dict[str, Tensor]) -> list[int]:
    return [*sample["tokens"].tolist(), int(sample["labels"][-1])]


@pytest.mark.parametrize("sample_format", ["packed", "padded"])
def test_sample_layout(prefix: str, sample_format: str) -> None:
    train = build(50, data_path=[prefix], split="1,0,0", sample_format=sample_format).train
    for sample in (train[0], train[len(train) - 1]):
        for key in ("tokens", "labels", "position_ids"):
            assert (sample[key].dtype, sample[key].shape) == (torch.int64, (SEQ,))
        assert (sample["loss_mask"].dtype, sample["loss_mask"].shape) == (torch.float32, (SEQ,))
        assert sample["position_ids"].tolist() == list(range(SEQ))
        assert int(sample["labels"].min()) >= 0
        assert sample["tokens"][1:].tolist() == sample["labels"][:-1].tolist()


def test_packed_epoch_uses_every_token_once(prefix: str, documents: list[list[int]]) -> None:
    tokens = sum(map(len, documents))
    train = build((tokens - 1) // SEQ, data_path=[prefix], split="1,0,0").train
    assert len(train) == (tokens - 1) // SEQ
    seen = np.bincount(np.concatenate([train[i]["tokens"] for i in range(len(train))]), minlength=VOCAB)
    missing = np.bincount(np.concatenate(documents), minlength=VOCAB) - seen
    assert missing.min() >= 0
    assert missing.sum() == tokens - len(train) * SEQ


@pytest.mark.parametrize("sample_format", ["packed", "padded"])
def test_splits_share_no_document(prefix: str, documents: list[list[int]], sample_format: str) -> None:
    built = build(300, 50, 20, data_path=[prefix], split="80,15,5", sample_format=sample_format)
    bounds = (0, 160, 190, 200)
    for dataset, first, end in zip((built.train, built.valid, built.test), bounds, bounds[1:], strict=False):
        assert dataset.indices.tolist() == list(range(first, end))
        ids = {tuple(documents[d]) for d in range(first, end)}
        inside = [tuple(whole(dataset[i])) for i in range(20)]
        own = windows([list(d) for d in ids])
        foreign = windows(documents) - own
        assert not foreign.intersection(inside)


def expected_row(document: list[int], pad: int) -> tuple[list[int], list[int], list[float]]:
    text = document[: SEQ + 1]
    filled = text + [pad] * (SEQ + 1 - len(text))
    return filled[:-1], filled[1:], [1.0] * (len(text) - 1) + [0.0] * (SEQ + 1 - len(text))


@pytest.mark.parametrize("pad", [0, 1])
def test_padded_rows(prefix: str, documents: list[list[int]], pad: int) -> None:
    tokenizer = PlainTokenizer(VOCAB, eod=1, pad=pad)
    train = build(200, data_path=[prefix], split="1,0,0", sample_format="padded", tokenizer=tokenizer).train
    rows = [(r["tokens"].tolist(), r["labels"].tolist(), r["loss_mask"].tolist()) for r in map(train.__getitem__, range(200))]
    assert sorted(rows) == sorted(expected_row(document, pad) for document in documents)
    assert {sum(mask) < SEQ for _, _, mask in rows} == {True, False}, "the data must try both cut and padded rows"


def test_padded_epochs_are_shuffled_anew_and_reproducibly(prefix: str) -> None:
    options: dict[str, Any] = {"data_path": [prefix], "split": "1,0,0", "sample_format": "padded"}
    train = build(450, **options).train
    assert len(train) == 600
    rows = [tuple(whole(train[i])) for i in range(600)]
    epochs = [rows[i : i + 200] for i in (0, 200, 400)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    again = build(450, **options).train
    assert [tuple(whole(again[i])) for i in (500, 3, 250)] == [rows[i] for i in (500, 3, 250)]
    other = build(450, seed=5, **options).train
    assert [tuple(whole(other[i])) for i in range(200)] != epochs[0]
    with pytest.raises(IndexError):
        train[600]


def test_more_samples_than_an_epoch(prefix: str, documents: list[list[int]]) -> None:
    epoch = sum(map(len, documents)) // SEQ
    built = build(5 * epoch, 1000, data_path=[prefix], split="90,10,0")
    assert len(built.train) >= 5 * epoch
    assert len(built.valid) >= 1000
    assert built.test is None


@pytest.fixture
def two_prefixes(tmp_path: Path) -> list[str]:
    """Even ids in one, odd ids in the other, which has twice the documents."""
    parts = []
    for i, count in ((0, 100), (1, 200)):
        documents = [[2 * (x // 2) + i for x in d] for d in random_documents(count, VOCAB, seed=i, longest=50)]
        parts.append(write_indexed(tmp_path / f"part{i}", documents))
    return parts


def share_of_odd(dataset: Any, count: int) -> float:
    """Share of samples from the second prefix."""
    return sum(int(dataset[i]["tokens"][0]) % 2 for i in range(count)) / count


@pytest.mark.parametrize("sample_format", ["packed", "padded"])
def test_weighted_blend(two_prefixes: list[str], sample_format: str) -> None:
    blend = ["0.75", two_prefixes[0], "0.25", two_prefixes[1]]
    built = build(1000, 100, data_path=blend, split="80,20,0", sample_format=sample_format)
    assert len(built.train) >= 1000
    assert share_of_odd(built.train, 1000) == pytest.approx(0.25, abs=0.01)
    assert share_of_odd(built.valid, 100) == pytest.approx(0.25, abs=0.03)
    assert share_of_odd(built.train, 40) == pytest.approx(0.25, abs=0.05), "the parts must be mixed from the start"


@pytest.mark.parametrize("sample_format", ["packed", "padded"])
def test_unweighted_blend_follows_the_sizes_over_several_epochs(two_prefixes: list[str], sample_format: str) -> None:
    sizes = [read_index(prefix) for prefix in two_prefixes]
    amounts = [s.documents if sample_format == "padded" else s.tokens_in((0.0, 1.0)) for s in sizes]
    train = build(3000, data_path=two_prefixes, split="1,0,0", sample_format=sample_format).train
    assert len(train) >= 3000
    assert share_of_odd(train, 3000) == pytest.approx(amounts[1] / sum(amounts), abs=0.01)


@pytest.mark.parametrize("sample_format", ["packed", "padded"])
def test_splits_with_files_of_their_own(two_prefixes: list[str], sample_format: str) -> None:
    built = build(100, 50, train_data_path=[two_prefixes[0]], valid_data_path=[two_prefixes[1]], sample_format=sample_format)
    assert share_of_odd(built.train, 100) == 0
    assert share_of_odd(built.valid, 50) == 1
    assert len(built.valid.indices) == 200


def test_a_split_without_samples_is_not_built(prefix: str) -> None:
    built = build(10, data_path=[prefix], split="1000,1,0")  # 0 documents for validation: Megatron-Core would hang
    assert built.valid is None
    assert built.test is None
    assert build(0, 0, data_path=[prefix]) == Datasets(None, None, None)


def entropy(ids: Any) -> float:
    _, counts = np.unique(np.concatenate(ids), return_counts=True)
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum())


def test_unigram_entropy_of_the_validation_documents(prefix: str, documents: list[list[int]]) -> None:
    for sample_format, used in (
        ("packed", documents[140:200]),
        ("padded", [d[1 : SEQ + 1] for d in documents[140:200]]),
    ):
        valid = build(10, 10, data_path=[prefix], split="70,30,0", sample_format=sample_format).valid
        assert unigram_entropy(valid, VOCAB) == pytest.approx(entropy(used), rel=1e-12)
    assert abs(entropy(documents[140:200]) - entropy(documents[:140])) > 1e-3, "the splits must differ to tell them apart"


def test_unigram_entropy_of_a_blend_is_that_of_the_mixture(two_prefixes: list[str]) -> None:
    blend = ["3", two_prefixes[0], "1", two_prefixes[1]]
    valid = build(10, 10, train_data_path=[two_prefixes[0]], valid_data_path=blend).valid
    parts = [build(10, 10, train_data_path=[p], valid_data_path=[p]).valid for p in two_prefixes]
    # the two parts share no id, so the entropy of the mixture is that of the choice plus the mean
    choice = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    expected = choice + 0.75 * unigram_entropy(parts[0], VOCAB) + 0.25 * unigram_entropy(parts[1], VOCAB)
    assert unigram_entropy(valid, VOCAB) == pytest.approx(expected, rel=1e-12)


def test_unigram_entropy_of_a_large_split_is_sampled(tmp_path: Path) -> None:
    documents = random_documents(1000, VOCAB, seed=3, longest=6000)
    prefix = write_indexed(tmp_path / "large", documents)
    valid = build(10, 10, train_data_path=[prefix], valid_data_path=[prefix]).valid
    assert unigram_entropy(valid, VOCAB) == pytest.approx(entropy(documents), rel=1e-12)
    sampled = unigram_entropy(valid, VOCAB, limit_tokens=1 << 20)
    assert sampled == pytest.approx(entropy(documents), rel=1e-3)
    assert sampled != unigram_entropy(valid, VOCAB)


class Numbers(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sample i is the number i, with a key that batches must drop."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        value = torch.full((4,), index)
        return {"tokens": value, "labels": value, "position_ids": value, "loss_mask": torch.ones(4), "other": "x"}


def sample_numbers(step: list[dict[str, Tensor]]) -> list[list[int]]:
    return [batch["tokens"][:, 0].tolist() for batch in step]


def test_micro_batches_are_those_of_the_formula() -> None:
    global_batch, micro, ranks, first = 24, 3, 2, 48
    for rank in range(ranks):
        steps = list(
            global_batches(
                Numbers(150),
                first_sample=first,
                global_batch_size=global_batch,
                micro_batch_size=micro,
                dp_rank=rank,
                dp_size=ranks,
                num_workers=0,
            )
        )
        assert len(steps) == (150 - first) // global_batch
        for k, step in enumerate(steps):
            starts = [first + k * global_batch + (m * ranks + rank) * micro for m in range(4)]
            assert sample_numbers(step) == [list(range(start, start + micro)) for start in starts]
            assert set(step[0]) == {"tokens", "labels", "position_ids", "loss_mask"}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_every_layout_uses_the_same_samples_in_a_step(num_workers: int) -> None:
    for micro, ranks in itertools.product((1, 2, 4), (1, 2, 3)):
        if num_workers and (micro, ranks) != (2, 2):
            continue
        per_rank = [
            list(
                global_batches(
                    Numbers(100),
                    first_sample=24,
                    global_batch_size=12,
                    micro_batch_size=micro,
                    dp_rank=rank,
                    dp_size=ranks,
                    num_workers=num_workers,
                    num_steps=4,
                )
            )
            for rank in range(ranks)
        ]
        for k in range(4):
            used = [n for steps in per_rank for batch in sample_numbers(steps[k]) for n in batch]
            assert sorted(used) == list(range(24 + 12 * k, 24 + 12 * (k + 1)))


def one_rank(dataset: Any, **options: Any) -> Iterator[list[dict[str, Tensor]]]:
    defaults = {"first_sample": 0, "global_batch_size": 4, "micro_batch_size": 2, "num_workers": 0}
    return global_batches(dataset, dp_rank=0, dp_size=1, **{**defaults, **options})


def wait_for_no_children() -> None:
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert multiprocessing.active_children() == []


def test_workers_end_when_exhausted_and_when_dropped() -> None:
    assert [sample_numbers(step) for step in one_rank(Numbers(9), num_workers=2)] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    wait_for_no_children()
    steps = one_rank(Numbers(1000), num_workers=2)
    next(steps)
    assert len(multiprocessing.active_children()) == 2
    del steps
    wait_for_no_children()


def test_reading_leaves_torchs_random_state_alone() -> None:
    before = torch.get_rng_state()
    list(one_rank(Numbers(8)))
    list(one_rank(Numbers(8), num_workers=1))
    assert torch.equal(before, torch.get_rng_state())


def test_batches_refuse_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="use a multiple of 3"):
        one_rank(Numbers(8), micro_batch_size=3)
    with pytest.raises(DataError, match="need 12 samples, but the dataset holds 11"):
        one_rank(Numbers(11), num_steps=3)
    assert list(one_rank(Numbers(8), first_sample=8)) == []


def test_caches_lie_beside_the_data_or_where_asked(prefix: str, tmp_path: Path) -> None:
    build(10, data_path=[prefix], split="1,0,0")
    assert list((tmp_path / "cache").rglob("*-GPTDataset-train-sample_index.npy"))
    build(10, data_path=[prefix], split="1,0,0", cache_path=str(tmp_path / "elsewhere"))
    assert list((tmp_path / "elsewhere").rglob("*-GPTDataset-train-sample_index.npy"))


def test_new_data_under_an_old_name_is_not_read_through_the_old_cache(prefix: str, documents: list[list[int]]) -> None:
    build(10, data_path=[prefix], split="1,0,0")
    write_indexed(Path(prefix), documents[:50])
    train = build(10, data_path=[prefix], split="1,0,0").train
    assert train.document_index.max() < 50


def test_a_half_written_cache_is_made_again(prefix: str) -> None:
    before = build(10, data_path=[prefix], split="1,0,0").train
    expected = [whole(before[i]) for i in range(len(before))]
    caches = sorted(Path(prefix).parent.joinpath("cache").rglob("*.npy"))
    assert len(caches) == 3
    for cache in caches:
        cache.write_bytes(cache.read_bytes()[:-8])
    after = build(10, data_path=[prefix], split="1,0,0").train
    assert [whole(after[i]) for i in range(len(after))] == expected


def break_file(path: str, how: str) -> None:
    content = Path(path).read_bytes()
    if how == "missing":
        Path(path).unlink()
    else:
        changed = {"cut": content[:-2], "longer": content + b"\0\0", "empty": b"", "garbage": b"x" * len(content)}
        Path(path).write_bytes(changed[how])


@pytest.mark.parametrize(
    ("suffix", "how", "message"),
    [
        ("bin", "missing", r"data\.bin does not exist"),
        ("idx", "missing", r"data\.idx does not exist"),
        ("bin", "cut", r"data\.bin has \d+ bytes, but its index describes"),
        ("bin", "longer", r"data\.bin has \d+ bytes, but its index describes"),
        ("bin", "empty", r"data\.bin has 0 bytes, but its index describes"),
        ("idx", "cut", r"data\.idx has \d+ bytes, but its 200 documents need"),
        ("idx", "longer", r"data\.idx has \d+ bytes, but its 200 documents need"),
        ("idx", "empty", r"data\.idx is not a Megatron index"),
        ("idx", "garbage", r"data\.idx is not a Megatron index"),
    ],
)
def test_broken_files(prefix: str, suffix: str, how: str, message: str) -> None:
    break_file(f"{prefix}.{suffix}", how)
    with pytest.raises(DataError, match=message) as caught:
        build(10, data_path=[prefix])
    assert "\n" not in str(caught.value)


def test_index_of_another_run_or_another_kind(prefix: str, tmp_path: Path) -> None:
    other = write_indexed(tmp_path / "other", random_documents(200, VOCAB, seed=9))
    shutil.copy(f"{other}.idx", f"{prefix}.idx")
    with pytest.raises(DataError, match="of another run"):
        read_index(prefix)
    content = bytearray(Path(f"{other}.idx").read_bytes())
    for position, value in ((9, 2), (17, 6), (17, 99)):  # version 2, float64, no such dtype
        changed = bytes([*content[:position], value, *content[position + 1 :]])
        Path(f"{other}.idx").write_bytes(changed)
        with pytest.raises(DataError, match="not a Megatron index"):
            read_index(other)


def test_index_without_documents(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no document"):
        read_index(write_indexed(tmp_path / "none", []))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("where", [0, 199])
def test_ids_beyond_the_tokenizer(tmp_path: Path, documents: list[list[int]], dtype: Any, where: int) -> None:
    changed = [list(document) for document in documents]
    changed[where][0] = VOCAB
    prefix = write_indexed(tmp_path / "data", changed, dtype)
    with pytest.raises(DataError, match=f"token id {VOCAB}, but the tokenizer has the ids 0 to {VOCAB - 1}"):
        build(10, data_path=[prefix])


def test_ids_are_searched_in_a_part_of_a_large_file(tmp_path: Path) -> None:
    count = SCAN_BYTES // 2 + 1000
    prefix = write_indexed(tmp_path / "large", [np.full(count, 5), np.full(10, 6)])  # type: ignore[list-item]
    assert len(build(10, data_path=[prefix], split="1,0,0").train) >= 10
    ids = np.memmap(f"{prefix}.bin", dtype=np.uint16, mode="r+")
    ids[count // 2 :] = VOCAB
    ids.flush()
    with pytest.raises(DataError, match=f"token id {VOCAB}"):
        build(10, data_path=[prefix], split="1,0,0")


def test_negative_ids(tmp_path: Path) -> None:
    prefix = write_indexed(tmp_path / "data", [[5, -1, 7] * 10], np.int32)
    with pytest.raises(DataError, match="token id -1"):
        build(10, data_path=[prefix])


def test_model_smaller_than_the_tokenizer(prefix: str) -> None:
    with pytest.raises(ConfigError, match=r"set model\.vocab_size to 256"):
        build(10, data_path=[prefix], tokenizer=PlainTokenizer(VOCAB + 1))


def test_split_too_small_for_a_sample(tmp_path: Path) -> None:
    prefix = write_indexed(tmp_path / "data", [[5] * 8, [6] * SEQ])
    with pytest.raises(DataError, match=f"train split of .* has 8 tokens in 1 documents, but one sample needs {SEQ + 1}"):
        build(10, data_path=[prefix], split="1,1,0")
    with pytest.raises(DataError, match="valid split of .* has 0 tokens in 0 documents"):
        build(10, 10, data_path=[prefix], split="99,1,0", sample_format="padded")
    assert len(build(10, data_path=[prefix], split="1,0,0").train) >= 10


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, r"data\.data_path is empty"),
        ({"data_path": ["a"], "valid_data_path": ["b"]}, r"data\.data_path and data\.valid_data_path are both set"),
        ({"train_data_path": ["a"]}, r"10 valid samples are wanted, .* set data\.valid_data_path"),
        ({"data_path": ["a"], "split": "1,0,0"}, r"10 valid samples are wanted"),
        ({"data_path": ["0.5", "a", "b"]}, "mixes weights and prefixes"),
        ({"data_path": ["0.5", "a", "b", "c"]}, "mixes weights and prefixes"),
        ({"data_path": ["0", "a", "1", "b"]}, "weight 0, but weights are positive"),
        ({"data_path": ["nan", "a", "1", "b"]}, "weight nan, but weights are positive"),
        ({"data_path": ["-1", "a", "1", "b"]}, "weight -1, but weights are positive"),
        ({"data_path": ["a"], "split": "0,0,0"}, r"data\.split is '0,0,0'"),
        ({"data_path": ["a"], "split": "90,10,1,1"}, r"data\.split"),
        ({"data_path": ["a"], "split": "90,-1,1"}, r"data\.split"),
        ({"data_path": ["a"], "split": "9e1,1,1"}, r"data\.split"),
        ({"data_path": ["a"], "split": "most"}, r"data\.split"),
    ],
)
def test_contradictory_data_sections(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build(10, 10, **data)
    assert "\n" not in str(caught.value)


def test_blend_and_split_are_read_as_written() -> None:
    assert parse_blend(["a", "b", "c"], "k").prefixes == ["a", "b", "c"]
    assert parse_blend(["a", "b"], "k").weights is None
    assert parse_blend(["30", "a", "70", "b"], "k").weights == [30.0, 70.0]
    assert parse_blend(["1.0", "a"], "k").prefixes == ["a"]
    assert parse_split("3, 1") == [(0, 0.75), (0.75, 1.0), None]


def test_cache_folder_that_cannot_be_written(prefix: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"set data\.cache_path"):
        build(10, data_path=[prefix], split="1,0,0", cache_path=str(tmp_path / "file"))


RANK_PROGRAM = """
import sys
import torch.distributed as dist
from tests.unit.test_data import build, whole
rank, store, cache, prefixes = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
for data in ([prefixes[0]], prefixes, ["1", prefixes[0], "3", prefixes[1]]):
    built = build(100, 20, data_path=data, split="80,20,0", cache_path=cache)
    print(*(x for dataset in (built.train, built.valid) for i in range(20) for x in whole(dataset[i])), flush=True)
dist.destroy_process_group()
"""


def test_two_ranks_read_the_same_samples_as_one_process(two_prefixes: list[str], tmp_path: Path) -> None:
    arguments = [str(tmp_path / "store"), str(tmp_path / "shared cache"), *two_prefixes]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", RANK_PROGRAM, str(rank), *arguments], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    expected = []
    for data in ([two_prefixes[0]], two_prefixes, ["1", two_prefixes[0], "3", two_prefixes[1]]):
        built = build(100, 20, data_path=data, split="80,20,0")
        ids = [x for dataset in (built.train, built.valid) for i in range(20) for x in whole(dataset[i])]
        expected.append(" ".join(map(str, ids)))
    assert [output.splitlines() for output in outputs] == [expected, expected]
    assert list((tmp_path / "shared cache").rglob("*-BlendedDataset-train-dataset_index.npy"))
