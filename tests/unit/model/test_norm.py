from __future__ import annotations

import pytest
from torch import nn
from torch._subclasses import FakeTensorMode

from megatron_crnet.config.megatron import build_transformer_config
from megatron_crnet.model import norm
from megatron_crnet.model.glue import EAGER
from tests.helpers import tiny_config


class Foreign(nn.RMSNorm):
    """Stands for Transformer Engine's."""


def test_a_foreign_norm_is_taken_where_no_region_is_compiled_and_tensors_are_real(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = build_transformer_config(tiny_config())
    monkeypatch.setattr(norm, "fused_norm_class", lambda: Foreign)
    assert type(norm.CRNetNorm(config, 8)) is Foreign
    with FakeTensorMode():
        assert type(norm.CRNetNorm(config, 8)) is norm.LeanRMSNorm
    monkeypatch.setattr(norm, "choose_glue", lambda *_: EAGER.map(lambda _, function: function))
    assert type(norm.CRNetNorm(config, 8)) is norm.LeanRMSNorm
