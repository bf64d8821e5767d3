"""Tokenizer files of exports: the trainer's ids and texts through transformers' classes."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_crnet.errors import DataError
from megatron_crnet.export_tokenizer import tokenizer_of, write_tokenizer
from megatron_crnet.tokenization_crnet import CRNetTokenizer
from megatron_crnet.tokenizer import load_tokenizer
from tests.unit.data_helpers import library_texts, train_small_tokenizer

TEXTS = [
    "",
    " ",
    "\n",
    "  two  spaces \t tab\r\n\r\n    indented\n",
    "é 漢字 😀 \x00 \x7f \xa0 \u2028 \ufeff",
    "<s> </s> <unk> <pad> <0x0A> </s></s>",
    "\ufb01 \uff41\uff22 \u212b e\u0301 ▁ ▁▁",
    "trailing   ",
]
KINDS: dict[str, dict[str, Any]] = {
    "trainer's own": {},
    "unigram": {"model_type": "unigram", "vocab_size": 300},
    "bpe with bytes": {"model_type": "bpe", "byte_fallback": True, "pad_id": 3, "vocab_size": 500},
    "bpe, T5's ids": {"model_type": "bpe", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "vocab_size": 300},
    "identity": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "vocab_size": 500,
    },
    "char": {"model_type": "char", "vocab_size": 120, "hard_vocab_limit": False},
}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    # some of these files have segmentations whose scores are equal but for rounding
    return [*TEXTS, *library_texts(60)]


def make(kind: str, folder: Path) -> str:
    if not KINDS[kind]:
        return train_small_tokenizer(folder, 2000)
    lines = [line for text in library_texts(15) for line in text.splitlines()]
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, num_threads=1, minloglevel=2, **KINDS[kind]
    )
    (folder / "some.model").write_bytes(model.getvalue())
    return str(folder / "some.model")


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_the_trainers(kind: str, texts: list[str], tmp_path: Path) -> None:
    path, out = make(kind, tmp_path), tmp_path / "out"
    out.mkdir()
    ours = write_tokenizer("sentencepiece", path, out, 256)
    exact = CRNetTokenizer.from_pretrained(out, verbose=False)
    ids = [ours.tokenize(text) for text in texts]
    assert [exact(text)["input_ids"] for text in texts] == ids
    assert exact(texts)["input_ids"] == ids
    assert [exact.decode(one) for one in ids] == [ours.detokenize(one) for one in ids]
    assert (exact.eos_token_id, len(exact)) == (ours.eod, ours.vocab_size)
    assert exact.pad_token_id in (ours.pad, None)
    assert load_tokenizer(*tokenizer_of(out)).unique_identifiers == ours.unique_identifiers
    without_code = AutoTokenizer.from_pretrained(out, trust_remote_code=False, verbose=False)
    assert type(without_code).__module__.startswith("transformers.")
    assert without_code(texts)["input_ids"] == ids
    assert without_code.eos_token_id == ours.eod


def test_special_tokens_are_spelled_or_skipped_and_ids_without_a_piece_are_nothing(tmp_path: Path) -> None:
    write_tokenizer("sentencepiece", train_small_tokenizer(tmp_path), tmp_path, 256)
    exact = CRNetTokenizer.from_pretrained(tmp_path)
    ids = exact("  text ")["input_ids"]
    assert exact.decode([*ids, 1, 0, 600, 9999]) == "  text </s><pad>"
    assert exact.decode([0, *ids, 1], skip_special_tokens=True) == "  text "
    batch = exact(["a", "longer text"], padding=True)
    assert batch["input_ids"][0][0] == 0 == batch["attention_mask"][0][0]
    assert batch["attention_mask"][1] == [1] * len(batch["input_ids"][1])
    exact.save_pretrained(tmp_path / "again")
    assert CRNetTokenizer.from_pretrained(tmp_path / "again")("  text ")["input_ids"] == ids


@pytest.fixture
def hugging_face(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(library_texts(5), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def test_a_hugging_face_tokenizer_is_copied(hugging_face: Path, texts: list[str], tmp_path: Path) -> None:
    (hugging_face / "model.safetensors").write_text("weights beside it")
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text(json.dumps({"model_type": "crnet", "auto_map": {"AutoConfig": "m.C"}}))
    ours = write_tokenizer("huggingface", str(hugging_face), out, 256)
    assert not (out / "model.safetensors").exists()
    assert [ours.tokenize(text) for text in texts] == [
        load_tokenizer(*tokenizer_of(out)).tokenize(text) for text in texts
    ]
    about = json.loads((out / "tokenizer_config.json").read_text())
    del about["tokenizer_class"]
    (hugging_face / "tokenizer_config.json").write_text(json.dumps(about))
    write_tokenizer("huggingface", str(hugging_face), out, 256)
    assert load_tokenizer("huggingface", str(out)).tokenize("text") == ours.tokenize("text")


def test_a_tokenizer_with_code_of_its_own_is_refused(hugging_face: Path, tmp_path: Path) -> None:
    path = hugging_face / "tokenizer_config.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, "auto_map": {"AutoTokenizer": ["code.Own", None]}}))
    shutil.copytree(hugging_face, tmp_path / "out")
    with pytest.raises(DataError, match="code of its own"):
        write_tokenizer("huggingface", str(hugging_face), tmp_path / "out", 256)
