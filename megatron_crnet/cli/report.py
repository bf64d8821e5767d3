"""Make one page of runs, benchmarks, estimates and simulations: curves, scaling, memory, traffic, commands.

    %(prog)s runs/quickstart benchmark.json -o report.html

Takes folders of runs (metrics.jsonl, config.yaml, run.json, and any JSON file beside them), files of crnet benchmark,
and JSON of estimates and of simulations. The page is self-contained; the same in Markdown lies beside it. What is
missing or damaged is named in a line, on the page as well, and the rest is reported.
Exit status: 0 a report was made, 2 nothing at all could be read, or the report cannot be written.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_crnet.cli.main import Call
from megatron_crnet.config.options import ToolParser
from megatron_crnet.utils.errors import DataError, require, require_positive


def build_parser(prog: str) -> ToolParser:
    """The options."""
    parser = ToolParser(prog=prog, description=__doc__)
    parser.add_argument("inputs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or a JSON file")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="page; .md lies beside it")
    parser.add_argument("--overwrite", action="store_true", help="replace an older page")
    parser.add_argument("--title", default="CR-Net: scaling report")
    parser.add_argument("--peak-tflops", type=float, help="of one device, for the MFU of runs; default: its data sheet")
    return parser


def run(call: Call) -> int:
    """Read, say what is absent, write; returns the exit status."""
    args = build_parser(call.prog).parse_args(call.argv)
    from megatron_crnet.utils.files import atomic_files, refuse_existing

    require(
        args.output.suffix in (".html", ".htm"),
        f"--output is {args.output}, but must end in .html, because Markdown lies beside it: correct it",
    )
    markdown = args.output.with_suffix(".md")
    if not args.overwrite:
        refuse_existing(markdown, args.output)
    if args.peak_tflops is not None:
        require_positive("report", peak_tflops=args.peak_tflops)
    from megatron_crnet.reporting.inputs import read_inputs
    from megatron_crnet.reporting.page import html_page, markdown_page
    from megatron_crnet.reporting.scaling_report import build_sections
    from megatron_crnet.utils.environment import command_line

    inputs = read_inputs(args.inputs)
    for problem in inputs.say():
        print(f"warning: {problem}", file=sys.stderr)
    if inputs.is_empty:
        raise DataError(
            f"none of the {len(args.inputs)} inputs could be read, so there is nothing to report: give the folder of a "
            "run or a file of crnet benchmark"
        )
    peak = None if args.peak_tflops is None else args.peak_tflops * 1e12
    sections = build_sections(inputs, peak, command_line(call.words))
    introduction = inputs.summary()
    pages = {markdown: markdown_page, args.output: html_page}
    with atomic_files(*pages, overwrite=args.overwrite) as temporaries:
        for path, write in zip(temporaries, pages.values(), strict=True):
            # names of files may hold bytes that are no text
            path.write_bytes(write(args.title, introduction, sections).encode("utf-8", "replace"))
    print(f"{args.output} and {markdown}: {introduction}")
    return 0
