"""Tokenizers: exact round trips, T5's special ids, digests, and the errors of bad files."""

from __future__ import annotations

import json
import random
import runpy
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_crnet.data.indexed import check_token_ids, read_index
from megatron_crnet.data.preprocess import preprocess
from megatron_crnet.data.tokenizer import check_vocabulary, load_tokenizer
from megatron_crnet.data.train_tokenizer import BLOCK_CHARACTERS, sample_blocks, split_blocks, train_sentencepiece
from megatron_crnet.utils.errors import ConfigError, DataError
from tests.unit.data_helpers import PlainTokenizer, library_texts, read_indexed, train_small_tokenizer, write_jsonl

ODD_TEXTS = [
    "",
    " ",
    "\n",
    "  two  spaces \t tab\r\n\r\n    indented\n",
    "é 漢字 😀 \x00 \x7f \xa0 \u2028 \ufeff",
    "<s> </s> <unk> <pad> <0x0A>",
    "\ufb01 \uff41\uff22 \u212b e\u0301",
    "trailing   ",
    "a\u2581b \u2581 \u2581\u2582\u2583",
    "\x10 \x10_ \x10\x10 \u2581\x10\u2581_",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return train_small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_special_ids_and_size(model: str) -> None:
    tokenizer = load_tokenizer("sentencepiece", model)
    assert (tokenizer.pad, tokenizer.eod, tokenizer.vocab_size) == (0, 1, 600)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_odd_text_round_trips(model: str, text: str) -> None:
    tokenizer = load_tokenizer("sentencepiece", model)
    ids = tokenizer.tokenize(text)
    assert all(type(i) is int and 2 < i < 600 for i in ids), "text must give no special token"
    assert tokenizer.detokenize(ids) == text


@pytest.mark.fault("D6")
def test_every_character_round_trips(model: str) -> None:
    tokenizer = load_tokenizer("sentencepiece", model)
    planes = [*range(0xD800), *range(0xE000, 0x10000), *range(0x1F000, 0x20000), 0x10FFFF]
    texts = [f"a{chr(point)}{chr(point)} b" for point in planes]
    assert [tokenizer.detokenize(ids) for ids in tokenizer.tokenize_batch(texts)] == texts


@pytest.mark.fault("D6")
def test_texts_of_the_characters_that_tokens_are_made_of_round_trip(model: str) -> None:
    tokenizer, generator = load_tokenizer("sentencepiece", model), random.Random(6)
    parts = [" ", "\u2581", "\x10", "_", "a", "\n", "\t", "</s>", "<0xE2>", "\u2047", "\ufeff", "\u0301", "漢"]
    texts = ["".join(generator.choices(parts, k=generator.randrange(9))) for _ in range(20_000)]
    assert [tokenizer.detokenize(ids) for ids in tokenizer.tokenize_batch(texts)] == texts


def test_source_code_round_trips_and_compresses(model: str) -> None:
    tokenizer, texts = load_tokenizer("sentencepiece", model), library_texts(40)
    batch = tokenizer.tokenize_batch(texts)
    assert [tokenizer.detokenize(ids) for ids in batch] == texts
    assert sum(map(len, batch)) < 0.6 * sum(map(len, texts)), "runs of spaces must be pieces"


def test_pieces_of_text_join_without_a_space(model: str) -> None:
    tokenizer = load_tokenizer("sentencepiece", model)
    assert tokenizer.detokenize([*tokenizer.tokenize("left"), *tokenizer.tokenize("right")]) == "leftright"


def test_batch_equals_one_by_one(model: str) -> None:
    tokenizer = load_tokenizer("sentencepiece", model)
    texts = [*ODD_TEXTS, *library_texts(3)]
    assert [ids.tolist() for ids in tokenizer.tokenize_batch(texts)] == [tokenizer.tokenize(text) for text in texts]


def test_detokenize_passes_over_ids_without_a_piece(model: str) -> None:
    tokenizer = load_tokenizer("sentencepiece", model)
    ids = tokenizer.tokenize("text")
    assert tokenizer.detokenize([0, *ids, 1, 600, 99999]) == "text"


def test_identifiers_follow_the_content_not_the_path(model: str, tmp_path: Path) -> None:
    copy = shutil.copy(model, tmp_path / "copy.model")
    other = train_sentencepiece(library_texts(10), tmp_path / "other", 500, sample_bytes=50_000)
    identifiers = [load_tokenizer("sentencepiece", str(path)).unique_identifiers for path in (model, copy, other)]
    assert identifiers[0] == identifiers[1] != identifiers[2]


def test_training_is_deterministic(model: str, tmp_path: Path) -> None:
    assert Path(train_small_tokenizer(tmp_path)).read_bytes() == Path(model).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["small.model"], "no temporary file may stay"


@pytest.mark.fault("F11")
def test_training_refuses_sizes_that_cannot_be(tmp_path: Path) -> None:
    for size in (-1, 299, 10**9):
        with pytest.raises(ConfigError, match=rf"vocab_size is {size}, .*: use 300 to 1048576"):
            train_sentencepiece(["text"], tmp_path / "small", size)
    for threads in (0, 5000):
        with pytest.raises(ConfigError, match=f"num_threads is {threads}, but must be 1 to 1024"):
            train_sentencepiece(["text"], tmp_path / "small", 400, num_threads=threads)
    with pytest.raises(ConfigError, match="sample_bytes is 0"):
        train_sentencepiece(["text"], tmp_path / "small", 400, sample_bytes=0)
    for prefix in ("", "d/"):
        with pytest.raises(DataError, match="must end in the name of the files"):
            train_sentencepiece(["text"], prefix, 400)
    alphabet = "".join(map(chr, range(0x4E00, 0x5200)))
    with pytest.raises(ConfigError, match="alphabet of the texts alone needs"):
        train_sentencepiece([alphabet] * 3, tmp_path / "small", 400)
    with pytest.raises(DataError, match="no text"):
        train_sentencepiece([], tmp_path / "small", 400)
    assert not list(tmp_path.iterdir())


@pytest.mark.fault("M12")
def test_texts_that_support_fewer_pieces_give_as_many_as_they_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "a.jsonl", [*library_texts(2), ""])
    tool = Path(__file__).parents[3] / "tools" / "train_tokenizer.py"
    command = [str(tool), str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "out"), "--vocab-size"]
    monkeypatch.setattr(sys, "argv", [*command, "32000"])
    assert runpy.run_path(str(tool))["main"]() == 0
    printed = capsys.readouterr()
    size = load_tokenizer("sentencepiece", str(tmp_path / "out.model")).vocab_size
    assert 300 < size < 32000
    assert f"out.model: {size} pieces, the most that the text supports, not 32000: give more text" in printed.out
    assert f"{tmp_path}/a.jsonl: 1 empty (first at 3)" in printed.out
    assert "training up to 32,000 pieces on " in printed.err
    monkeypatch.setattr(sys, "argv", [*command, "400", "--overwrite"])
    assert runpy.run_path(str(tool))["main"]() == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/out.model: 400 pieces\n")
    monkeypatch.setattr(sys, "argv", [str(tool), str(tmp_path), "--output", str(tmp_path / "out")])
    assert runpy.run_path(str(tool))["main"]() == 2
    assert "lies inside the input folder" in capsys.readouterr().err


def test_training_does_not_overwrite_unasked(tmp_path: Path) -> None:
    (tmp_path / "mine.model").write_text("mine")
    with pytest.raises(DataError, match="exists already: remove it, choose another name, or add --overwrite"):
        train_sentencepiece(library_texts(5), tmp_path / "mine", 400)
    assert (tmp_path / "mine.model").read_text() == "mine"


def test_blocks_are_bounded_and_lose_nothing() -> None:
    text = "a\n" * 900 + "b" * 3500 + "\n\n  c"
    blocks = list(split_blocks(text))
    assert "".join(blocks) == text
    assert max(map(len, blocks)) == BLOCK_CHARACTERS


def test_sample_is_spread_over_all_texts() -> None:
    sample = [int(block) for block in sample_blocks((str(i) for i in range(10_000)), 100)]
    assert sample == sorted(sample)
    assert len(set(sample)) == 100
    assert 3500 < sum(sample) / 100 < 6500


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), (b"garbage", "not a SentencePiece model"), (b"", "is empty")]
)
def test_bad_sentencepiece_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "bad.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_tokenizer("sentencepiece", str(path))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.fault("F13")
def test_a_model_with_a_flipped_bit_is_refused_in_one_line_or_works(model: str, tmp_path: Path) -> None:
    generator, whole, text = random.Random(13), Path(model).read_bytes(), "def f(a):\n    return é漢"
    for _ in range(300):
        content = bytearray(whole)
        content[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        (tmp_path / "flipped.model").write_bytes(content)
        with suppress(DataError):
            tokenizer = load_tokenizer("sentencepiece", str(tmp_path / "flipped.model"))
            tokenizer.detokenize([*tokenizer.tokenize(text), *range(600)])


@pytest.mark.fault("F13")
def test_a_piece_that_is_not_text_is_refused_in_one_line(model: str, tmp_path: Path) -> None:
    content = Path(model).read_bytes()
    for spelling in (b"<pad>", b"</s>", b"<0x41>"):
        (tmp_path / "bad.model").write_bytes(content.replace(spelling, b"\xff" * len(spelling), 1))
        with pytest.raises(DataError, match="is not a SentencePiece model, or damaged"):
            load_tokenizer("sentencepiece", str(tmp_path / "bad.model"))


def test_vocabulary_check_names_a_size_that_works() -> None:
    check_vocabulary(PlainTokenizer(vocab_size=128), 128)
    with pytest.raises(ConfigError, match=r"set model\.vocab_size to 32128$") as caught:
        check_vocabulary(PlainTokenizer(vocab_size=32100), 32000)
    check_vocabulary(PlainTokenizer(vocab_size=32100), int(str(caught.value).split()[-1]))


def test_unknown_kind() -> None:
    kind: Any = "wordpiece"
    with pytest.raises(ConfigError, match="wordpiece"):
        load_tokenizer(kind, "x")


def test_missing_transformers_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DataError, match="pip install transformers"):
        load_tokenizer("huggingface", str(tmp_path))


@pytest.fixture
def hugging_face_folder(tmp_path: Path) -> Path:
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "</s>"]
    raw.train_from_iterator(
        library_texts(5), trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet)
    )
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="<pad>").save_pretrained(tmp_path / "hf")
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>").save_pretrained(tmp_path / "no_pad")
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(tmp_path / "no_eos")
    return tmp_path


def test_hugging_face_round_trip(hugging_face_folder: Path) -> None:
    tokenizer = load_tokenizer("huggingface", str(hugging_face_folder / "hf"))
    assert (tokenizer.pad, tokenizer.eod, tokenizer.vocab_size) == (0, 1, 500)
    texts = [text for text in ODD_TEXTS if text] + library_texts(3)
    batch = tokenizer.tokenize_batch(texts)
    assert all(ids.min() > 1 for ids in batch), "the spelling of a special token must stay text"
    assert [tokenizer.detokenize(ids) for ids in batch] == texts
    assert tokenizer.tokenize(texts[-1]) == batch[-1].tolist()
    assert tokenizer.detokenize([0, *tokenizer.tokenize("text"), 1, 99999]) == "text"
    assert tokenizer.tokenize_batch([]) == []


def test_hugging_face_special_tokens_and_digest(hugging_face_folder: Path) -> None:
    no_pad = load_tokenizer("huggingface", str(hugging_face_folder / "no_pad"))
    assert no_pad.pad == no_pad.eod == 1
    with pytest.raises(DataError, match="no eos_token"):
        load_tokenizer("huggingface", str(hugging_face_folder / "no_eos"))
    with pytest.raises(DataError, match="cannot be loaded"):
        load_tokenizer("huggingface", str(hugging_face_folder))
    with pytest.raises(DataError, match="not a folder"):
        load_tokenizer("huggingface", str(hugging_face_folder / "nowhere"))


@pytest.mark.fault("F13")
@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("tokenizer_config.json", "model_max_length", []),
        ("tokenizer_config.json", "eos_token", {"a": 1}),
        ("tokenizer_config.json", "tokenizer_class", 5),
        ("tokenizer.json", "model", None),
        ("tokenizer.json", "decoder", "x"),
        ("tokenizer.json", "added_tokens", {}),
    ],
)
def test_damaged_hugging_face_files_are_refused_in_one_line(
    hugging_face_folder: Path, name: str, key: str, value: object
) -> None:
    path = hugging_face_folder / "hf" / name
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(DataError, match="cannot be loaded") as caught:
        load_tokenizer("huggingface", str(path.parent))
    assert "\n" not in str(caught.value)


@pytest.fixture
def tokenizer_with_gaps(hugging_face_folder: Path) -> str:
    """501 tokens, the last of which has the id 599."""
    path = hugging_face_folder / "hf" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 599, "content": "<far>", "special": False})
    content["model"]["vocab"]["<far>"] = 599
    path.write_text(json.dumps(content))
    return str(path.parent)


@pytest.mark.fault("L8")
def test_a_vocabulary_with_gaps_reaches_to_its_largest_id(tokenizer_with_gaps: str) -> None:
    tokenizer = load_tokenizer("huggingface", tokenizer_with_gaps)
    assert tokenizer.vocab_size == 600
    assert tokenizer.tokenize("a<far>b")[1] == 599
    assert tokenizer.detokenize([*tokenizer.tokenize("a<far>b"), 550, 1]) == "a<far>b"
    check_vocabulary(tokenizer, 600)
    with pytest.raises(ConfigError, match=r"ids up to 599: set model\.vocab_size to 640"):
        check_vocabulary(tokenizer, 599)


@pytest.mark.fault("L8")
def test_text_of_a_vocabulary_with_gaps_is_preprocessed_and_read(tokenizer_with_gaps: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["a<far>b" * 20])
    preprocess([tmp_path / "a.jsonl"], tmp_path / "out", "huggingface", tokenizer_with_gaps, workers=0)
    files = read_index(str(tmp_path / "out"))
    check_token_ids(files, load_tokenizer("huggingface", tokenizer_with_gaps))
    assert files.dtype == np.uint16


@pytest.mark.fault("L8")
def test_the_type_of_the_ids_follows_the_largest_one(
    hugging_face_folder: Path, tokenizer_with_gaps: str, tmp_path: Path
) -> None:
    path = Path(tokenizer_with_gaps) / "tokenizer.json"
    path.write_text(path.read_text().replace("599", "70000"))
    write_jsonl(tmp_path / "a.jsonl", ["a<far>b"])
    preprocess([tmp_path / "a.jsonl"], tmp_path / "out", "huggingface", tokenizer_with_gaps, workers=0)
    assert read_index(str(tmp_path / "out")).dtype == np.int32
    assert 70000 in read_indexed(tmp_path / "out")[0]


@pytest.mark.fault("L6")
def test_the_digest_of_a_hugging_face_folder_follows_what_decides_ids(hugging_face_folder: Path) -> None:
    folder = hugging_face_folder / "hf"

    def digest() -> str:
        return load_tokenizer("huggingface", str(folder)).unique_identifiers["sha256"]

    def change(name: str, **values: Any) -> None:
        about = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**about, **values}))

    before = digest()
    (folder / "pytorch_model.bin").write_text("weights")
    change("tokenizer_config.json", chat_template="{{ messages }}", model_max_length=77, pad_token=None)
    change("tokenizer.json", padding=None, truncation=None)
    assert digest() == before
    rules = json.loads((folder / "tokenizer.json").read_text())
    for part, other in (
        ("normalizer", {"type": "Lowercase"}),
        ("model", {**rules["model"], "merges": [*rules["model"]["merges"][:-2], *rules["model"]["merges"][:-3:-1]]}),
    ):
        change("tokenizer.json", **{part: other})
        assert digest() != before, part
        change("tokenizer.json", **{part: rules[part]})
    assert digest() == before
    change("tokenizer_config.json", eos_token="<pad>")
    assert digest() != before
