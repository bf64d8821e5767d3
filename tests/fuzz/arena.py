"""Sound inputs of every kind, made by this project's own programs, small enough to be copied for each case."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from tests.fuzz.runner import Case, run_case

CONFIG: dict[str, dict[str, Any]] = {
    "model": {
        "variant": "crnet",
        "num_layers": 3,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "vocab_size": 512,
        "rank": 8,
    },
    "data": {
        "train_data_path": ["train"],
        "valid_data_path": ["valid"],
        "tokenizer_model": "tokenizer.model",
        "cache_path": "cache",
    },
    "training": {
        "train_steps": 2,
        "micro_batch_size": 2,
        "global_batch_size": 2,
        "seq_length": 16,
        "dtype": "fp32",
        "eval_interval": 2,
        "eval_steps": 1,
    },
    "optimizer": {"lr": 1e-3, "lr_warmup_steps": 1},
    "checkpoint": {"save_interval": 1},
    "logging": {"output_dir": "run", "log_interval": 1},
    "deepspeed": {"zero_optimization": {"stage": 1}},
}


def build(folder: Path) -> None:
    """Fill `folder`: text, tokenizer, train and valid .bin/.idx, config.yaml, a run, an export, a report's JSON."""
    folder.mkdir(parents=True)
    library = Path(json.__file__).parent
    (folder / "text").mkdir()
    for path in [*library.glob("*.py"), *(library.parent / "logging").glob("*.py")]:
        shutil.copy(path, folder / "text" / f"{path.parent.name}_{path.name}.txt")
    documents = [{"text": f"def f{i}(x):\n    return x + {i}\n"} for i in range(200)]
    (folder / "valid.jsonl").write_text("".join(json.dumps(line) + "\n" for line in documents))
    write_config(folder / "config.yaml", CONFIG)
    for program, *argv in (
        ("tools/train_tokenizer.py", "text", "--output", "tokenizer", "--vocab-size", "512"),
        (
            "tools/preprocess_data.py",
            "text",
            "--output",
            "train",
            "--tokenizer-model",
            "tokenizer.model",
            "--workers=0",
        ),
        (
            "tools/preprocess_data.py",
            "valid.jsonl",
            "--output",
            "valid",
            "--tokenizer-model",
            "tokenizer.model",
            "--workers=0",
        ),
        ("pretrain_crnet.py", "--config", "config.yaml"),
        ("tools/convert_checkpoint.py", "to-hf", "run", "export"),
        ("tools/simulate.py", "--config", "config.yaml", "--json"),
    ):
        found = run_case(Case("a sound input", program, tuple(argv)), folder)
        assert found.status == 0, (program, found.output, found.errors)
    (folder / "figures.json").write_text(found.output)


def write_config(path: Path, sections: dict[str, dict[str, Any]]) -> None:
    path.write_text(yaml.safe_dump(sections, sort_keys=False))
