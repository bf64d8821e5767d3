"""Continue prompts with a trained model, an export or a checkpoint.

    python tools/generate.py --model runs/quickstart --prompt 'def read_lines(path):' --max-new-tokens 64
    python tools/generate.py --model exports/quickstart --prompt-file prompts.txt --temperature 0.7 --top-p 0.9 --seed 3

All prompts are one batch.
"""

from __future__ import annotations

from megatron_crnet.utils.errors import ctrl_c_is_one_line

if __name__ == "__main__":
    ctrl_c_is_one_line()  # during the imports below as well

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megatron_crnet.config.options import ToolParser
from megatron_crnet.utils.errors import DataError, reported, require


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = ToolParser(description=__doc__)
    parser.add_argument("--model", required=True, help="an export, a checkpoint, or the folder of a run")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", nargs="+", help="texts to continue")
    prompts.add_argument("--prompt-file", type=Path, help="a file with one prompt a line")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="default: %(default)s")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--greedy", action="store_true", help="always the likeliest token")
    how.add_argument("--temperature", type=float, default=1.0, help="divides the logits (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="only the K likeliest tokens (default: all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="only the likeliest that sum to P (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    parser.add_argument("--no-cache", action="store_true", help="compute all tokens again for each new one")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s")
    parser.add_argument("--tokenizer", help="path of the tokenizer (default: the model's own)")
    parser.add_argument("--json", action="store_true", help="print a JSON list of prompt, text and token ids")
    return parser.parse_args()


def read_prompts(path: Path) -> list[str]:
    """Lines that are not empty.

    Raises:
        DataError: the file cannot be read or holds none.
    """
    try:
        # of the line ends that Python knows, U+2028 and others stand inside of prompts
        lines = [line.removesuffix("\r") for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompt-file {path} cannot be read ({error}): give a UTF-8 text file") from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise DataError(f"--prompt-file {path} holds no prompt: write one a line")
    return prompts


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One record for each prompt."""
    from megatron_crnet.hf.generate import Sampling, continue_prompts, open_model

    for name in ("model", "tokenizer"):
        require(getattr(args, name) != "", f"--{name} is empty: give a path")
    prompts = args.prompt or read_prompts(args.prompt_file)
    sampling = Sampling(0.0 if args.greedy else args.temperature, args.top_k, args.top_p, args.seed)
    opened = open_model(Path(args.model), dtype=args.dtype, tokenizer=args.tokenizer)
    for note in opened.notes:
        print(f"warning: {note}", file=sys.stderr)
    found = continue_prompts(opened, prompts, args.max_new_tokens, sampling, use_cache=not args.no_cache)
    return [
        {"prompt": prompt, "text": opened.tokenizer.detokenize(ids), "tokens": ids}
        for prompt, ids in zip(prompts, found, strict=True)
    ]


def show(args: argparse.Namespace) -> int:
    """Print the texts."""
    records = run(args)
    if args.json:
        print(json.dumps(records, indent=1, ensure_ascii=False))
        return 0
    print("\n---\n".join(f"{record['prompt']}{record['text']}" for record in records))
    return 0


def main() -> int:
    """Run; returns the exit status."""
    args = parse_arguments()
    return reported(lambda: show(args))


if __name__ == "__main__":
    sys.exit(main())
