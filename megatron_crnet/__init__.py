"""Distributed pre-training of CR-Net (arXiv 2509.18993) on Megatron-Core and DeepSpeed.

The rooms in the order in which to read them; each imports only those above it, which `make check` holds. A room's own
docstring says what goes in and out, and where to start.

    utils         files, signals, errors, messages
    config        what a run is: typed, checked, resolved once
    recompute     what the backward pass needs and how it gets it back
    distributed   who the ranks are, whether they agree and live
    data          text -> ids -> micro-batches
    model         CR-Net: the mathematics (reference.py), and in Megatron-Core's transformer blocks
    engine        one optimizer step under DeepSpeed
    checkpoint    a run's state by canonical weight, for any layout
    training      the run: what is examined before it, and the loop
    hf            out to Hugging Face transformers, and back
    planning      before a run: by formula, and by the real code on tensors without memory
    reporting     after it: benchmarks and reports
    cli           the command `crnet`
"""

from megatron_crnet.utils.noise import silence_libraries

__version__ = "0.1.0"

silence_libraries()
