"""What a run was trained on: digests of token files and tokenizers, and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_crnet.data.datasets import build_datasets
from megatron_crnet.data.fingerprint import (
    WHOLE_BYTES,
    TrainedOn,
    check_tokenizer_of_data,
    digest_of_blend,
    digest_of_prefix,
    digest_of_tokenizer,
    remark_on_unnamed,
    sidecar,
    tokenizer_of_data,
)
from megatron_crnet.data.preprocess import preprocess
from megatron_crnet.data.tokenizer import Tokenizer, load_tokenizer
from megatron_crnet.data.train_tokenizer import train_sentencepiece
from megatron_crnet.hf.evaluate import indexed_documents
from megatron_crnet.utils.errors import ConfigError, DataError
from tests.unit.data_helpers import data_config, library_texts, train_small_tokenizer, write_indexed, write_jsonl


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files `a`, made with the tokenizer small.model; other.model has the same size."""
    folder = tmp_path_factory.mktemp("fingerprint")
    small = train_small_tokenizer(folder)
    train_sentencepiece(library_texts(40)[25:], folder / "other", 600, sample_bytes=100_000)
    preprocess([write_jsonl(folder / "a.jsonl", library_texts(20))], folder / "a", "sentencepiece", small, workers=0)
    return folder


def tokenizers(folder: Path) -> tuple[Tokenizer, Tokenizer]:
    small, other = (load_tokenizer("sentencepiece", str(folder / f"{name}.model")) for name in ("small", "other"))
    assert small.vocab_size == other.vocab_size == 600
    return small, other


@pytest.mark.fault("L6")
def test_preprocessing_says_beside_the_data_which_tokenizer_made_it(folder: Path) -> None:
    small, _ = tokenizers(folder)
    assert tokenizer_of_data(str(folder / "a")) == digest_of_tokenizer(small)
    about = json.loads(sidecar(folder / "a").read_text())
    assert about["tokenizer"] == {"class": "sentencepiece", "sha256": digest_of_tokenizer(small)} | {
        "vocab_size": 600,
        "eod": small.eod,
    }
    assert about["append_eod"] is True


@pytest.mark.fault("L6")
def test_data_of_another_tokenizer_of_the_same_size_is_refused(folder: Path) -> None:
    small, other = tokenizers(folder)
    check_tokenizer_of_data(str(folder / "a"), small)
    list(indexed_documents(str(folder / "a"), small))
    with pytest.raises(DataError, match=r"was made with the tokenizer [0-9a-f]{12}, but is to be read with"):
        check_tokenizer_of_data(str(folder / "a"), other)
    with pytest.raises(DataError, match="its ids mean other text"):
        build_datasets(data_config(vocab_size=640, train_data_path=[str(folder / "a")]), other, 4, 0)
    with pytest.raises(DataError, match="its ids mean other text"):
        indexed_documents(str(folder / "a"), other)


@pytest.mark.fault("L6")
@pytest.mark.parametrize("content", [None, "", "[]", '{"tokenizer": 5}', "[" * 100_000, "\x00"])
def test_data_that_names_no_tokenizer_is_taken_with_a_remark(folder: Path, tmp_path: Path, content: str | None) -> None:
    """Data of Megatron's own tool or an earlier version, or whose sidecar is damaged."""
    _, other = tokenizers(folder)
    for suffix in (".bin", ".idx"):
        shutil.copy(folder / f"a{suffix}", tmp_path / f"a{suffix}")
    if content is not None:
        sidecar(tmp_path / "a").write_text(content)
    check_tokenizer_of_data(str(tmp_path / "a"), other)
    prefixes = [str(folder / "a"), str(tmp_path / "a"), str(tmp_path / "a")]
    remark = remark_on_unnamed(prefixes)
    assert remark is not None
    assert f"{tmp_path / 'a'}.bin and 1 more does not say which tokenizer made it" in remark
    assert remark_on_unnamed([str(folder / "a")]) is None


@pytest.mark.fault("L6")
def test_what_stands_beside_replaced_data_does_not_speak_of_it(folder: Path, tmp_path: Path) -> None:
    """Megatron's own tool writes over the pair and leaves the sidecar of the pair before."""
    _, other = tokenizers(folder)
    for name in ("a.bin", "a.idx", "a.fingerprint.json"):
        shutil.copy(folder / name, tmp_path / name)
    prefix = write_indexed(tmp_path / "a", [[3, 4, 5]] * 10)
    assert tokenizer_of_data(prefix) is None
    check_tokenizer_of_data(prefix, other)


def test_files_of_an_earlier_pair_do_not_stop_a_new_one(folder: Path, tmp_path: Path) -> None:
    """Its .bin and .idx were removed by hand; the .fingerprint.json was overlooked."""
    sidecar(tmp_path / "a").write_text("{}")
    preprocess([folder / "a.jsonl"], tmp_path / "a", "sentencepiece", str(folder / "other.model"), workers=0)
    assert tokenizer_of_data(str(tmp_path / "a")) == digest_of_tokenizer(tokenizers(folder)[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.fingerprint.json", "a.idx"]


def test_the_digest_of_data_follows_content_order_and_weights_not_paths(tmp_path: Path) -> None:
    a, b = (write_indexed(tmp_path / name, [[3, 4, 5], [6, value]]) for name, value in (("a", 7), ("b", 8)))
    (tmp_path / "moved").mkdir()
    moved = write_indexed(tmp_path / "moved" / "a", [[3, 4, 5], [6, 7]])
    cut_elsewhere = write_indexed(tmp_path / "c", [[3, 4], [5, 6, 7]])
    assert digest_of_prefix(a) == digest_of_prefix(moved)
    assert len({digest_of_prefix(prefix) for prefix in (a, b, cut_elsewhere)}) == 3
    blends = [([a, b], None), ([b, a], None), ([a, b], [1.0, 2.0]), ([a, b], [2.0, 1.0]), ([a], None)]
    assert len({digest_of_blend(*blend) for blend in blends}) == 5
    assert digest_of_blend([moved, b], [1.0, 2.0]) == digest_of_blend([a, b], [1.0, 2.0])


def test_the_digest_of_a_large_file_sees_another_length_and_permuted_ids(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    lengths = generator.integers(5, 50, 200_000)
    ids = generator.integers(3, 600, int(lengths.sum()), dtype=np.uint16)

    def write(name: str, ids: np.ndarray, lengths: np.ndarray) -> str:
        documents = np.split(ids, np.cumsum(lengths)[:-1])
        return write_indexed(tmp_path / name, documents)  # type: ignore[arg-type]

    first = write("first", ids, lengths)
    assert all(Path(f"{first}{suffix}").stat().st_size > 3 * WHOLE_BYTES for suffix in (".bin", ".idx"))
    shifted = lengths.copy()
    shifted[[70_001, 150_000]] += (1, -1)
    permuted = write("permuted", generator.permutation(600).astype(np.uint16)[ids], lengths)
    digests = [digest_of_prefix(prefix) for prefix in (first, permuted, write("shifted", ids, shifted))]
    assert len(set(digests)) == 3
    assert digest_of_prefix(write("again", ids, lengths)) == digests[0]


def test_another_tokenizer_does_not_continue_a_checkpoint() -> None:
    checkpoint = Path("step_00000004")
    TrainedOn("a" * 64).check_tokenizer(checkpoint, "a" * 64)
    TrainedOn("").check_tokenizer(checkpoint, "b" * 64)
    with pytest.raises(ConfigError, match=r"trained with the tokenizer aaaaaaaaaaaa, but data\.tokenizer_model is bbb"):
        TrainedOn("a" * 64).check_tokenizer(checkpoint, "b" * 64)


@pytest.mark.parametrize("state", [{}, {"trained_on": None}, {"trained_on": {"tokenizer": "a", "data": []}}])
def test_a_state_that_does_not_say_what_it_was_trained_on_is_told_apart(state: dict[str, object]) -> None:
    assert TrainedOn.from_state(state) is None
    known = TrainedOn("a", {"train": "x"})
    assert TrainedOn.from_state({"trained_on": known.values()}) == known


def test_each_change_of_data_or_order_is_a_line_of_its_own() -> None:
    before = TrainedOn("a", {"train": "x", "valid": "y"})
    (train, valid) = before.other_data(TrainedOn("a", {"train": "z", "valid": "z", "test": "z"}))
    assert "the train data are not those of the checkpoint" in train
    assert "the valid data are not those of the checkpoint" in valid
