"""Distributed pre-training of CR-Net (arXiv 2509.18993) on Megatron-Core and DeepSpeed.

The sub-packages in reading order; each imports only those above it, which `make check` checks. Their docstrings say
what goes in and out, and where to start.

    utils         files, signals, errors, messages
    config        the configuration of a run: typed, checked, resolved once
    recompute     activation recomputation
    distributed   process groups, agreement between ranks, watchdog
    data          text -> ids -> micro-batches
    model         CR-Net: the mathematics (reference.py), and in Megatron-Core's transformer blocks
    engine        one optimizer step under DeepSpeed
    checkpoint    a run's state by canonical weight, for any layout
    hf            conversion to and from Hugging Face transformers
    training      preflight, the training loop and its callbacks
    analysis      linear maps on calibration text: CR-Net from a dense model, ranks, errors
    planning      estimates by formula, and simulation by the real code on fake tensors
    reporting     benchmarks and reports
    cli           the command `crnet`

As a library (`examples/library_use.py`): the names of `__all__`, each imported at its first use. `import
megatron_crnet` itself imports no torch, starts no thread and handles no signal.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatron_crnet.utils.noise import silence_libraries

if TYPE_CHECKING:
    from megatron_crnet.api import (
        estimate,
        evaluate,
        from_hf,
        load_pretrained,
        plan,
        preprocess,
        simulate,
        to_hf,
        train,
        train_tokenizer,
    )
    from megatron_crnet.config.loading import load_config, save_config
    from megatron_crnet.config.schema import Config
    from megatron_crnet.hf.configuration_crnet import CRNetConfig
    from megatron_crnet.hf.generate import Sampling, generate
    from megatron_crnet.hf.modeling_crnet import CRNetForCausalLM
    from megatron_crnet.training.trainer import TrainResult
    from megatron_crnet.utils.errors import (
        BadStepError,
        CheckpointError,
        ConfigError,
        CrnetError,
        DataError,
        PeerLostError,
    )

__version__ = "0.1.0"
__all__ = [
    "BadStepError",
    "CRNetConfig",
    "CRNetForCausalLM",
    "CheckpointError",
    "Config",
    "ConfigError",
    "CrnetError",
    "DataError",
    "PeerLostError",
    "Sampling",
    "TrainResult",
    "estimate",
    "evaluate",
    "from_hf",
    "generate",
    "load_config",
    "load_pretrained",
    "plan",
    "preprocess",
    "save_config",
    "simulate",
    "to_hf",
    "train",
    "train_tokenizer",
]
_MODULES = {
    "CRNetConfig": "hf.configuration_crnet",
    "CRNetForCausalLM": "hf.modeling_crnet",
    "Config": "config.schema",
    "Sampling": "hf.generate",
    "TrainResult": "training.trainer",
    "generate": "hf.generate",
    "load_config": "config.loading",
    "save_config": "config.loading",
}
"""Where a name comes from that is not in `utils.errors`, if it ends in Error, or in `api`."""

silence_libraries()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULES.get(name, "utils.errors" if name.endswith("Error") else "api")
    value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
