"""Tokens a second of decoding, with and without the key-value cache, for CR-Net and a plain LLaMA of the same shape.

    python tools/benchmark_decoding.py --config examples/llama2_60m.yaml --prompt-tokens 32 --new-tokens 64

Random weights, greedy, always all new tokens. One repeat runs every row once, in turn, so that a busy machine slows all
alike; what full rank is compared by is the median of the ratios within repeats. CPU time beside the clock's tells how
busy the machine was. A row's time holds the pass over the prompt.
"""

from __future__ import annotations

from megatron_crnet.utils.errors import ctrl_c_is_one_line

if __name__ == "__main__":
    ctrl_c_is_one_line()  # during the imports below as well

import argparse
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_crnet.config.options import ToolParser
from megatron_crnet.utils.errors import reported, require_positive
from megatron_crnet.utils.record_file import check_record_file, write_record
from megatron_crnet.utils.tables import table

VARIANTS = ("crnet", "low_rank", "cola", "full_rank")


@dataclass(frozen=True)
class Row:
    """One variant with or without the cache.

    Attributes:
        seconds: of each repeat, by the clock.
        cpu_seconds: of each repeat, over all threads of this process.
        tokens_per_s: median over the repeats, all sequences of the batch together.
        tokens_per_cpu_s: the same by CPU time.
        spread: (slowest - fastest repeat) / median, by the clock.
        cpu_spread: the same by CPU time.
    """

    variant: str
    cache: bool
    parameters: int
    seconds: list[float]
    cpu_seconds: list[float]
    tokens_per_s: float
    tokens_per_cpu_s: float
    spread: float
    cpu_spread: float


def measure(args: argparse.Namespace) -> list[Row]:
    """All rows."""
    import torch

    from megatron_crnet.config.loading import load_config
    from megatron_crnet.hf.generate import default_device

    numbers = {name: getattr(args, name) for name in ("batch_size", "prompt_tokens", "new_tokens", "repeats")}
    numbers |= {"threads": args.threads} if args.threads is not None else {}
    require_positive("benchmark", **numbers)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    config = load_config(args.config)
    models = {variant: random_model(config, variant, args.dtype) for variant in args.variants}
    prompt = torch.randint(config.model.vocab_size, (args.batch_size, args.prompt_tokens), device=default_device())
    rows = [(variant, cache) for variant in args.variants for cache in (True, False)]
    times: dict[tuple[str, bool], list[tuple[float, float]]] = {row: [] for row in rows}
    for repeat in range(args.repeats + 1):
        for row in rows:
            elapsed = decode(models[row[0]], prompt, args.new_tokens, row[1])
            if repeat:  # the first one warms up
                times[row].append(elapsed)
    tokens = args.batch_size * args.new_tokens
    return [finished(row, models[row[0]], times[row], tokens) for row in rows]


def random_model(config: Any, variant: str, dtype: str) -> Any:
    """A model of this shape with the trainer's initial distributions."""
    import torch

    from megatron_crnet.hf.export import DTYPES
    from megatron_crnet.hf.export_config import hugging_face_fields
    from megatron_crnet.hf.generate import default_device
    from megatron_crnet.hf.modeling_crnet import CRNetConfig, CRNetForCausalLM

    # ranks stay, chains are the variant's own
    shape = replace(config, model=replace(config.model, variant=variant, full_rank_layers=None))
    torch.manual_seed(0)
    model = CRNetForCausalLM(CRNetConfig(**hugging_face_fields(shape)))
    return model.to(default_device(), DTYPES[dtype]).eval()


def decode(model: Any, prompt: Any, new_tokens: int, cache: bool) -> tuple[float, float]:
    """Seconds of one batch, by the clock and of the CPU."""
    import torch

    started, cpu_started = time.perf_counter(), time.process_time()
    found = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        use_cache=cache,
        pad_token_id=0,
    )
    if prompt.is_cuda:
        torch.cuda.synchronize()
    assert found.shape[1] == prompt.shape[1] + new_tokens
    return time.perf_counter() - started, time.process_time() - cpu_started


def finished(row: tuple[str, bool], model: Any, times: list[tuple[float, float]], tokens: int) -> Row:
    """The figures of one row."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    clock, cpu = ([pair[i] for pair in times] for i in (0, 1))
    medians = statistics.median(clock), statistics.median(cpu)
    spreads = [(max(values) - min(values)) / middle for values, middle in zip((clock, cpu), medians, strict=True)]
    return Row(*row, parameters, clock, cpu, tokens / medians[0], tokens / medians[1], *spreads)


def of_full_rank(row: Row, rows: list[Row]) -> str:
    """How many times as fast as full rank, by CPU time where that is what computes."""
    import torch

    kind = "seconds" if torch.cuda.is_available() else "cpu_seconds"
    for other in rows:
        if (other.variant, other.cache) == ("full_rank", row.cache):
            pairs = zip(getattr(other, kind), getattr(row, kind), strict=True)
            return f"{statistics.median(theirs / ours for theirs, ours in pairs):.2f}"
    return "-"


def figures(rows: list[Row]) -> str:
    """The figures as a table."""
    header = ("variant", "cache", "parameters", "tokens/s", "spread", "tokens/s of CPU", "spread", "of full rank")
    return table(
        header,
        [
            (
                row.variant,
                "yes" if row.cache else "no",
                f"{row.parameters / 1e6:.1f}M",
                f"{row.tokens_per_s:.1f}",
                f"{row.spread:.0%}",
                f"{row.tokens_per_cpu_s:.1f}",
                f"{row.cpu_spread:.0%}",
                of_full_rank(row, rows),
            )
            for row in rows
        ],
        text_columns=2,
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = ToolParser(description=__doc__)
    parser.add_argument("--config", required=True, help="YAML whose model section gives the shape")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["crnet", "full_rank"])
    parser.add_argument("--batch-size", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--new-tokens", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="after one to warm up (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of PyTorch (default: its own choice)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--overwrite", action="store_true", help="replace an older file")
    return parser.parse_args()


def run(args: argparse.Namespace) -> int:
    """Measure and write."""
    check_record_file(args.json, overwrite=args.overwrite)
    rows = measure(args)
    print(figures(rows))
    if args.json is not None:
        from megatron_crnet.utils.environment import provenance

        about = {name: str(value) for name, value in vars(args).items()}
        measured = {"arguments": about, "rows": [asdict(row) for row in rows]}
        write_record(args.json, {**provenance("decoding", sys.argv), **measured})
    return 0


def main() -> int:
    """Run; returns the exit status."""
    args = parse_arguments()
    return reported(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
