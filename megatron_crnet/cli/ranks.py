"""Choose the rank of every linear map from spectra on calibration text, under a budget.

    %(prog)s runs/dense --text my/text --like-rank 48 --output ranks.yaml
    %(prog)s models/llama --text my/text --parameters 3.5e9 --output ranks.yaml

MODEL is a Hugging Face LLaMA, GPT-2, Qwen3 or Qwen3-MoE, an export, a checkpoint or a run, of any variant: a dense
model, or a short run. Ranks go where singular values of Y_l - s Y_(l-1) (crnet) or Y_l (low_rank, and experts) are
large, for their cost; the experts of a layer share a rank for each of gate, up and down. The budget is that of one rank
for all maps (--like-rank), or parameters of the whole model, or operations per token.

Writes FILE.yaml, which goes to crnet train and crnet init as a further --config, and FILE.html with a picture of the
spectra and of the choice.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_crnet.analysis.options import add_calibration_options, check_calibration, open_named, read_rows
from megatron_crnet.cli.main import Call
from megatron_crnet.config.options import ToolParser
from megatron_crnet.config.schema import OF_VARIANT, ModelConfig
from megatron_crnet.utils.errors import require, require_positive
from megatron_crnet.utils.progress import CountPrinter

if TYPE_CHECKING:
    from megatron_crnet.analysis.ranks import Budget
    from megatron_crnet.analysis.source import SourceModel

VARIANTS = ("crnet", "low_rank")


def build_parser(prog: str) -> ToolParser:
    """The options."""
    parser = ToolParser(prog=prog, description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", help="the model to look at")
    parser.add_argument("-o", "--output", type=Path, required=True, help="FILE.yaml; FILE.html lies beside it")
    parser.add_argument("--overwrite", action="store_true", help="replace older files")
    parser.add_argument("--variant", choices=VARIANTS, default="crnet", help="to choose for (default: %(default)s)")
    parser.add_argument("--full-rank-layers", type=int, nargs="*", metavar="L", help="default: the variant's")
    parser.add_argument("--full-rank-experts", action="store_true", help="choose for attention alone")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--like-rank", type=int, metavar="R", help="as many parameters as with this rank everywhere")
    budget.add_argument("--parameters", type=float, help="of the whole model")
    budget.add_argument("--operations", type=float, help="per token, forward and backward, of the whole model")
    parser.add_argument("--multiple", type=int, help="that ranks are rounded to (default: up to 64, at most h/16)")
    add_calibration_options(parser, required=True)
    return parser


def run(call: Call) -> int:
    """Choose, print the table and write both files."""
    args = build_parser(call.prog).parse_args(call.argv)
    check_calibration(args)
    numbers = {name: getattr(args, name) for name in ("like_rank", "parameters", "operations", "multiple")}
    require_positive("ranks", **{name: value for name, value in numbers.items() if value is not None})
    require(
        args.output.suffix in (".yaml", ".yml"),
        f"--output is {args.output}, but must end in .yaml, because a page lies beside it: correct it",
    )
    from megatron_crnet.utils.files import refuse_existing

    if not args.overwrite:
        refuse_existing(args.output.with_suffix(".html"), args.output)
    _choose(open_named(args.model, args), args, call)
    return 0


def _choose(source: SourceModel, args: argparse.Namespace, call: Call) -> None:
    from megatron_crnet.analysis.ranks import (
        check_budget,
        choose_ranks,
        has_largest_ranks,
        rank_multiple,
        rank_setting,
        spectra_of,
        uniform_rank,
    )
    from megatron_crnet.analysis.stream import default_devices
    from megatron_crnet.reporting.page import html_page
    from megatron_crnet.reporting.rank_choice import rank_section, rank_yaml
    from megatron_crnet.utils.environment import command_line
    from megatron_crnet.utils.files import atomic_files

    model = replace(
        source.config.model,
        variant=args.variant,
        rank=args.like_rank or 1,
        **{**OF_VARIANT, "full_rank_layers": args.full_rank_layers},
        full_rank_experts=args.full_rank_experts,
    )
    require(
        model.num_experts is not None or not args.full_rank_experts,
        f"--full-rank-experts is given, but {args.model} has no experts: leave it out",
    )
    budget = _budget(model, args, args.seq_length or source.longest)
    multiple = args.multiple or rank_multiple(model.hidden_size)
    check_budget(model, budget, multiple)
    rows = read_rows(source, args)
    assert rows is not None
    uniform, progress = uniform_rank(model, budget), CountPrinter("layers", model.num_layers)
    with atomic_files(args.output.with_suffix(".html"), args.output, overwrite=args.overwrite) as (page, setting):
        spectra = spectra_of(source, model, rows, uniform, default_devices(), args.batch_size, progress)
        ranks = choose_ranks(model, spectra, budget, multiple)
        chosen = replace(model, rank=rank_setting(ranks, model.num_layers))
        section = rank_section(chosen, spectra, ranks, uniform, has_largest_ranks(model, ranks, budget, multiple))
        section.code.append(command_line(call.words))
        print("\n\n".join([*(table.markdown() for table in section.tables), *section.notes]), flush=True)
        page.write_text(html_page("Ranks", section.text, [section]))
        setting.write_text(rank_yaml(chosen, command_line(call.words)))


def _budget(model: ModelConfig, args: argparse.Namespace, seq_length: int) -> Budget:
    from megatron_crnet.analysis.ranks import operation_budget, parameter_budget
    from megatron_crnet.config.model_size import total_parameters

    if args.operations is not None:
        return operation_budget(model, args.operations, seq_length)
    return parameter_budget(model, args.parameters or total_parameters(model))
