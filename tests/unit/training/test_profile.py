"""Kinds of kernels, by names that a GPU has shown."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from torch.autograd import DeviceType

from megatron_crnet.training.callbacks.profile import kernel_rows, kind_of, kind_rows
from megatron_crnet.utils.errors import ConfigError
from tests.helpers import tiny_config


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("products", ["nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNN", "sm90_xmma_gemm_bf16bf16_bf16f32", "aten::addmm_"]),
        ("products", ["residual_product_gemm"]),
        ("products", ["void cutlass::Kernel2<cutlass_75_tensorop_bf16_s1688gemm_bf16_128x128_nn_align1>", "aten::mm"]),
        ("attention", ["cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "aten::_flash_attention"]),
        ("attention", ["fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)"]),
        ("optimizer", ["void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float>>"]),
        ("communication", ["ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgs)", "c10d::allreduce_"]),
        ("copies", ["Memcpy DtoD (Device -> Device)", "void at::native::CatArrayBatchedCopy<int>", "aten::copy_"]),
        ("glue", ["triton_red_fused__to_copy_mul_0", "void at::native::vectorized_elementwise_kernel<4>", "aten::mul"]),
    ],
)
def test_a_kernel_has_a_kind_by_its_name(kind: str, names: list[str]) -> None:
    assert {name: kind_of(name) for name in names} == dict.fromkeys(names, kind)


def event(name: str, us: float = 0.0, cuda: bool = False, **more: Any) -> Any:
    device = DeviceType.CUDA if cuda else DeviceType.CPU
    time = SimpleNamespace(elapsed_us=lambda: us)
    facts = {"self_cpu_time_total": us, "cpu_parent": None, "is_user_annotation": False, "kernels": [], **more}
    return SimpleNamespace(name=name, device_type=device, time_range=time, **facts)


def test_kernels_are_counted_per_step_and_operations_by_their_caller() -> None:
    adamw = event("Optimizer.step#AdamW.step", 1000)
    launched = [SimpleNamespace(name=name) for name in ("triton_poi_fused_lerp_0", "gemm")]
    events = [
        event("triton_poi_fused_lerp_0", 1000, cuda=True),
        event("compiled region", 0, cpu_parent=adamw, kernels=launched),
        *(event("gemm", 3000, cuda=True) for _ in range(4)),
        event("a region", 9e9, cuda=True, is_user_annotation=True),
        event("elementwise", 4000, cuda=True),
        adamw,
        event("aten::mul_", 2000, cpu_parent=event("aten::foreach", cpu_parent=adamw)),
        event("aten::mul_", 5000),
        event("_LowRankOutputs", 500),
    ]
    assert kernel_rows(events, cuda=True, steps=2) == [
        {"name": "gemm", "kind": "products", "ms": 6.0, "launches": 2.0},
        {"name": "elementwise", "kind": "glue", "ms": 2.0, "launches": 0.5},
        {"name": "triton_poi_fused_lerp_0", "kind": "optimizer", "ms": 0.5, "launches": 0.5},
    ]
    assert kind_rows(kernel_rows(events, cuda=False, steps=1)) == [
        {"kind": "glue", "ms": 5.0, "share": 5 / 8.5, "launches": 1.0},
        {"kind": "optimizer", "ms": 3.0, "share": 3 / 8.5, "launches": 3.0},
        {"kind": "host", "ms": 0.5, "share": 0.5 / 8.5, "launches": 1.0},
    ]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([3], "has 1 numbers, but must have two: give [first, last]"),
        ([5, 3], "ends before it begins: write [3, 5]"),
        ([200, 1001], "is outside the run, which has training.train_steps 1000: name steps from 1 to 1000"),
        ([1, 101], "is 101 steps, but at most 100 can be profiled: write [1, 100], or fewer"),
        ([0, 3], "steps from 1"),
    ],
)
def test_a_range_that_cannot_be_profiled_is_refused_in_one_line(steps: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        tiny_config(training={"train_steps": 1000}, logging={"profile_steps": steps})
    assert "logging.profile_steps" in str(raised.value)
    assert "\n" not in str(raised.value)
    tiny_config(training={"train_steps": 1000}, logging={"profile_steps": [901, 1000]})
