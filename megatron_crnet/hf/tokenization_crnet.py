"""A SentencePiece model for Hugging Face transformers, token for token and byte for byte. Travels with every export.

This file needs sentencepiece and transformers alone. transformers' own classes do not give text back exactly: they
strip it, or leave byte pieces as they are spelled.
"""

from __future__ import annotations

import re
from itertools import groupby
from typing import Any

from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

TRAINED = "trained"
"""Value of split_special_tokens: the special tokens that the model was trained with are text, added ones are not."""


class CRNetTokenizer(SentencePieceBackend):
    """Adds no special tokens unless it is asked to (`add_bos_token`, `add_eos_token`).

    Tokens that were added are cut out of a text. The spelling of a special token that the model was trained with stays
    text. With `split_special_tokens=False`, as a chat template is read, neither is text; with True, both are.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]

    split_special_tokens: bool | str
    special_tokens_pattern: str

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        self._added: re.Pattern[str] | None = None
        ends = {name: kwargs.pop(f"add_{name}_token", None) for name in ("bos", "eos")}
        kwargs = {"special_tokens_pattern": "none", "split_special_tokens": True, **kwargs}
        super().__init__(vocab_file=vocab_file, **kwargs)
        if self.split_special_tokens:
            self.split_special_tokens = TRAINED  # which a call's own True differs from
        for name, value in ends.items():
            if value is not None:
                self._add_end(name, value)

    def _add_end(self, name: str, value: bool) -> None:
        if value and getattr(self, f"{name}_token_id") is None:
            raise ValueError(f"add_{name}_token is set, but this tokenizer has no {name}_token: name one first")
        ends = self.special_tokens_pattern.split("_")
        wanted = [one for one in ("bos", "eos") if (value if one == name else one in ends)]
        self.special_tokens_pattern = "_".join(wanted) or "none"
        self.init_kwargs["special_tokens_pattern"] = self.special_tokens_pattern  # which is what is saved

    @property
    def add_bos_token(self) -> bool:
        """Whether a text begins with bos_token."""
        return "bos" in self.special_tokens_pattern

    @add_bos_token.setter
    def add_bos_token(self, value: bool) -> None:
        self._add_end("bos", value)

    @property
    def add_eos_token(self) -> bool:
        """Whether a text ends with eos_token."""
        return "eos" in self.special_tokens_pattern

    @add_eos_token.setter
    def add_eos_token(self, value: bool) -> None:
        self._add_end("eos", value)

    def _update_trie(self, unique_no_split_tokens: list[str] | None = None) -> None:
        # what transformers calls whenever tokens were added
        super()._update_trie(unique_no_split_tokens)
        model, pieces = self.sp_model, self.sp_model.get_piece_size()
        own = {i for i in self._added_tokens_decoder if i < pieces and (model.is_control(i) or model.is_unknown(i))}
        added = [token for index, token in self._added_tokens_decoder.items() if index not in own]
        added.sort(key=lambda token: -len(token.content))
        patterns = []
        for token in added:
            edge = (r"(?<!\w)", r"(?!\w)") if token.single_word else ("", "")
            before, after = (r"\s*" if strips else "" for strips in (token.lstrip, token.rstrip))
            patterns.append(f"{before}{edge[0]}({re.escape(token.content)}){edge[1]}{after}")
        self._added = re.compile("|".join(patterns)) if patterns else None

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """The pieces of a text, and the tokens that were added."""
        if kwargs.get("return_offsets_mapping"):
            raise NotImplementedError("return_offsets_mapping is not known to this tokenizer: leave it out")
        if self._added is None or kwargs.get("split_special_tokens", self.split_special_tokens) != TRAINED:
            return list(super().tokenize(text, **kwargs))
        pieces: list[str] = []
        end = 0
        for found in self._added.finditer(text):
            if found.start() > end:
                pieces += self._tokenize(text[end : found.start()])
            pieces.append(found[found.lastindex or 0])
            end = found.end()
        return pieces + (self._tokenize(text[end:]) if end < len(text) else [])

    def apply_chat_template(self, *args: Any, tokenizer_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        """As transformers'; the special tokens that a template spells are these tokens."""
        if kwargs.get("sanitize_control_tokens"):
            raise ValueError("sanitize_control_tokens is not known to this tokenizer: leave it out")
        tokenizer_kwargs = {"split_special_tokens": False, **(tokenizer_kwargs or {})}
        return super().apply_chat_template(*args, tokenizer_kwargs=tokenizer_kwargs, **kwargs)

    def _convert_id_to_token(self, index: int) -> str:
        # a padded embedding has more rows than there are pieces
        return str(self.sp_model.IdToPiece(index)) if index < self.sp_model.get_piece_size() else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of pieces; special and added tokens keep their spelling, the unknown has SentencePiece's sign."""
        spelled = (set(self.all_special_tokens) | set(self._added_tokens_encoder)) - {self.unk_token}
        runs = groupby((token for token in tokens if token), key=spelled.__contains__)
        return "".join("".join(run) if is_spelled else self.sp_model.decode(list(run)) for is_spelled, run in runs)
