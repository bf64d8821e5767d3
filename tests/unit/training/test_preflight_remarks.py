from __future__ import annotations

from megatron_crnet.training.preflight import _steep_restarts
from tests.helpers import tiny_config


def test_a_restart_under_a_rate_that_does_not_drop_is_a_warning() -> None:
    model, relora = {"variant": "relora"}, {"restart_interval": 10}
    found = _steep_restarts(tiny_config(model, relora=relora))
    assert found is not None
    assert "relora.restart_interval 10 prunes moments while optimizer.lr_decay_style cosine" in found
    jagged = {"lr_decay_style": "cosine_restarts", "lr_restart_warmup_steps": 2}
    assert _steep_restarts(tiny_config(model, training={"train_steps": 30}, optimizer=jagged, relora=relora)) is None
    assert _steep_restarts(tiny_config(model)) is None
