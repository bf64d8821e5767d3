"""Trains a SentencePiece model that encodes any text without loss, as source code needs it.

Special ids are T5's: pad 0, eos 1, unk 2. Text is not normalized, no space is added or dropped, runs of spaces are
pieces, and characters outside the vocabulary are encoded as bytes. SentencePiece writes a space as U+2581 and would
decode that character to a space: the model holds one rule that escapes it and one that restores it.
"""

from __future__ import annotations

import io
import random
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from megatron_crnet.utils.errors import ConfigError, DataError, require
from megatron_crnet.utils.files import atomic_files, output_files
from megatron_crnet.utils.progress import format_duration

BLOCK_CHARACTERS = 1000
SMALLEST_VOCABULARY = 300
"""256 byte pieces, 3 special ones, and a few characters."""
LARGEST_VOCABULARY = 1 << 20
SECONDS_PER_CHARACTER = 2e-6
"""CPU time of training, measured on source code: 1.1e-6 to 2.9e-6."""
MOST_THREADS = 1024
"""SentencePiece's own limit."""
ESCAPES = {"\u2581": "\x10_", "\x10": "\x10\x10"}
"""How SentencePiece's sign for a space, and the character that escapes it, are written inside the model."""


def train_sentencepiece(
    texts: Iterable[str],
    out_prefix: str | Path,
    vocab_size: int,
    *,
    num_threads: int = 1,
    sample_bytes: int | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Train a unigram model on a sample of `texts` and write OUT_PREFIX.model.

    The same texts, sizes and number of threads give the same file; another number of threads sums in another order.

    Args:
        texts: documents; read once, never all in memory.
        vocab_size: pieces of the model, bytes and special ones included; fewer if the texts do not support so many.
        num_threads: threads of SentencePiece's trainer.
        sample_bytes: approximate characters to train on; None takes 512 per piece, beyond which tokens got less than
            1% longer on source code while time grew in proportion.
        say: called with a line on what training begins and how long it may take.

    Raises:
        ConfigError: `vocab_size` is too small for the alphabet or beyond sense, or so are the other numbers.
        DataError: no text, or the output exists or has no name.
    """
    require(
        SMALLEST_VOCABULARY <= vocab_size <= LARGEST_VOCABULARY,
        f"vocab_size is {vocab_size}, but 256 bytes, 3 special pieces and an alphabet must fit, and training must "
        f"end: use {SMALLEST_VOCABULARY} to {LARGEST_VOCABULARY}",
    )
    require(
        1 <= num_threads <= MOST_THREADS,
        f"num_threads is {num_threads}, but must be 1 to {MOST_THREADS}: use one per CPU",
    )
    require(
        sample_bytes is None or sample_bytes > 0,
        f"sample_bytes is {sample_bytes}, but must be positive: leave it out for a good default",
    )
    (target,) = output_files(out_prefix, ".model")
    with atomic_files(target, overwrite=overwrite) as (temporary,):
        blocks = sample_blocks(texts, (sample_bytes or 512 * vocab_size) // BLOCK_CHARACTERS + 1)
        if say is not None:
            characters = sum(map(len, blocks))
            cost = format_duration(SECONDS_PER_CHARACTER * characters)
            say(f"training up to {vocab_size:,} pieces on {characters:,} characters, roughly {cost} of CPU time")
        temporary.write_bytes(_train(blocks, vocab_size, num_threads))
    return target


def sample_blocks(texts: Iterable[str], count: int) -> list[str]:
    """Draw `count` blocks of text uniformly from all, in their order (reservoir sampling, fixed seed)."""
    generator = random.Random(0)
    kept: list[tuple[int, str]] = []
    for position, block in enumerate(block for text in texts for block in split_blocks(text)):
        if len(kept) < count:
            kept.append((position, block))
        elif (slot := generator.randrange(position + 1)) < count:
            kept[slot] = (position, block)
    return [block for _, block in sorted(kept)]


def split_blocks(text: str) -> Iterator[str]:
    """Cut at line ends into blocks of at most BLOCK_CHARACTERS; a longer line is cut inside.

    Blocks of several lines let a newline and indentation become one piece.
    """
    block = ""
    for line in text.splitlines(keepends=True):
        if block and len(block) + len(line) > BLOCK_CHARACTERS:
            yield block
            block = ""
        block += line
        while len(block) > BLOCK_CHARACTERS:
            yield block[:BLOCK_CHARACTERS]
            block = block[BLOCK_CHARACTERS:]
    if block:
        yield block


def _train(blocks: list[str], vocab_size: int, num_threads: int) -> bytes:
    from sentencepiece import SentencePieceTrainer

    if not blocks:
        raise DataError("the corpus holds no text to train a tokenizer on: give files with text")
    model = io.BytesIO()
    try:
        with tempfile.TemporaryDirectory() as folder:
            SentencePieceTrainer.train(
                sentence_iterator=iter(blocks),
                model_writer=model,
                model_type="unigram",
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                pad_id=0,
                eos_id=1,
                unk_id=2,
                bos_id=-1,
                byte_fallback=True,
                normalization_rule_tsv=_rules(Path(folder, "escape.tsv"), ESCAPES),
                denormalization_rule_tsv=_rules(Path(folder, "restore.tsv"), {b: a for a, b in ESCAPES.items()}),
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                max_sentence_length=8 * BLOCK_CHARACTERS,
                # fewer candidates and larger pruning steps than the default: a third of the time for the same tokens
                seed_sentencepiece_size=25 * vocab_size,
                shrinking_factor=0.6,
                num_threads=num_threads,
                minloglevel=2,
            )
    except RuntimeError as error:
        message = f"SentencePiece cannot train vocab_size {vocab_size} on these texts: {error}: change one"
        if found := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
            message = (
                f"vocab_size is {vocab_size}, but the alphabet of the texts alone needs {found[1]} pieces: use more"
            )
        raise ConfigError(message) from error
    return _without_paths(model.getvalue())


def _rules(path: Path, rules: dict[str, str]) -> str:
    """Write replacements in SentencePiece's format: code points in hexadecimal."""
    lines = ("\t".join(" ".join(f"{ord(letter):X}" for letter in side) for side in rule) for rule in rules.items())
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def _without_paths(model: bytes) -> bytes:
    """The model without the file names of its rules, which it holds compiled."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    for spec in (proto.normalizer_spec, proto.denormalizer_spec):
        spec.ClearField("normalization_rule_tsv")
    content: bytes = proto.SerializeToString()
    return content
