"""The names of `import megatron_crnet`: all there, light to import, refusing what they cannot do in one line."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_crnet
from megatron_crnet import ConfigError, estimate, load_config, plan, preprocess, save_config, train_tokenizer

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.yaml"
IMPORTED = """
import json, signal, sys, threading
before = [signal.getsignal(number) for number in signal.valid_signals()]
import megatron_crnet
from megatron_crnet import Config, ConfigError, estimate, load_config, train
same = before == [signal.getsignal(number) for number in signal.valid_signals()]
slow = sorted({"torch", "megatron", "deepspeed", "transformers", "numpy"} & set(sys.modules))
print(json.dumps([same, threading.active_count(), slow]))
"""


def test_importing_takes_no_signal_starts_no_thread_and_needs_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [True, 1, []]


def test_every_name_is_there_and_documented() -> None:
    tree = ast.parse(Path(megatron_crnet.__file__).read_text())
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    shown = {alias.name for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert shown == set(megatron_crnet.__all__), "type checkers and editors see what is there"
    for name in megatron_crnet.__all__:
        assert getattr(megatron_crnet, name).__doc__
        assert name in dir(megatron_crnet)
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = megatron_crnet.trian
    importlib.import_module("megatron_crnet.training.trainer")
    assert callable(megatron_crnet.train)


def test_a_configuration_is_made_of_values_as_of_a_file(tmp_path: Path) -> None:
    values = {"model": {"num_layers": 3, "rank": {"q": 4}}, "training": {"seed": 7}}
    (tmp_path / "a.yaml").write_text(json.dumps(values))
    overrides = ["--training.seq_length=64", "--model.rank.q", "5"]
    with pytest.raises(ConfigError) as refused:
        load_config(tmp_path / "a.yaml", overrides)
    with pytest.raises(ConfigError) as also:
        load_config(values, overrides)
    assert str(also.value) == str(refused.value)
    values["model"]["rank"] = 5
    config = load_config(values, overrides[:1])
    assert (config.model.num_layers, config.model.rank, config.training.seq_length) == (3, 5, 64)
    of_tuples = {"model": {"num_layers": 2, "rank": (8, 9)}, "data": {"train_data_path": (tmp_path / "a",)}}
    config = load_config(of_tuples)
    assert (config.model.rank, config.data.train_data_path) == ([8, 9], [str(tmp_path / "a")])
    save_config(config, str(tmp_path / "b.yaml"))
    assert load_config(tmp_path / "b.yaml") == config
    with pytest.raises(ConfigError, match=r"the configuration: unknown key model\.rnak: did you mean rank\?"):
        load_config({"model": {"rnak": 3}})


def test_one_path_is_a_list_of_one(tmp_path: Path) -> None:
    text = Path(json.__file__)
    tokenizer = train_tokenizer(text, tmp_path / "small", 400)
    assert preprocess(str(text), tmp_path / "one", tokenizer).documents == 1


def test_a_run_is_planned() -> None:
    config = load_config(QUICKSTART, ["--training.global_batch_size=8"])
    found = estimate(config, 1, "a100-80g")
    assert found.time.total > 0
    plans = plan(config, 1, "a100-80g")
    assert plans[0].estimate.tokens_per_second >= plans[-1].estimate.tokens_per_second > 0
    with pytest.raises(ConfigError, match="b200"):
        estimate(config, 1, "b200")


@pytest.mark.parametrize("sizes", [{"world_size": 0}, {"world_size": 8, "gpus_per_node": -8}])
def test_worlds_of_no_ranks_are_refused(sizes: dict[str, int]) -> None:
    config = megatron_crnet.load_config({})
    with pytest.raises(ConfigError, match="must be"):
        megatron_crnet.estimate(config, **sizes)
    with pytest.raises(ConfigError, match="must be"):
        megatron_crnet.plan(config, gpus=sizes.pop("world_size"), **sizes)
