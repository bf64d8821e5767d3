"""Rates of GPUs and their links from data sheets, or from a file with the same fields."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le

from megatron_crnet.config.field_types import SMALLEST, Name, Section, nearest
from megatron_crnet.utils.errors import require
from megatron_crnet.utils.yaml_files import read_file

Rate = Annotated[float, Ge(SMALLEST), Le(1e24)]
Efficiency = Annotated[float, Ge(SMALLEST), Le(1)]


@dataclass(frozen=True)
class Machine(Section, name="machine"):
    """One GPU in its node. Rates are per second, bandwidths for one direction.

    Attributes:
        name: for reports.
        peak_flops: floating-point operations of dense bf16 matrix products.
        memory_bytes: device memory that PyTorch can have.
        memory_bandwidth: of device memory.
        node_bandwidth: to the other GPUs of the node.
        network_bandwidth: of this GPU's share of the network.
        host_bandwidth: to the host's memory.
        product_efficiency: share of the peak that matrix products reach; assumed, not measured.
        link_efficiency: share of the three bandwidths between devices that large transfers reach; assumed.
        peak_flops_fp32: in fp32 without TF32, as PyTorch computes; None where it is `peak_flops`.
        is_gpu: AdamW updates by a kernel without temporary tensors, and passes may be a CUDA graph; false on CPUs.
    """

    name: Name
    peak_flops: Rate
    memory_bytes: Rate
    memory_bandwidth: Rate
    node_bandwidth: Rate
    network_bandwidth: Rate
    host_bandwidth: Rate
    product_efficiency: Efficiency = 0.6
    link_efficiency: Efficiency = 0.8
    peak_flops_fp32: Rate | None = None
    is_gpu: bool = True

    def peak(self, dtype: str) -> float:
        """Operations per second of matrix products in `dtype`, bf16 or fp32."""
        return self.peak_flops if dtype == "bf16" else self.peak_flops_fp32 or self.peak_flops


GIB = 2**30
MACHINES = {
    # NVIDIA A100 80GB SXM data sheet; DGX A100: one 200 Gb/s port per GPU, PCIe 4
    "a100-80g": Machine("a100-80g", 312e12, 79 * GIB, 2.039e12, 300e9, 25e9, 32e9, peak_flops_fp32=19.5e12),
    # NVIDIA H100 SXM5 data sheet (bf16: half of the figure with sparsity; fp32: without tensor cores); DGX H100: one
    # 400 Gb/s port per GPU, PCIe 5
    "h100": Machine("h100", 989e12, 79 * GIB, 3.35e12, 450e9, 50e9, 64e9, peak_flops_fp32=67e12),
    # NVIDIA H200 SXM data sheet; links as H100
    "h200": Machine("h200", 989e12, 139 * GIB, 4.8e12, 450e9, 50e9, 64e9, peak_flops_fp32=67e12),
}
"""By the names that `--gpu` takes."""
SIMULATED = dataclasses.replace(MACHINES["h100"], name="simulated", is_gpu=False)
"""What simulated ranks are, and real ones on CPUs, for their memory."""


def machine_of_gpu(device: str) -> Machine | None:
    """The machine whose GPU CUDA calls `device`; None for unknown ones, and for PCIe and NVL, which are slower."""
    words = re.split(r"[^a-z0-9]+", device.lower())
    if "pcie" in words or "nvl" in words:
        return None
    return next((machine for name, machine in MACHINES.items() if name.partition("-")[0] in words), None)


def find_machine(name: str | Path) -> Machine:
    """A known machine, or one from a YAML file with the fields of `Machine`.

    Raises:
        ConfigError: it is neither, or a field is invalid.
    """
    path, name = Path(name), str(name)
    if name in MACHINES:
        return MACHINES[name]
    require(path.is_file(), f"--gpu is {name}, but must be {', '.join(MACHINES)} or a YAML file: give one of them")
    values = read_file(name, lambda keys: keys == ("name",))
    require(isinstance(values, dict), f"--gpu {name} is not a mapping: write the fields of a machine in it")
    fields = {field.name: field for field in dataclasses.fields(Machine)}
    for key in values:
        require(key in fields, f"--gpu {name}: unknown field {key!r}: {nearest(key, fields)}")
    given = {"name": path.stem, **values}
    missing = [key for key, field in fields.items() if field.default is dataclasses.MISSING and key not in given]
    require(not missing, f"--gpu {name} has no {', '.join(missing)}: add it")
    return Machine(**given)
