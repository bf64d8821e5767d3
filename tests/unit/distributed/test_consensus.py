from __future__ import annotations

import pytest

from megatron_crnet.distributed.consensus import CHECKPOINT, compare_facts, configuration_facts
from megatron_crnet.utils.errors import ConfigError
from tests.helpers import tiny_config


def test_equal_facts_pass() -> None:
    compare_facts([configuration_facts(tiny_config())] * 3)


def test_the_ranks_that_differ_from_most_are_named_with_both_values() -> None:
    usual, other = (configuration_facts(tiny_config(training={"seed": seed})) for seed in (1, 2))
    with pytest.raises(ConfigError, match=r"rank 2 has training.seed 2, but the others have 1"):
        compare_facts([usual, usual, other, usual])


def test_library_versions_count() -> None:
    assert configuration_facts(tiny_config())["version of deepspeed"][0].isdigit()


def test_triton_counts_only_where_its_kernels_are_wanted() -> None:
    with_kernels, without = (
        configuration_facts(tiny_config(training={"cross_layer_fusion": on})) for on in (True, False)
    )
    assert set(with_kernels) - set(without) == {"version of triton"}


def test_a_checkpoint_that_only_some_ranks_see_asks_for_a_shared_folder() -> None:
    facts = [{CHECKPOINT: name} for name in ("step_00000003", "(none)", "step_00000003")]
    with pytest.raises(ConfigError, match=r"rank 1 has the checkpoint \(none\).*must be a folder that all ranks share"):
        compare_facts(facts)


@pytest.mark.fault("B9")
def test_optional_accelerators_are_among_the_facts_that_ranks_share() -> None:
    """A node without apex would update its copies of weights by other kernels."""
    facts = configuration_facts(tiny_config())
    assert facts["version of apex"] == facts["version of transformer-engine"] == "not installed"
    with pytest.raises(ConfigError, match=r"rank 1 has version of apex 0\.1, but the others have not installed"):
        compare_facts([facts, {**facts, "version of apex": "0.1"}, facts])
