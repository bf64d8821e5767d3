"""The package as others use it: as a library, and as a wheel that is installed elsewhere."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import venv
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch.distributed as dist

import megatron_crnet as crnet
from tests.integration.conftest import LIMIT_S, ROOT, Corpus, lines_of

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}


def test_the_example_trains_exports_and_continues(tmp_path: Path) -> None:
    example = ROOT / "examples" / "library_use.py"
    assert len(example.read_text().splitlines()) < 40
    done = subprocess.run(
        [sys.executable, str(example), "new"],
        cwd=tmp_path,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT), "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = lines_of(tmp_path / "new/first", "loss"), lines_of(tmp_path / "new/second", "loss")
    assert max(first) == 10
    assert max(second) == 20
    assert second[1] < first[1], "it starts from what was learnt"
    assert "170,069 parameters" in done.stdout


def process_state() -> tuple[Any, ...]:
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    launcher = {name: value for name, value in os.environ.items() if "RANK" in name or name.startswith("MASTER_")}
    threads = set(threading.enumerate())
    return handlers, signal.set_wakeup_fd(-1), dist.is_initialized(), threads, launcher, matplotlib.get_backend()


def gloo_threads() -> int:
    gc.collect()
    return sum("gloo" in path.read_text() for path in Path("/proc/self/task").glob("*/comm"))


def test_training_leaves_the_process_as_it_was_and_its_model_is_measured(corpus: Corpus, tmp_path: Path) -> None:
    matplotlib.use("svg")
    before, left = process_state(), []
    for seed in (1, 2):
        output = tmp_path / f"run{seed}"
        config = crnet.load_config(
            {}, corpus.options(output, training__seed=seed, training__seq_length=64, logging__sample_prompt="x")
        )
        result = crnet.train(config)
        assert (result.step, result.train_loss) == (6, lines_of(output, "loss")[6])
        assert process_state() == before
        left.append(gloo_threads())
    assert left[0] == left[1], "Megatron-Core and DeepSpeed keep a group each of the last run alone"
    export = crnet.to_hf(output, tmp_path / "export")
    opened = crnet.load_pretrained(export)
    found = crnet.evaluate(opened, validation_of=config)
    assert found.loss == pytest.approx(lines_of(output, "validation_loss")[6], rel=1e-5)
    assert found.loss == crnet.evaluate(crnet.load_pretrained(output), validation_of=config).loss
    assert crnet.evaluate(opened, data=corpus.valid, max_tokens=64).tokens == 64
    with pytest.raises(crnet.ConfigError, match="2 sources are given"):
        crnet.evaluate(opened, data="a", text="b")
    (text,) = crnet.generate(opened, ["import"], max_new_tokens=4)
    assert len(text.tokens) <= 4
    assert process_state() == before


def tool(*command: object, folder: Path) -> str:
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of an environment that holds the built wheel; what it needs is this environment's."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (folder / "tree").mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / "tree")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "megatron_crnet", folder / "tree" / "megatron_crnet", ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    alone = ["--no-deps", "--no-index", "--no-build-isolation"]
    tool(*pip, "wheel", *alone, "--wheel-dir", folder, folder / "tree", folder=folder)
    venv.create(folder / "venv", with_pip=False)
    (wheel,) = folder.glob("*.whl")
    tool(*pip, "--python", folder / "venv/bin/python", "install", *alone, wheel, folder=folder)
    (packages,) = (folder / "venv/lib").glob("python*/site-packages")
    ours = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "libraries.pth").write_text("\n".join(ours))
    shutil.rmtree(folder / "tree")
    return folder / "venv" / "bin"


def test_the_wheel_trains_and_exports_from_another_folder(installed: Path, corpus: Corpus, tmp_path: Path) -> None:
    place = tool(installed / "python", "-c", "import megatron_crnet; print(megatron_crnet.__file__)", folder=tmp_path)
    assert Path(place.strip()).is_relative_to(installed.parent)
    assert (Path(place.strip()).parent / "py.typed").exists()
    assert "usage: crnet COMMAND" in tool(installed / "crnet", "--help", folder=tmp_path)
    config = tmp_path / "quickstart.yaml"
    shutil.copy(ROOT / "examples/quickstart.yaml", config)
    options = corpus.options(tmp_path / "run", training__eval_steps=1, logging__sample_tokens=4)
    tool(installed / "crnet", "train", "--config", config, *options, folder=tmp_path)
    assert max(lines_of(tmp_path / "run", "loss")) == 6
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["command"].startswith(f"crnet train --config {config} ")
    assert about["versions"]["megatron_crnet"] == crnet.__version__
    tool(installed / "crnet", "convert", "to-hf", "run", "export", folder=tmp_path)
    assert (tmp_path / "export" / "modeling_crnet.py").exists()


@pytest.mark.long
def test_the_wheel_starts_ranks_by_the_name_of_a_command(installed: Path, corpus: Corpus, tmp_path: Path) -> None:
    options = corpus.options(tmp_path / "run", training__train_steps=2, training__eval_steps=0)
    launch = [installed / "crnet", "launch", "--standalone", "--nproc_per_node=2"]
    tool(*launch, "train", *options, folder=tmp_path)
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["world_size"] == 2
    assert about["command"].startswith("python -m megatron_crnet train --")
