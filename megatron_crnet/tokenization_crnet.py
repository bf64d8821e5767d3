"""A SentencePiece model for Hugging Face transformers, token for token and byte for byte. Travels with every export.

This file needs sentencepiece and transformers alone. transformers' own classes do not give text back exactly: they
strip it, or leave byte pieces as they are spelled.
"""

from __future__ import annotations

from itertools import groupby

from transformers.tokenization_utils_sentencepiece import SentencePieceBackend


class CRNetTokenizer(SentencePieceBackend):
    """Adds no special tokens; the spelling of a special token inside a text stays text."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str, **kwargs: object) -> None:
        kwargs = {"special_tokens_pattern": "none", "split_special_tokens": True, **kwargs}
        super().__init__(vocab_file=vocab_file, **kwargs)

    def _convert_id_to_token(self, index: int) -> str:
        # a padded embedding has more rows than there are pieces
        return str(self.sp_model.IdToPiece(index)) if index < self.sp_model.get_piece_size() else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of pieces; special tokens keep their spelling, what is unknown becomes SentencePiece's sign for it."""
        special = set(self.all_special_tokens) - {self.unk_token}
        runs = groupby((token for token in tokens if token), key=special.__contains__)
        return "".join("".join(run) if is_special else self.sp_model.decode(list(run)) for is_special, run in runs)
