"""A tokenizer's files inside an export, for `transformers.AutoTokenizer`, and back.

A SentencePiece model stays what it is. Its conversion to Hugging Face's fast tokenizers is not exact: SentencePiece
adds scores in fp32, so that two segmentations whose scores differ by less than that rounding come out in its own way.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_crnet.data.tokenizer import Tokenizer, TokenizerKind, load_tokenizer, tokenizer_files
from megatron_crnet.utils.errors import DataError

SENTENCEPIECE = "tokenizer.model"
CODE = "tokenization_crnet.py"
SPECIAL = ("bos", "eos", "unk", "pad")
OTHER = "or give another tokenizer with --tokenizer"


def write_tokenizer(kind: TokenizerKind, path: str, folder: Path, max_length: int) -> Tokenizer:
    """Put a tokenizer's files into an export. Returns the tokenizer.

    Raises:
        DataError: it cannot be read.
    """
    tokenizer = load_tokenizer(kind, path)
    if kind == "huggingface":
        _copy_hugging_face(Path(path), folder)
        return tokenizer
    shutil.copyfile(path, folder / SENTENCEPIECE)
    shutil.copyfile(Path(__file__).with_name(CODE), folder / CODE)
    about = _sentencepiece_config(path, max_length)
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
    return tokenizer


def tokenizer_of(folder: Path) -> tuple[TokenizerKind, str]:
    """`data.tokenizer_type` and `data.tokenizer_model` of an export's tokenizer.

    Raises:
        DataError: its files are missing or damaged.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder: give that of an export")
    about = _about(folder)  # refused if damaged
    if (folder / CODE).is_file() or "CRNetTokenizer" in json.dumps(about):
        if not (folder / SENTENCEPIECE).is_file():
            raise DataError(f"export {folder} has no {SENTENCEPIECE}, its tokenizer: copy it there, {OTHER}")
        return "sentencepiece", str(folder / SENTENCEPIECE)
    if not tokenizer_files(folder):
        raise DataError(f"export {folder} has no tokenizer: copy its files there, {OTHER}")
    return "huggingface", str(folder)


def note_on_added_tokens(folder: Path) -> str | None:
    """A line on tokens that transformers has added to an export's SentencePiece model, which does not hold them."""
    if tokenizer_of(folder)[0] == "huggingface":
        return None
    known = load_tokenizer(*tokenizer_of(folder)).vocab_size
    added = [index for index in _added_ids(_about(folder)) if index >= known]
    if not added:
        return None
    return f"{len(added)} tokens that were added to the tokenizer of {folder} are text here: {SENTENCEPIECE} lacks them"


def _added_ids(about: dict[str, Any]) -> list[int]:
    return [int(index) for index in {**about.get("added_tokens_decoder", {})}]


def _about(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    try:
        about: dict[str, Any] = {**json.loads(path.read_text())} if path.is_file() else {}
        _added_ids(about)
        return about
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is not readable ({error!r}): correct it, {OTHER}") from error


def _sentencepiece_config(path: str, max_length: int) -> dict[str, Any]:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=path)
    ids = {name: getattr(processor, f"{name}_id")() for name in SPECIAL}
    return {
        "auto_map": {"AutoTokenizer": [f"{Path(CODE).stem}.CRNetTokenizer", None]},
        # without trust_remote_code: the same ids, but text comes back stripped and with byte pieces spelled out
        "tokenizer_class": "SentencePieceBackend",
        **{f"{name}_token": processor.id_to_piece(i) if i >= 0 else None for name, i in ids.items()},
        "special_tokens_pattern": "none",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_max_length": max_length,
    }


def _copy_hugging_face(source: Path, folder: Path) -> None:
    for file in tokenizer_files(source):
        shutil.copyfile(file, folder / file.name)
    about = _about(folder)
    if "auto_map" in about:
        raise DataError(f"tokenizer {source} needs code of its own, which an export does not carry: convert it first")
    # AutoTokenizer would otherwise go by the model's type, which names no tokenizer
    about.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
