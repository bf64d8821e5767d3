"""Documents of packed samples: where they begin and end, and what the datasets and loaders say of them."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_crnet.config.schema import RecomputeConfig
from megatron_crnet.data.documents import DOCUMENT_LENGTHS, document_lengths, documents_of, to_device
from megatron_crnet.data.loader import global_batches
from megatron_crnet.utils.errors import ConfigError, DataError
from tests.helpers import make_batch, positions_within, tiny_config
from tests.unit.data_helpers import SEQ, build, random_documents, write_indexed

EOD = 1
ALL = {"reset_attention_mask": True, "reset_position_ids": True, "eod_mask_loss": True}

pytestmark = pytest.mark.fault("documents")

LENGTHS = {
    "ends and a cut document": ([5, 6, 1, 7, 1, 8, 9], [3, 2, 2]),
    "begins in the middle of one, ends with one": ([5, 1, 6, 1], [2, 2]),
    "no end": ([5, 6, 7], [3]),
    "one end, the last token": ([5, 6, 1], [3]),
    "an end at position 0": ([1, 5, 6], [1, 2]),
    "ends in a row are documents of one token": ([5, 1, 1, 1, 6], [2, 1, 1, 1]),
    "nothing but ends": ([1, 1, 1], [1, 1, 1]),
    "one token": ([5], [1]),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_a_document_ends_with_eod_or_where_the_sample_is_cut(name: str) -> None:
    tokens, expected = LENGTHS[name]
    lengths = document_lengths(torch.tensor(tokens), EOD)
    assert lengths.tolist() == expected
    assert positions_within(lengths).tolist() == [i for length in expected for i in range(length)]


def with_ends(folder: Path) -> str:
    """Documents that end with EOD, some of that token alone."""
    documents = [[*(token for token in d if token != EOD), EOD] for d in random_documents(60, 128, seed=3, longest=12)]
    return write_indexed(folder / "corpus", [*documents, [EOD], [EOD]])


def test_samples_say_what_megatron_core_means_by_its_three_fields(tmp_path: Path) -> None:
    prefix = with_ends(tmp_path)
    plain = build(40, data_path=[prefix], split="1,0,0").train
    train = build(40, data_path=[prefix], split="1,0,0", **ALL).train
    several = 0
    for i in range(40):
        sample, before = train[i], plain[i]
        assert DOCUMENT_LENGTHS not in before
        assert torch.equal(sample["tokens"], before["tokens"])
        assert torch.equal(sample["labels"], before["labels"])
        lengths = sample[DOCUMENT_LENGTHS]
        several += len(lengths) > 1
        assert int(lengths.sum()) == SEQ
        # Megatron-Core's own positions and loss mask
        assert torch.equal(sample["position_ids"], positions_within(lengths))
        assert torch.equal(sample["loss_mask"], (sample["tokens"] != EOD).float())
    assert several > 20


def test_blends_epochs_and_validation_have_documents_like_training(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    prefixes = [with_ends(folder) for folder in folders]
    built = build(200, 20, data_path=[0.7, prefixes[0], 0.3, prefixes[1]], split="80,20,0", **ALL)
    for dataset, count in ((built.train, 200), (built.valid, 20)):  # both go over their documents several times
        for i in (*range(count), len(dataset) - 1):
            sample = dataset[i]
            assert sample[DOCUMENT_LENGTHS].tolist() == document_lengths(sample["tokens"], EOD).tolist()
            assert torch.equal(sample["position_ids"], positions_within(sample[DOCUMENT_LENGTHS]))


def test_each_field_has_its_own_effect(tmp_path: Path) -> None:
    prefix = with_ends(tmp_path)
    masked = build(1, data_path=[prefix], split="1,0,0", reset_attention_mask=True).train[0]
    assert masked["position_ids"].tolist() == list(range(SEQ))
    assert masked["loss_mask"].min() == 1
    assert DOCUMENT_LENGTHS in masked
    untrained = build(1, data_path=[prefix], split="1,0,0", eod_mask_loss=True).train[0]
    assert untrained["position_ids"].tolist() == list(range(SEQ))
    assert DOCUMENT_LENGTHS not in untrained
    assert untrained["loss_mask"].tolist() == (untrained["tokens"] != EOD).float().tolist()


def test_the_lengths_of_a_micro_batch_are_joined_and_stay_on_the_host(tmp_path: Path) -> None:
    train = build(8, data_path=[with_ends(tmp_path)], split="1,0,0", **ALL).train
    (batches,) = global_batches(
        train,
        first_sample=0,
        global_batch_size=8,
        micro_batch_size=4,
        dp_rank=0,
        dp_size=1,
        num_workers=0,
        num_steps=1,
    )
    assert len(batches) == 2
    for number, batch in enumerate(batches):
        expected = torch.cat([train[4 * number + i][DOCUMENT_LENGTHS] for i in range(4)])
        assert torch.equal(batch[DOCUMENT_LENGTHS], expected)
        moved = to_device(batch, torch.device("meta"))
        assert moved["tokens"].device.type == "meta"
        assert moved[DOCUMENT_LENGTHS].device.type == "cpu"
        documents = documents_of(batch)
        assert documents is not None
        assert [n for row in documents.rows for n in row] == expected.tolist()
        assert all(sum(row) == SEQ for row in documents.rows)
        assert documents.offsets.tolist() == [0, *expected.cumsum(0).tolist()]
        x = torch.randn(SEQ, 4, 3, 2)
        assert torch.equal(documents.join(documents.split(x)), x)


def test_rows_of_one_document_each_take_the_plain_path() -> None:
    tokens = torch.full((2, SEQ), 5)
    batch = make_batch(tokens, tokens, data=tiny_config(data=ALL).data)
    assert batch[DOCUMENT_LENGTHS].tolist() == [SEQ, SEQ]
    assert documents_of(batch) is None
    assert documents_of(make_batch(tokens, tokens)) is None


def test_data_without_ends_is_refused_where_they_are_needed(tmp_path: Path) -> None:
    documents = [[token for token in d if token != EOD] for d in random_documents(50, 128, seed=3)]
    prefix = write_indexed(tmp_path / "endless", [d for d in documents if d])
    build(2, data_path=[prefix], split="1,0,0")
    for name in ("reset_attention_mask", "eod_mask_loss"):
        with pytest.raises(DataError, match="do not end with the tokenizer's end-of-document token 1"):
            build(2, data_path=[prefix], split="1,0,0", **{name: True})


REFUSED = {
    "padded rows": ({"sample_format": "padded", "eod_mask_loss": True}, "data.sample_format is padded"),
    "positions alone": ({"reset_position_ids": True}, "set both or neither"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused(name: str) -> None:
    data, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        tiny_config(data=data)


def test_buffers_for_every_length_of_a_document_are_refused() -> None:
    stored = {"partition_activations": True, "contiguous_memory_optimization": True, "number_checkpoints": 2}
    plain = tiny_config(parallel={"tensor_model_parallel_size": 2, "sequence_parallel": False}, data=ALL)
    options = {"deepspeed": {"activation_checkpointing": stored}}
    dataclasses.replace(plain, recompute=RecomputeConfig(strategy="replay"), **options)
    with pytest.raises(ConfigError, match="every length that a document can have"):
        dataclasses.replace(plain, recompute=RecomputeConfig(strategy="replay", keep_attention_output=True), **options)


def attention_of(document: list[Tensor]) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(*document, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("says_grouped", [True, False], ids=["torch 2.13", "torch 2.11"])
def test_the_kernel_of_variable_length_is_called_with_rows_end_to_end(
    says_grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs on CUDA alone, with the kernel's definition in its place: shapes, order and offsets."""
    from megatron_crnet.config.megatron import build_transformer_config
    from megatron_crnet.model import attention

    def varlen(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, same: Tensor, *longest: int, **options: Any) -> Tensor:
        assert offsets is same
        bounds = offsets.tolist()
        assert longest == (max(b - a for a, b in pairwise(bounds)),) * 2
        assert options == {"window_size": (-1, 0), **({"enable_gqa": True} if says_grouped else {})}
        documents = [[x[a:b].transpose(0, 1)[None] for x in (q, k, v)] for a, b in pairwise(bounds)]
        return torch.cat([attention_of(document)[0].transpose(0, 1) for document in documents])

    core = attention.SDPACoreAttention(build_transformer_config(tiny_config()), 1)
    tokens = torch.tensor([[5, 0, 5, 5, 0, 0], [5, 5, 5, 5, 5, 5], [0, 5, 5, 5, 5, 0]])
    data = tiny_config(data=ALL).data
    torch.manual_seed(0)
    query, key, value = torch.randn(6, 3, 4, 8), torch.randn(6, 3, 2, 8), torch.randn(6, 3, 2, 8)
    documents = documents_of(make_batch(tokens, tokens, data=data))
    assert documents is not None
    plain = core(query, key, value, documents=documents)
    monkeypatch.setattr(attention, "varlen_attn", varlen)
    monkeypatch.setattr(attention, "SAYS_GROUPED", says_grouped)
    monkeypatch.setattr(attention.SDPACoreAttention, "_has_kernel", lambda self, query: True)
    torch.testing.assert_close(core(query, key, value, documents=documents), plain)


@pytest.mark.gpu
def test_the_kernel_gives_what_single_calls_give() -> None:
    from megatron_crnet.config.megatron import build_transformer_config
    from megatron_crnet.model import attention

    core = attention.SDPACoreAttention(build_transformer_config(tiny_config(training={"dtype": "bf16"})), 1).cuda()
    tokens = torch.randint(0, 8, (3, 256)).cuda()
    batch = make_batch(tokens.cpu(), tokens.cpu(), data=tiny_config(data=ALL).data)
    documents = documents_of(to_device(batch, torch.device("cuda")))
    assert documents is not None
    shapes = ((256, 3, 4, 64), (256, 3, 2, 64), (256, 3, 2, 64))
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    gradients = []
    for has_kernel in (False, True):
        core._has_kernel = lambda query, has=has_kernel: has  # type: ignore[method-assign]
        out = core(*inputs, documents=documents)
        gradients.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=2e-2, atol=2e-2)
