"""Tokenizers for Megatron-Core's GPTDataset, over SentencePiece or Hugging Face.

Megatron-Core's own classes import torch and need a metadata file beside the model; these start in a fraction of a
second, which the worker processes of `data/preprocess.py` need, and tokenize batches.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megatron_crnet.utils.errors import ConfigError, DataError, require

TokenizerKind = Literal["sentencepiece", "huggingface"]
Ids = npt.NDArray[np.int32]

VOCAB_MULTIPLE = 128
"""Multiples of it suit tensor parallelism and the matrix units of GPUs."""
NOT_RULES = ("version", "truncation", "padding", "post_processor")
"""Parts of tokenizer.json that no document's ids depend on: special tokens are added by `preprocess`."""
PROBE = (
    "The quick brown fox, 1234567890 times:\n\n    def f(x): return x**2  # tab\there\r\n",
    " Éa \u00a0 漢字 😀 \ufb01 e\u0301 <s></s> Straße İ ὈΔΥΣΣΕΎΣ don't I'LL 3.14e-10",
)


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        vocab_size: the largest token id plus one; ids below it may be unused.
        eod: id that ends a document, the model's end-of-sentence piece.
        pad: id of padding; `eod` if the model has none.
        unique_identifiers: for the names of Megatron-Core's index caches, and beside the data: the class, and a digest
            of what decides the ids, so that a moved tokenizer is the same and a changed one is not.
    """

    vocab_size: int
    eod: int
    pad: int
    unique_identifiers: OrderedDict[str, str]

    @abstractmethod
    def tokenize_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids [n_i] of each text, without special tokens."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    def tokenize(self, text: str) -> list[int]:
        """Token ids of one text, without special tokens."""
        ids: list[int] = self.tokenize_batch([text])[0].tolist()
        return ids

    def detokenize(self, ids: Iterable[int]) -> str:
        """Text of token ids; special tokens, and ids beyond the vocabulary (of a padded embedding), add nothing."""
        return self._decode([int(i) for i in ids if int(i) < self.vocab_size])


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file."""

    def __init__(self, path: str) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            model = Path(path).read_bytes()
            if not model:
                raise DataError(f"tokenizer {path} is empty: give a .model file")
            self._processor = processor = SentencePieceProcessor(model_proto=model, num_threads=1)
            self.vocab_size = processor.vocab_size()
            processor.id_to_piece(list(range(self.vocab_size)))
        except OSError as error:
            raise DataError(f"tokenizer {path} cannot be read ({error.strerror}): correct the path") from error
        except (RuntimeError, UnicodeError) as error:  # UnicodeError: a piece, or a message that shows one
            raise DataError(f"tokenizer {path} is not a SentencePiece model, or damaged: give a .model file") from error
        if self.vocab_size == 0 or processor.eos_id() < 0:
            raise DataError(
                f"tokenizer {path} has no end-of-sentence piece, which ends documents: train it with an eos_id"
            )
        self.eod = processor.eos_id()
        self.pad = processor.pad_id() if processor.pad_id() >= 0 else self.eod
        self.unique_identifiers = _identifiers("sentencepiece", model)

    def tokenize_batch(self, texts: Sequence[str]) -> list[Ids]:
        """See Tokenizer. One call into C++, one thread."""
        ids: list[Ids] = self._processor.encode(list(texts), return_type="numpy")
        return ids

    def _decode(self, ids: list[int]) -> str:
        return str(self._processor.decode(ids))


class HuggingFaceTokenizer(Tokenizer):
    """A folder that `transformers.AutoTokenizer` can read; nothing is downloaded."""

    def __init__(self, path: str) -> None:
        if not Path(path).is_dir():
            raise DataError(f"tokenizer {path} is not a folder: give the folder that holds tokenizer.json")
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise DataError(
                "data.tokenizer_type huggingface needs the package transformers, which is not installed: "
                "run pip install transformers"
            ) from error
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            eos, pad = self._tokenizer.eos_token_id, self._tokenizer.pad_token_id
            if eos is None:
                raise DataError(
                    f"tokenizer {path} has no eos_token, which ends documents: name one in its tokenizer_config.json"
                )
            self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
            self.eod = int(eos)
            self.pad = self.eod if pad is None else int(pad)
            probe = [ids.tolist() for ids in self.tokenize_batch(PROBE)]
            self.detokenize(ids for row in probe for ids in row)
        except DataError:
            raise
        except Exception as error:  # of many types, even bare Exceptions; some damage shows only in use
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            message = f"tokenizer {path} cannot be loaded ({reason}): give a folder with tokenizer.json"
            raise DataError(message) from error
        self.unique_identifiers = _identifiers("huggingface", _ids_decided_by(Path(path), self._tokenizer, probe))

    def tokenize_batch(self, texts: Sequence[str]) -> list[Ids]:
        """See Tokenizer. The spelling of a special token inside a text stays text."""
        if not texts:
            return []
        encoded = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"]]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def load_tokenizer(kind: TokenizerKind, path: str) -> Tokenizer:
    """Load a tokenizer.

    Args:
        kind: `data.tokenizer_type`.
        path: `data.tokenizer_model`: a SentencePiece .model file, or a folder with a Hugging Face tokenizer.

    Raises:
        ConfigError: no such kind.
        DataError: the files are missing, damaged or without an end-of-sentence token, or a package is missing.
    """
    if kind == "sentencepiece":
        return SentencePieceTokenizer(path)
    if kind == "huggingface":
        return HuggingFaceTokenizer(path)
    raise ConfigError(f"data.tokenizer_type is {kind!r}, but must be sentencepiece or huggingface: use one of them")


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, remedy: str | None = None) -> None:
    """Raise ConfigError when the model's embedding is smaller than the tokenizer.

    Args:
        remedy: of a model that is trained already; by default a larger `model.vocab_size`.
    """
    enough = -(-tokenizer.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    require(
        tokenizer.vocab_size <= vocab_size,
        f"model.vocab_size is {vocab_size}, but the tokenizer has ids up to {tokenizer.vocab_size - 1}: "
        f"{remedy or f'set model.vocab_size to {enough}'}",
    )


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that make its Hugging Face tokenizer, without weights."""
    prefixes = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "spiece", "sentencepiece")
    files = (file for file in sorted(folder.iterdir()) if file.is_file())
    return [file for file in files if file.name.startswith(prefixes) or file.suffix == ".model"]


def _identifiers(kind: str, content: bytes) -> OrderedDict[str, str]:
    return OrderedDict([("class", kind), ("sha256", hashlib.sha256(content).hexdigest())])


def _ids_decided_by(folder: Path, tokenizer: Any, probe: list[list[int]]) -> bytes:
    """What decides the ids of a text: vocabulary, rules of tokenizer.json, end, and the ids of a probe.

    Chat templates, padding and the like do not count; what tokenizer_config.json changes in the rules shows in the
    probe.
    """
    rules: list[Any] = []
    for file in tokenizer_files(folder):
        if file.name == "tokenizer.json":
            about = json.loads(file.read_text(encoding="utf-8"))
            rules.append({key: value for key, value in about.items() if key not in NOT_RULES})
        elif file.suffix != ".json":
            rules.append(hashlib.sha256(file.read_bytes()).hexdigest())
    facts = [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id, rules, probe]
    return json.dumps(facts, sort_keys=True).encode()
