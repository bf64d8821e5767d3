"""Turn a dense model into low_rank, crnet or relora: a checkpoint of step 0 that any layout continues.

    %(prog)s models/llama runs/small/checkpoints --compression 2 --text my/text
    %(prog)s runs/dense runs/small/checkpoints --model.variant low_rank --model.rank 64
    %(prog)s runs/dense runs/small/checkpoints --config run.yaml --config ranks.yaml --prefix data/train

DENSE is a Hugging Face LLaMA, GPT-2, Qwen3 or Qwen3-MoE, or an export, a checkpoint or a run of variant full_rank. The
model section comes from it; configuration options say what is to differ: variant (default: crnet), rank,
full_rank_layers. Without model.rank each map keeps 1 / --compression of its parameters.

low_rank takes the truncated SVD of each weight; with calibration text, and for crnet always, each map is fitted to its
outputs on that text, experts without a chain. relora keeps the dense weights and adds factors, so that no warm start is
needed (docs/from-dense.md). One layer at a time is in memory; several GPUs share the rows.
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_crnet.analysis.options import add_calibration_options, check_calibration, open_named, read_rows
from megatron_crnet.cli.main import Call
from megatron_crnet.config.loading import ConfigParser, Values, resolved
from megatron_crnet.config.schema import Config
from megatron_crnet.utils.errors import require, require_positive
from megatron_crnet.utils.progress import CountPrinter

if TYPE_CHECKING:
    from megatron_crnet.analysis.from_dense import FittedMap
    from megatron_crnet.analysis.source import SourceModel
    from megatron_crnet.config.positions import PositionTable

COMPRESSION = 2.0


def build_parser(prog: str) -> ConfigParser:
    """The options."""
    parser = ConfigParser(prog=prog, description=__doc__)
    parser.add_argument("dense", type=Path, metavar="DENSE", help="the dense model")
    parser.add_argument("folder", type=Path, help="writes FOLDER/step_00000000: checkpoint.dir of the run to come")
    parser.add_argument(
        "--compression", type=float, help=f"parameters of a map before and after (default: {COMPRESSION:g})"
    )
    add_calibration_options(parser, required=False)
    return parser


def run(call: Call) -> int:
    """Convert, and print how near each fitted map is."""
    parser = build_parser(call.prog)
    args = parser.own_options(call.argv)
    check_calibration(args)
    if args.compression is not None:
        require_positive("init", compression=args.compression)
    from megatron_crnet.utils.files import sigterm_unwinds

    source = open_named(args.dense, args)
    base = _base(source, args.compression or COMPRESSION)
    config = parser.read(call.argv, deepcopy(base))[1]
    require(
        args.compression is None or config.model.rank == base["model"]["rank"],
        "--compression and model.rank are both given: leave one of them out",
    )
    with sigterm_unwinds():
        _convert(source, config, args)
    return 0


def _base(source: SourceModel, compression: float) -> Values:
    """The dense model's own section, as that of a crnet with PELA's ranks."""
    from megatron_crnet.analysis.from_dense import compressed_ranks

    model = resolved(source.config)["model"]
    ranks = compressed_ranks(source.table, compression)
    return {
        "model": {**model, "variant": "crnet", "rank": ranks, "full_rank_layers": None},
        "training": {"seq_length": source.longest},
    }


def _convert(source: SourceModel, config: Config, args: argparse.Namespace) -> None:
    from megatron_crnet.analysis.from_dense import Conversion, check_target
    from megatron_crnet.analysis.stream import default_devices
    from megatron_crnet.config.model_size import total_parameters
    from megatron_crnet.data.fingerprint import TrainedOn, digest_of_tokenizer
    from megatron_crnet.hf.export import with_tokenizer
    from megatron_crnet.hf.starting_checkpoint import write_starting_checkpoint

    check_target(source.config, config, has_text=args.text is not None or args.prefix is not None)
    progress = CountPrinter("layers", config.model.num_layers)
    rows = read_rows(source, args)
    conversion = Conversion(source, config, rows, default_devices(), args.batch_size, progress=progress)
    trained_on = TrainedOn(digest_of_tokenizer(source.tokenizer))
    # with the tokenizer that the embedding was trained with
    saved = with_tokenizer(config, str(source.config.data.tokenizer_model))
    target = write_starting_checkpoint(args.folder, saved, trained_on, f"dense {source.path}", conversion.weights())
    if conversion.fits:
        print(_table(conversion.fits, conversion.table))
    inputs = max(conversion.table.shapes[name][0] for name in conversion.table.architecture.names)
    if rows is not None and rows.numel() < inputs:
        print(
            f"the text has {rows.numel()} tokens, fewer than the {inputs} inputs of a map, so the errors say little "
            "of other text: give more, or raise --tokens"
        )
    if conversion.unfitted:
        print(
            f"{conversion.unfitted} maps of experts are the SVD of their weights, because the text gives these experts "
            "fewer tokens than the maps have inputs: more --tokens fits more of them"
        )
    before, after = (total_parameters(one.model) for one in (source.config, config))
    print(
        f"{target}: {after:,} parameters of {before:,}; continue it with checkpoint.dir {args.folder} and the model "
        f"section of {target / 'config.yaml'}"
    )


def _table(fits: list[FittedMap], positions: PositionTable) -> str:
    """Relative errors of outputs on the calibration text, by layer and position."""
    from megatron_crnet.utils.tables import table

    header = ["layer", "position", "rank", "s(beta)", "error", "without s(beta)"]
    rows = [
        [
            str(fit.layer),
            _label(fit, positions.copies(fit.position)),
            str(fit.rank),
            "-" if fit.scale is None else f"{fit.scale:.4f}",
            f"{fit.error:.4f}",
            f"{fit.plain_error:.4f}",
        ]
        for fit in fits
    ]
    return table(header, rows, text_columns=2)


def _label(fit: FittedMap, copies: int) -> str:
    """The position, and of how many experts it is one line."""
    return fit.position if copies == 1 else f"{fit.position} of {fit.fitted}/{copies} experts"
