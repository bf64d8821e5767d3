"""Continue prompts with a trained model, an export or a checkpoint.

    %(prog)s --model runs/quickstart --prompt 'def read_lines(path):' --max-new-tokens 64
    %(prog)s --model exports/quickstart --prompt-file prompts.txt --temperature 0.7 --top-p 0.9 --seed 3

All prompts are one batch.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from megatron_crnet.cli.main import Call
from megatron_crnet.config.options import ToolParser
from megatron_crnet.utils.errors import DataError, require


def build_parser(prog: str) -> ToolParser:
    """The options."""
    parser = ToolParser(prog=prog, description=__doc__)
    parser.add_argument("--model", required=True, help="an export, a checkpoint, or the folder of a run")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", nargs="+", help="texts to continue")
    prompts.add_argument("--prompt-file", type=Path, help="a file with one prompt per line")
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
    return parser


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
        raise DataError(f"--prompt-file {path} holds no prompt: write one per line")
    return prompts


def run(call: Call) -> int:
    """Print the texts."""
    args = build_parser(call.prog).parse_args(call.argv)
    from megatron_crnet.hf.generate import Sampling, generate, open_model

    for name in ("model", "tokenizer"):
        require(getattr(args, name) != "", f"--{name} is empty: give a path")
    prompts = args.prompt or read_prompts(args.prompt_file)
    sampling = Sampling(0.0 if args.greedy else args.temperature, args.top_k, args.top_p, args.seed)
    opened = open_model(Path(args.model), dtype=args.dtype, tokenizer=args.tokenizer)
    for note in opened.notes:
        print(f"warning: {note}", file=sys.stderr)
    found = generate(opened, prompts, args.max_new_tokens, sampling, use_cache=not args.no_cache)
    if args.json:
        print(json.dumps([asdict(one) for one in found], indent=1, ensure_ascii=False))
    else:
        print("\n---\n".join(f"{one.prompt}{one.text}" for one in found))
    return 0
