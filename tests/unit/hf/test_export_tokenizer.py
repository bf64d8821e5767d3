"""Tokenizer files of exports: the trainer's ids and texts through transformers' classes."""

from __future__ import annotations

import copy
import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceTrainer
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

from megatron_crnet.data.tokenizer import load_tokenizer
from megatron_crnet.hf.export_tokenizer import tokenizer_of, write_tokenizer
from megatron_crnet.hf.tokenization_crnet import CRNetTokenizer
from megatron_crnet.utils.errors import DataError
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
    if KINDS[kind].get("model_type", "unigram") != "unigram":  # no sums of scores, which rounding could decide
        texts = texts[:25]
    path, out = make(kind, tmp_path), tmp_path / "out"
    out.mkdir()
    ours = write_tokenizer("sentencepiece", path, out, 256)
    exact = CRNetTokenizer.from_pretrained(out, verbose=False)
    ids = [ours.tokenize(text) for text in texts]
    assert [exact(text)["input_ids"] for text in texts] == ids
    assert exact(texts[:10])["input_ids"] == ids[:10]
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
def exact(tmp_path: Path) -> CRNetTokenizer:
    write_tokenizer("sentencepiece", train_small_tokenizer(tmp_path), tmp_path, 256)
    return CRNetTokenizer.from_pretrained(tmp_path)


ROUND = "  a<call>  b </s>\n<call><call>é 漢\n"


@pytest.mark.fault("D11")
def test_added_tokens_are_cut_out_and_everything_else_stays_as_it_was(exact: CRNetTokenizer, tmp_path: Path) -> None:
    before, size = exact(ROUND)["input_ids"], len(exact)
    assert exact.add_tokens(["<call>", "called"]) == 2
    assert exact.add_special_tokens({"additional_special_tokens": ["<turn>"]}) == 1
    assert len(exact) == size + 3
    call, called, turn = exact.convert_tokens_to_ids(["<call>", "called", "<turn>"])
    assert [call, called, turn] == [size, size + 1, size + 2]
    text = f"{ROUND}<turn>recalled"
    ids = exact(text)["input_ids"]
    assert ids == exact.encode(text) == exact([text, "x"])["input_ids"][0]
    assert [i for i in ids if i >= size] == [call, call, call, turn, called]
    assert exact.decode(ids) == text
    assert exact.decode(ids, skip_special_tokens=True) == text.replace("<turn>", "")
    assert (
        exact("no new token </s>")["input_ids"]
        == CRNetTokenizer.from_pretrained(tmp_path)("no new token </s>")["input_ids"]
    )
    assert exact(ROUND, split_special_tokens=True)["input_ids"] == before
    exact.save_pretrained(tmp_path / "again")
    for other in (
        CRNetTokenizer.from_pretrained(tmp_path / "again"),
        pickle.loads(pickle.dumps(exact)),
        copy.deepcopy(exact),
    ):
        assert other(text)["input_ids"] == ids
        assert other.decode(ids) == text


@pytest.mark.fault("D11")
def test_an_added_token_takes_the_white_space_and_the_words_that_it_asks_for(exact: CRNetTokenizer) -> None:
    exact.add_tokens([AddedToken("<a>", lstrip=True, rstrip=True), AddedToken("cat", single_word=True)])
    a, cat = exact.convert_tokens_to_ids(["<a>", "cat"])
    alone = [*exact("x")["input_ids"], a, *exact("y")["input_ids"]]
    assert exact("x  <a> \n y")["input_ids"] == alone
    assert cat in exact("a cat.")["input_ids"]
    assert cat not in exact("concatenate")["input_ids"]


@pytest.mark.fault("D11")
def test_a_piece_of_the_model_that_is_added_is_that_piece(exact: CRNetTokenizer) -> None:
    piece = next(p for p in exact.get_vocab() if p.isalpha() and len(p) == 3)
    assert exact.add_tokens([piece]) == 0
    index = exact.convert_tokens_to_ids(piece)
    assert exact(f"{piece}{piece}")["input_ids"] == [index, index]


@pytest.mark.fault("D11")
def test_special_tokens_are_text_until_one_asks_for_them(exact: CRNetTokenizer, tmp_path: Path) -> None:
    eos = exact.eos_token_id
    assert eos not in exact("a</s>")["input_ids"]
    assert exact("a</s>", split_special_tokens=False)["input_ids"] == [*exact("a")["input_ids"], eos]
    exact.add_eos_token = True
    assert exact("a")["input_ids"][-1] == eos
    assert exact("a", add_special_tokens=False)["input_ids"][-1] != eos
    exact.save_pretrained(tmp_path / "again")
    again = CRNetTokenizer.from_pretrained(tmp_path / "again")
    assert again.add_eos_token
    assert again("a")["input_ids"][-1] == eos
    assert CRNetTokenizer.from_pretrained(tmp_path, add_eos_token=True)("a")["input_ids"][-1] == eos
    with pytest.raises(ValueError, match="no bos_token"):
        CRNetTokenizer.from_pretrained(tmp_path, add_bos_token=True)


@pytest.mark.fault("D11")
def test_a_chat_template_means_the_tokens_that_it_spells(exact: CRNetTokenizer, tmp_path: Path) -> None:
    exact.add_special_tokens({"additional_special_tokens": ["<user>"]})
    exact.chat_template = "{% for m in messages %}<user>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    wanted = [exact.convert_tokens_to_ids("<user>"), *exact("hi")["input_ids"], exact.eos_token_id]
    exact.save_pretrained(tmp_path / "again")
    for one in (exact, CRNetTokenizer.from_pretrained(tmp_path / "again")):
        assert one.apply_chat_template([{"role": "user", "content": "hi"}])["input_ids"] == wanted
    with pytest.raises(ValueError, match="sanitize_control_tokens"):
        exact.apply_chat_template([{"role": "user", "content": "hi"}], sanitize_control_tokens=True)


@pytest.mark.fault("D11")
def test_lengths_pairs_and_offsets(exact: CRNetTokenizer) -> None:
    assert exact.model_max_length == 256
    assert len(exact("word " * 500, truncation=True)["input_ids"]) == 256
    one, two = exact("one")["input_ids"], exact("two")["input_ids"]
    assert exact("one", "two")["input_ids"] == one + two
    assert exact(["a", "b"], is_split_into_words=True)["input_ids"] == exact("a")["input_ids"] + exact("b")["input_ids"]
    with pytest.raises(NotImplementedError):
        exact("one", return_offsets_mapping=True)


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
    copied = load_tokenizer(*tokenizer_of(out))
    assert [ours.tokenize(text) for text in texts] == [copied.tokenize(text) for text in texts]
    assert copied.unique_identifiers == ours.unique_identifiers, "a run goes on with either"
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
