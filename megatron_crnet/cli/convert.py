"""Turn a checkpoint into a folder that Hugging Face transformers opens, and such a folder into a checkpoint.

    %(prog)s to-hf runs/quickstart exports/quickstart
    %(prog)s from-hf exports/quickstart runs/continued/checkpoints

One process, whatever layout has written the checkpoint or will continue it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_crnet.cli.main import Call
from megatron_crnet.config.options import ToolParser


def build_parser(prog: str) -> ToolParser:
    """The options."""
    parser = ToolParser(prog=prog, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("to-hf", help="checkpoint -> Hugging Face")
    out.add_argument("checkpoint", type=Path, help="a step_ folder, a folder of them (the newest whole one), or a run")
    out.add_argument("out", type=Path, help="the folder to write")
    out.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of all but beta (default: fp32)")
    out.add_argument("--tokenizer", help="path of the tokenizer, where the checkpoint's configuration is out of date")
    out.add_argument("--shard-size", default="5GB", help="largest file of weights (default: %(default)s)")
    out.add_argument("--plain", action="store_true", help="of a full-rank model: for Transformers' own class")
    out.add_argument("--overwrite", action="store_true", help="replace an older export")
    back = commands.add_parser("from-hf", help="Hugging Face -> checkpoint")
    back.add_argument("export", type=Path, help="a folder that to-hf has written, or a LLaMA, GPT-2 or Qwen3")
    back.add_argument("--tokenizer", help="path of the tokenizer for the run to come (default: the export's own)")
    back.add_argument("folder", type=Path, help="writes FOLDER/step_00000000: checkpoint.dir of the run to come")
    return parser


def run(call: Call) -> int:
    """Convert the way that was asked for."""
    args = build_parser(call.prog).parse_args(call.argv)
    from megatron_crnet.utils.files import sigterm_unwinds

    with sigterm_unwinds():
        _to_hf(args) if args.command == "to-hf" else _from_hf(args)
    return 0


def _to_hf(args: argparse.Namespace) -> None:
    from megatron_crnet.checkpoint.contents import find_checkpoint
    from megatron_crnet.hf.export import to_hf

    checkpoint, notes = find_checkpoint(args.checkpoint)
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    parameters = to_hf(
        checkpoint,
        args.out,
        dtype=args.dtype,
        tokenizer=args.tokenizer,
        shard_size=args.shard_size,
        plain=args.plain,
        overwrite=args.overwrite,
    )
    print(f"{args.out}: {parameters:,} parameters of {checkpoint}")


def _from_hf(args: argparse.Namespace) -> None:
    from megatron_crnet.hf.export import from_hf
    from megatron_crnet.hf.export_tokenizer import note_on_added_tokens

    checkpoint = from_hf(args.export, args.folder, args.tokenizer)
    if not args.tokenizer and (note := note_on_added_tokens(args.export)):
        print(f"warning: {note}", file=sys.stderr)
    print(f"{checkpoint}: continue it with checkpoint.dir {args.folder} and the same model section")
