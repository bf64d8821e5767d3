"""Measure the paper's observation on a model: is a layer's output the previous layer's and a low-rank difference?

    %(prog)s models/llama --text my/text --json observation.json
    %(prog)s runs/dense --every-checkpoint --prefix data/valid --ranks 24 48 96 --json observation.json

MODEL is a Hugging Face LLaMA, GPT-2, Qwen3 or Qwen3-MoE, an export, a checkpoint or a run, of any variant. For each
layer and linear map: relative errors of LR_r(Y_l) and of b Y_(l-1) + LR_r(Y_l - b Y_(l-1)) with the best b, their ratio
(the paper: 0.4 to 0.97 at r = h/4), the cosine similarity of Y_l and Y_(l-1), and spectra. Of gate, up and down of
experts, which had other tokens in the layer before, there is the first error alone; of what the experts of a layer give
together, both. `crnet report FILE` draws them.

One layer at a time is in memory; several GPUs share the rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_crnet.analysis.options import add_calibration_options, check_calibration, open_named, read_rows
from megatron_crnet.cli.main import Call
from megatron_crnet.config.options import ToolParser
from megatron_crnet.utils.errors import DataError, require, require_positive
from megatron_crnet.utils.progress import CountPrinter
from megatron_crnet.utils.record_file import add_record_options, check_record_file, report_record

if TYPE_CHECKING:
    from megatron_crnet.analysis.source import SourceModel


def build_parser(prog: str) -> ToolParser:
    """The options."""
    parser = ToolParser(prog=prog, description=__doc__)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="models to look at")
    parser.add_argument("--every-checkpoint", action="store_true", help="of each run, instead of the newest alone")
    parser.add_argument("--ranks", type=int, nargs="+", metavar="R", help="default: h/8, h/4 and h/2")
    add_calibration_options(parser, required=True)
    add_record_options(parser)
    return parser


def run(call: Call) -> int:
    """Measure, print the tables and write the record."""
    args = build_parser(call.prog).parse_args(call.argv)
    check_calibration(args)
    require_positive("observation", **{f"ranks[{i}]": rank for i, rank in enumerate(args.ranks or [])})
    check_record_file(args.json, overwrite=args.overwrite)
    from megatron_crnet.reporting.observation import observation_text
    from megatron_crnet.utils.environment import run_metadata

    models = [_observed(name, source, args) for name, source in _sources(args)]
    if not models:
        raise DataError("no checkpoint of the models could be read: give other models")
    record = {**run_metadata("observation", call.words), "models": models}
    report_record(args.json, record, observation_text(record))
    return 0


def _sources(args: argparse.Namespace) -> Iterator[tuple[str, SourceModel]]:
    from megatron_crnet.checkpoint.directory import checkpoints_at
    from megatron_crnet.reporting.records import numbered

    names = list[str]()
    for path in args.models:
        names.append(name := numbered(_name(path.resolve()), names))
        if not args.every_checkpoint or (path / "config.json").is_file():
            yield name, open_named(path, args)
            continue
        for checkpoint in checkpoints_at(path):
            try:
                yield name, open_named(checkpoint, args)
            except DataError as error:
                print(f"warning: {error}", file=sys.stderr)


def _name(path: Path) -> str:
    """The name of an export or of a run."""
    from megatron_crnet.checkpoint.directory import PREFIX

    while path.name.startswith(PREFIX) or path.name == "checkpoints":
        path = path.parent
    return path.name


def _observed(name: str, source: SourceModel, args: argparse.Namespace) -> dict[str, Any]:
    from megatron_crnet.analysis.observation import default_ranks, observe
    from megatron_crnet.analysis.stream import default_devices
    from megatron_crnet.config.positions import position_table

    rows = read_rows(source, args)
    assert rows is not None
    model = source.config.model
    ranks = sorted({*(args.ranks or default_ranks(model.hidden_size))})
    largest = max(min(shape) for shape in position_table(model).shapes.values())
    require(
        args.ranks is None or ranks[0] < largest,
        f"--ranks {ranks[0]} is not below {largest}, the largest rank of any map of {name}, so that nothing is left to "
        f"approximate: use at most {largest - 1}",
    )
    shown = name if source.step is None else f"{name}, step {source.step}"
    progress = CountPrinter(f"layers of {shown}", model.num_layers)
    maps = observe(source, rows, ranks, default_devices(), args.batch_size, progress)
    about = {"name": name, "step": source.step, "variant": model.variant, "hidden_size": model.hidden_size}
    return {**about, "ranks": ranks, "tokens": rows.numel(), "maps": [asdict(one) for one in maps]}
