from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_crnet.config import Config
from megatron_crnet.errors import ConfigError
from megatron_crnet.settings import load_config, parse_arguments, resolved, save_config


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(
        "model: {rank: 16, num_layers: 4}\noptimizer: {lr: 2e-3}\ndeepspeed: {zero_optimization: {stage: 1}}\n"
    )
    return path


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(file: Path) -> None:
    config = load_config(file, ["--model.rank", "[1, 2, 3, 4]", "--optimizer.clip_grad=0.5"])
    assert config.model.rank == [1, 2, 3, 4]
    assert (config.optimizer.lr, config.optimizer.clip_grad) == (2e-3, 0.5)
    assert config.training == Config().training


def test_deepspeed_keys_nest_to_any_depth(file: Path) -> None:
    options = ["--deepspeed.zero_optimization.stage", "3", "--deepspeed.zero_optimization.offload_param.device=cpu"]
    assert load_config(file, options).deepspeed == {
        "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}
    }


def test_dry_run_is_seen(file: Path) -> None:
    assert parse_arguments(["--config", str(file), "--dry-run"]).dry_run
    assert not parse_arguments(["--config", str(file)]).dry_run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.rnak", "3"], "unknown key model.rnak: did you mean rank"),
        (["--modle.rank", "3"], "unknown section 'modle': did you mean model"),
        (["--model.num_layers", "many"], "model.num_layers"),
        (["--model.variant", "crnett"], "crnett"),
        (["--recompute.strategy", "reply"], "reply"),
        (["--nonsense", "3"], "nonsense"),
        (["--deepspeed.zero_optimization.stage"], "has no value"),
        (["--config", "absent.yaml"], "absent.yaml cannot be read"),
    ],
)
def test_mistakes_on_the_command_line_name_value_and_remedy(file: Path, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_arguments(["--config", str(file), *options])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {hidden: 3}", "unknown key model.hidden: did you mean hidden_size"),
        ("trainning: {seed: 3}", "unknown section 'trainning': did you mean training"),
        ("model: 3", "section model is 3, but must be a mapping"),
        ("- 3", "holds no mapping"),
        ("model: {rank: [1", "no valid YAML"),
    ],
)
def test_mistakes_in_the_file_name_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert "wrong.yaml" in str(caught.value)


def test_the_resolved_configuration_reads_back_as_itself(file: Path, tmp_path: Path) -> None:
    config = load_config(file)
    save_config(config, tmp_path / "resolved.yaml")
    again = load_config(tmp_path / "resolved.yaml")
    assert resolved(again) == resolved(config)
    assert yaml.safe_load((tmp_path / "resolved.yaml").read_text())["model"]["full_rank_layers"] == [0]
