"""Odd inputs of every kind that this project reads, from a seed: `cases(kind, seed, count)`."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
import zstandard
from safetensors.torch import load_file, save_file

from tests.fuzz import odd
from tests.fuzz.arena import CONFIG
from tests.fuzz.runner import Case

TRAIN, DRY_RUN = ("--config", "config.yaml"), ("--config", "config.yaml", "--dry-run")
TRAINED = (0, 2, 3)
"""Odd but legal settings may train to a loss that is not finite."""
RESUMED = (0, 1, 2, 3)
"""A checkpoint that cannot be used ends with 1."""


def cases(kind: str, seed: int, count: int) -> Iterator[Case]:
    """`count` cases of a kind of `KINDS`, the same for the same seed."""
    for number in range(count):
        yield KINDS[kind](Random(f"{seed} {kind} {number}"))


def _configuration(rng: Random) -> Case:
    """A field of YAML has an odd value, or its text is damaged."""
    argv = rng.choice([TRAIN, DRY_RUN, DRY_RUN])
    if rng.random() < 0.3:
        return Case("damaged YAML", "pretrain_crnet.py", argv, partial(_damage_yaml, rng=rng), TRAINED)
    section, name, value = _field(rng)
    prepare = partial(_set_field, section=section, name=name, value=value)
    return Case(f"{section}.{name}: {value[:40]}", "pretrain_crnet.py", argv, prepare, TRAINED)


def _field(rng: Random) -> tuple[str, str, str]:
    from megatron_crnet.config.schema import Config

    defaults = {k: v for k, v in Config().__dict__.items() if hasattr(v, "__dataclass_fields__")}
    section = rng.choice([*defaults, "deepspeed"])
    if section == "deepspeed":
        keys = ["zero_optimization", "aio", "comms_logger", "flops_profiler", "activation_checkpointing", "timers"]
        return section, rng.choice([*keys, "gradient_clipping", "zz", "bf16"]), rng.choice([*odd.YAML, "{zz: 1}"])
    return section, rng.choice([*defaults[section].__dict__]), rng.choice(odd.YAML)


def _set_field(folder: Path, section: str, name: str, value: str) -> None:
    rest = {k: {**v} for k, v in CONFIG.items()}
    rest.get(section, {}).pop(name, None)
    body = yaml.safe_dump(rest.pop(section)) if rest.get(section) else ""
    rest.pop(section, None)
    lines = "".join(f"  {line}\n" for line in [*body.splitlines(), f"{name}: {value}"])
    text = f"{yaml.safe_dump(rest)}{section}:\n{lines}"
    (folder / "config.yaml").write_text(text, errors="surrogateescape")


def _damage_yaml(folder: Path, rng: Random) -> None:
    path = folder / "config.yaml"
    if rng.random() < 0.15:
        path.write_bytes(odd.damage_bytes(path.read_bytes(), rng))
    elif rng.random() < 0.15:
        levels = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n  " for i in range(1, 12))
        path.write_text(f"{path.read_text()}\ndeepspeed:\n  a0: &a0 [x]\n  {levels}")
    else:
        path.write_text(odd.damage_text(path.read_text(), rng))


COMMANDS: dict[str, list[tuple[str, ...]]] = {
    "pretrain_crnet.py": [TRAIN],
    "tools/preprocess_data.py": [("text", "--output", "new", "--tokenizer-model", "tokenizer.model", "--workers", "0")],
    "tools/train_tokenizer.py": [("text", "--output", "new", "--vocab-size", "400")],
    "tools/evaluate.py": [
        ("--model", "export", "--data", "valid", "--max-tokens", "64"),
        ("--model", "run", "--text", "text"),
    ],
    "tools/generate.py": [("--model", "export", "--prompt", "def", "--max-new-tokens", "4", "--temperature", "0.5")],
    "tools/convert_checkpoint.py": [("to-hf", "run", "new"), ("from-hf", "export", "new")],
    "tools/estimate.py": [TRAIN, (*TRAIN, "--world-size", "2", "--gpu", "h100")],
    "tools/plan.py": [(*TRAIN, "--gpus", "2", "--gpu", "h100", "--output", "plan.yaml")],
    "tools/simulate.py": [(*TRAIN, "--world-size", "2", "--rank", "1")],
    "tools/scaling_report.py": [("run", "figures.json", "-o", "page.html")],
    "tools/compare_runs.py": [("run", "run")],
}


def _command_line(rng: Random) -> Case:
    """A word of a command line is odd, gone, doubled or added."""
    program = rng.choice([*COMMANDS])
    argv = list(rng.choice(COMMANDS[program]))
    at = rng.randrange(len(argv))
    word = rng.choice(odd.WORDS)
    match rng.randrange(5):
        case 0:
            del argv[at]
        case 1:
            argv.insert(at, word)
        case 2 if program == "pretrain_crnet.py" or "--config" in argv:
            section, name, _ = _field(rng)
            argv.append(f"--{section}.{name}={word}")
        case _:
            argv[at] = word
    environment = {rng.choice(["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"]): word} if rng.random() < 0.1 else {}
    environment = {name: value for name, value in environment.items() if "\0" not in value}
    name = f"{program} {' '.join(argv)} {environment or ''}"
    # an evaluation or a listing may end with 0, a run as a run does
    return Case(name[:120], program, tuple(argv), statuses=RESUMED, environment=environment)


def _tokens(rng: Random) -> Case:
    """A .bin or .idx is damaged, or one of the arrays that Megatron-Core has cached."""
    return Case("damaged tokens", *_reader(rng), partial(_damage_tokens, rng=rng), TRAINED)


def _reader(rng: Random) -> tuple[str, tuple[str, ...]]:
    if rng.random() < 0.5:
        return "pretrain_crnet.py", (*TRAIN, "--logging.output_dir=new")
    return "tools/evaluate.py", ("--model", "export", "--data", "train", "--max-tokens", "500")


def _damage_tokens(folder: Path, rng: Random) -> None:
    files = [folder / "train.idx", folder / "train.idx", folder / "train.bin", *sorted(folder.glob("cache/**/*.npy"))]
    path = rng.choice(files)
    if path.suffix == ".idx" and rng.random() < 0.6:
        data = bytearray(path.read_bytes())
        at = rng.randrange(9, len(data) - 8)
        data[at : at + 4] = rng.choice([0, 1, 2**31 - 1, 2**32 - 1, 5]).to_bytes(4, "little")
        path.write_bytes(data)
    else:
        odd.damage_file(path, rng)


def _tokenizer(rng: Random) -> Case:
    """A SentencePiece model or a Hugging Face tokenizer is damaged."""
    options = ("text", "--output", "new", "--workers", "0")
    if rng.random() < 0.6:
        prepare = partial(_damage_one, names=["tokenizer.model"], rng=rng)
        if rng.random() < 0.4:
            return Case("damaged SentencePiece", "pretrain_crnet.py", TRAIN, prepare, TRAINED)
        argv = (*options, "--tokenizer-model", "tokenizer.model")
        return Case("damaged SentencePiece", "tools/preprocess_data.py", argv, prepare)
    argv = (*options, "--tokenizer-model", "hf", "--tokenizer-type", "huggingface")
    return Case("damaged Hugging Face tokenizer", "tools/preprocess_data.py", argv, partial(_hugging_face, rng=rng))


def _damage_one(folder: Path, names: list[str], rng: Random) -> None:
    odd.damage_file(folder / rng.choice(names), rng)


def _hugging_face(folder: Path, rng: Random) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["<unk>", "</s>", "<pad>", "def", "return", "x", "(", ")"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    (folder / "hf").mkdir()
    files = {
        "tokenizer.json": json.loads(made.to_str()),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "</s>",
            "pad_token": "<pad>",
        },
    }
    damaged = rng.choice([*files])
    for name, value in files.items():
        odd.write_json(folder / "hf" / name, odd.damaged_json(value, rng) if name == damaged else value)
    if rng.random() < 0.3:
        odd.damage_file(folder / "hf" / damaged, rng)


def _checkpoint(rng: Random) -> Case:
    """A checkpoint is damaged; in half of the cases its checksums are made to fit."""
    program, argv = rng.choice(
        [
            ("pretrain_crnet.py", (*TRAIN, "--training.train_steps=3")),
            ("pretrain_crnet.py", (*TRAIN, "--training.train_steps=3")),
            ("tools/convert_checkpoint.py", ("to-hf", "run/checkpoints/step_00000002", "new")),
            ("tools/evaluate.py", ("--model", "run", "--data", "valid", "--max-tokens", "64")),
        ]
    )
    return Case("damaged checkpoint", program, argv, partial(_damage_checkpoint, rng=rng), RESUMED)


def _damage_checkpoint(folder: Path, rng: Random) -> None:
    checkpoint = folder / "run/checkpoints/step_00000002"
    path = rng.choice(sorted(checkpoint.iterdir()))
    if path.suffix == ".json" and rng.random() < 0.8:
        odd.write_json(path, odd.damaged_json(json.loads(path.read_text()), rng))
    elif path.suffix == ".yaml" and rng.random() < 0.8:
        path.write_text(odd.damage_text(path.read_text(), rng))
    elif path.suffix == ".safetensors" and rng.random() < 0.5:
        _damage_tensors(path, rng)
    elif rng.random() < 0.2:
        stray = checkpoint.parent / rng.choice(
            ["step_²", "step_x", ".partial_step_1", "step_00000003", "rejected_step_9"]
        )
        stray.mkdir() if rng.random() < 0.5 else stray.write_text("x")
    else:
        odd.damage_file(path, rng)
    if rng.random() < 0.5 and path.is_file() and path.name != "manifest.json":
        _seal(checkpoint)


def _seal(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name in manifest["files"]:
        if (checkpoint / name).is_file():
            data = (checkpoint / name).read_bytes()
            manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def _damage_tensors(path: Path, rng: Random) -> None:
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    rng.choice([*TENSORS.values()])(tensors, name)
    save_file(tensors, path)


def _replaced(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor], str], None]:
    def apply(tensors: dict[str, torch.Tensor], name: str) -> None:
        tensors[name] = change(tensors[name])

    return apply


TENSORS: dict[str, Callable[[dict[str, torch.Tensor], str], Any]] = {
    "a weight is missing": lambda tensors, name: tensors.pop(name),
    "a weight too many": lambda tensors, name: tensors.update(zz=tensors[name].clone()),
    "another shape": _replaced(lambda x: torch.cat([x.flatten(), x.flatten()])),
    "not a number": _replaced(lambda x: torch.full(x.shape, float("nan"))),
    "infinite": _replaced(lambda x: torch.full(x.shape, float("inf"))),
    **{str(kind): _replaced(lambda x, kind=kind: x.to(kind)) for kind in (torch.bool, torch.int64, torch.complex64)},
}
"""What a weight of an export must not be."""


def _export(rng: Random) -> Case:
    """An export is damaged."""
    program, argv = rng.choice(
        [
            ("tools/convert_checkpoint.py", ("from-hf", "export", "new")),
            ("tools/generate.py", ("--model", "export", "--prompt", "def", "--max-new-tokens", "4", "--greedy")),
            ("tools/evaluate.py", ("--model", "export", "--data", "valid", "--max-tokens", "64")),
        ]
    )
    if rng.random() < 0.4:
        what = rng.choice([*TENSORS])
        return Case(what, program, argv, partial(_damage_weights, what=what, rng=rng), (2,))
    return Case("damaged export", program, argv, partial(_damage_export, rng=rng), RESUMED)


def _damage_weights(folder: Path, what: str, rng: Random) -> None:
    path = folder / "export/model.safetensors"
    tensors = load_file(path)
    TENSORS[what](tensors, rng.choice(sorted(tensors)))
    save_file(tensors, path, {"format": "pt"})


def _damage_export(folder: Path, rng: Random) -> None:
    path = rng.choice(sorted((folder / "export").iterdir()))
    if path.suffix == ".json" and rng.random() < 0.8:
        odd.write_json(path, odd.damaged_json(json.loads(path.read_text()), rng))
    elif path.suffix == ".py" and rng.random() < 0.5:
        path.write_text(f"open({odd.CANARY!r}, 'w')\n")
    else:
        odd.damage_file(path, rng)


def _figures(rng: Random) -> Case:
    """JSON of a report, or a run's metrics, is damaged."""
    if rng.random() < 0.3:
        return Case("damaged metrics", "tools/compare_runs.py", ("run", "run"), partial(_damage_metrics, rng=rng))
    argv = ("run", "figures.json", "-o", "page.html")
    return Case("damaged figures", "tools/scaling_report.py", argv, partial(_damage_figures, rng=rng))


def _damage_figures(folder: Path, rng: Random) -> None:
    if rng.random() < 0.4:
        _damage_metrics(folder, rng)
    path = folder / rng.choice(["figures.json", "figures.json", "run/run.json"])
    if rng.random() < 0.8:
        odd.write_json(path, odd.damaged_json(json.loads(path.read_text()), rng))
    else:
        odd.damage_file(path, rng)


def _damage_metrics(folder: Path, rng: Random) -> None:
    path = folder / "run/metrics.jsonl"
    lines = path.read_text().splitlines()
    at = rng.randrange(len(lines))
    lines[at] = rng.choice(
        ["5", "null", "[]", "", "{", "\ud800", 3000 * "[", odd.spelled({"step": odd.json_value(rng)})]
    )
    path.write_text("\n".join(lines), errors="surrogatepass")
    if rng.random() < 0.2:
        odd.damage_file(path, rng)


def _text(rng: Random) -> Case:
    """Odd text and odd folders, for preprocessing, for a tokenizer and for an evaluation."""
    program, argv = rng.choice(
        [
            (
                "tools/preprocess_data.py",
                ("odd", "--output", "new", "--tokenizer-model", "tokenizer.model", "--workers", "0"),
            ),
            ("tools/train_tokenizer.py", ("odd", "--output", "new", "--vocab-size", "300")),
            ("tools/evaluate.py", ("--model", "export", "--text", "odd", "--max-tokens", "300")),
        ]
    )
    return Case("odd text", program, argv, partial(_write_text, rng=rng))


LINES = [
    b"\xff\xfe\n",
    b"\n",
    b"5\n",
    b"null\n",
    b"{\n",
    b'{"a": 1}\n',
    b"[" * 3000 + b"\n",
    b'{"text": ' + b"9" * 5000 + b"}\n",
]
LINES += [
    f'{{"text": {value}}}\n'.encode() for value in ("5", "null", '""', '"\\ud800"', '"\\u0000\\u2028\\u2581"', "[]")
]
"""Lines of .jsonl that hold no text, or odd text."""


def _write_text(folder: Path, rng: Random) -> None:
    sound = "".join(json.dumps({"text": f"def f{i}(x): return x"}) + "\n" for i in range(50)).encode()
    lines: list[bytes] = sound.splitlines(keepends=True)
    for _ in range(rng.randrange(4)):
        lines[rng.randrange(len(lines))] = rng.choice(LINES)
    data = rng.choice([b"", b"", b"\xef\xbb\xbf", "\ufeff".encode("utf-16-le")]) + b"".join(lines)
    compress: dict[str, Callable[[bytes], bytes]] = {
        "": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zip": bytes,
        ".zst": zstandard.ZstdCompressor().compress,
    }  # fmt: skip
    suffix = rng.choice(["", "", *compress])
    data = compress[suffix](data)
    if rng.random() < 0.3:
        data = odd.damage_bytes(data, rng)
    (folder / "odd").mkdir()
    name = rng.choice(["a.jsonl", "a.jsonl", "a.jsonl", "a.JSONL", "a.txt", "a.json", "a.parquet", "a"])
    (folder / "odd" / f"{name}{suffix}").write_bytes(data)
    extra: list[Callable[[], Any]] = [
        lambda: (folder / "odd/loop").symlink_to(".."),
        lambda: (folder / "odd/broken").symlink_to("missing"),
        lambda: (folder / "odd/empty").touch(),
        lambda: (folder / "odd/sound.jsonl").write_bytes(sound),
        lambda: (folder / "odd/folder.jsonl").mkdir(),
    ]
    for make in rng.sample(extra, rng.randrange(3)):
        make()


KINDS: dict[str, Callable[[Random], Case]] = {
    "configurations": _configuration,
    "command lines": _command_line,
    "tokens": _tokens,
    "tokenizers": _tokenizer,
    "checkpoints": _checkpoint,
    "exports": _export,
    "figures": _figures,
    "text": _text,
}
