"""Turn a checkpoint into a folder that Hugging Face transformers opens, and such a folder into a checkpoint.

    python tools/convert_checkpoint.py to-hf runs/quickstart exports/quickstart
    python tools/convert_checkpoint.py from-hf exports/quickstart runs/continued/checkpoints

One process, whatever layout has written the checkpoint or will continue it.
"""

from __future__ import annotations

from megatron_crnet.utils.errors import ctrl_c_is_one_line

if __name__ == "__main__":
    ctrl_c_is_one_line()  # during the imports below as well

import argparse
import re
import sys
from pathlib import Path

from megatron_crnet.config.options import ToolParser
from megatron_crnet.utils.errors import reported, require
from megatron_crnet.utils.files import sigterm_unwinds


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = ToolParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("to-hf", help="checkpoint -> Hugging Face")
    out.add_argument("checkpoint", type=Path, help="a step_ folder, a folder of them (the newest whole one), or a run")
    out.add_argument("out", type=Path, help="the folder to write")
    out.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of all but beta (default: fp32)")
    out.add_argument("--tokenizer", help="path of the tokenizer, where the checkpoint's configuration is out of date")
    out.add_argument("--shard-size", default="5GB", help="largest file of weights (default: %(default)s)")
    out.add_argument("--overwrite", action="store_true", help="replace an older export")
    back = commands.add_parser("from-hf", help="Hugging Face -> checkpoint")
    back.add_argument("export", type=Path, help="a folder that to-hf has written")
    back.add_argument("--tokenizer", help="path of the tokenizer for the run to come (default: the export's own)")
    back.add_argument("folder", type=Path, help="writes FOLDER/step_00000000: checkpoint.dir of the run to come")
    return parser.parse_args()


def export(args: argparse.Namespace) -> None:
    """to-hf."""
    from megatron_crnet.checkpoint.contents import find_checkpoint
    from megatron_crnet.hf.export import to_hf

    require(
        re.fullmatch(r"[1-9]\d{0,8}(KB|MB|GB|TB)", args.shard_size) is not None,
        f"--shard-size is {args.shard_size}, but must be a number above 0 with KB, MB, GB or TB: write 5GB, say",
    )
    checkpoint, notes = find_checkpoint(args.checkpoint)
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    parameters = to_hf(
        checkpoint,
        args.out,
        dtype=args.dtype,
        tokenizer=args.tokenizer,
        shard_size=args.shard_size,
        overwrite=args.overwrite,
    )
    print(f"{args.out}: {parameters:,} parameters of {checkpoint}")


def bring_back(args: argparse.Namespace) -> None:
    """from-hf."""
    from megatron_crnet.hf.export import from_hf
    from megatron_crnet.hf.export_tokenizer import note_on_added_tokens

    checkpoint = from_hf(args.export, args.folder, args.tokenizer)
    if not args.tokenizer and (note := note_on_added_tokens(args.export)):
        print(f"warning: {note}", file=sys.stderr)
    print(f"{checkpoint}: continue it with checkpoint.dir {args.folder} and the same model section")


def convert(args: argparse.Namespace) -> int:
    """The command that was asked for."""
    with sigterm_unwinds():
        export(args) if args.command == "to-hf" else bring_back(args)
    return 0


def main() -> int:
    """Run; returns the exit status."""
    args = parse_arguments()
    return reported(lambda: convert(args))


if __name__ == "__main__":
    sys.exit(main())
