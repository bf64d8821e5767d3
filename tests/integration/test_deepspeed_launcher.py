"""examples/deepspeed/pretrain.sh: DeepSpeed's launcher on two nodes without ssh, which here are one host."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.integration.conftest import LIMIT_S, ROOT, Corpus, lines_of, start
from tests.integration.processes import rank_below, wait_for_step
from tests.ports import free_ports


def start_node(rank: int, hostfile: Path, port: int, options: list[str]) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "HOSTFILE": str(hostfile),
        "NODE_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CONFIG": "examples/quickstart.yaml",
        "DEEPSPEED": str(Path(sys.executable).with_name("deepspeed")),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        ["examples/deepspeed/pretrain.sh", *options, "--logging.sample_tokens=0"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(nodes: list[subprocess.Popen[str]]) -> list[str]:
    """The last of what the launchers printed; whoever does not end is killed, and its status is negative."""
    printed = []
    for node in nodes:
        try:
            text, _ = node.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            for process in [*psutil.Process(node.pid).children(recursive=True), node]:
                process.kill()
            text, _ = node.communicate()
        printed.append(text[-3000:])
    return printed


@pytest.mark.long
def test_two_nodes_save_when_one_process_is_asked_and_continue(corpus: Corpus, tmp_path: Path) -> None:
    hostfile, output = tmp_path / "hostfile", tmp_path / "run"
    hostfile.write_text("# two nodes\nfirst slots=1\nsecond slots=1\n")
    endless = corpus.options(output, training__train_steps=100000, training__eval_steps=0)
    port = free_ports(1)
    nodes = [start_node(rank, hostfile, port, endless) for rank in range(2)]
    try:
        wait_for_step(output, 3, nodes)
        rank_below(nodes[1], 1).send_signal(signal.SIGUSR1)
    finally:
        printed = end(nodes)
    assert [node.returncode for node in nodes] == [75, 75], printed
    saved = int((output / "checkpoints" / "latest").read_text().removeprefix("step_"))
    # each of the two ranks owns a part
    assert len(list((output / "checkpoints").glob("step_*/shard-*.safetensors"))) == 2

    more = corpus.options(output, training__train_steps=saved + 2, training__eval_steps=0)
    result = start(["--config=examples/quickstart.yaml", *more], ranks=2)
    assert result.returncode == 0, result.stderr
    assert set(lines_of(output, "loss")) == set(range(1, saved + 3))


def test_a_mistake_keeps_its_status_and_an_unknown_host_is_named(corpus: Corpus, tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("first slots=1\n")
    node = start_node(0, hostfile, free_ports(1), corpus.options(tmp_path / "run", optimizer__lr=-1))
    (printed,) = end([node])
    assert node.returncode == 2
    assert "optimizer.lr is -1" in printed
    environment = {**os.environ, "HOSTFILE": str(hostfile), "NODE_RANK": ""}
    done = subprocess.run(
        ["examples/deepspeed/pretrain.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert f"is not in {hostfile}" in done.stderr
