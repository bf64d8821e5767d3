"""What the launcher meant: used, or refused in one line."""

from __future__ import annotations

import importlib.util
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch.distributed as dist

from megatron_crnet.distributed import launcher, rendezvous
from megatron_crnet.distributed.launcher import LOOPBACK, Launch, first_host, read_launch, take_local_rank
from megatron_crnet.distributed.process_groups import device_index
from megatron_crnet.distributed.rendezvous import meet, shared_store, wait_for_all
from megatron_crnet.utils.errors import ConfigError, PeerLostError
from tests.ports import free_ports

ROOT = Path(__file__).parents[3]
MEET = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", **MEET}
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "767033345",
    "PMIX_RANK": "1",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "MASTER_",
    "SLURM_",
    "OMPI_",
    "PMI_",
    "PMIX_",
    "MPI_",
    "MV2_",
    "TORCHELASTIC",
)


@pytest.mark.fault("L2")
@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, None, None)),
        (TORCHRUN, (3, 8, 1, "node0")),
        (SRUN, (5, 8, 1, "gpu07")),
        ({**SRUN, **MEET}, (5, 8, 1, "node0")),
        ({**SRUN, "WORLD_SIZE": "8", **MEET}, (5, 8, 1, "node0")),
        ({**SRUN, **TORCHRUN, "TORCHELASTIC_RUN_ID": "x"}, (3, 8, 1, "node0")),
        ({**SRUN, "RANK": "0", "WORLD_SIZE": "1"}, (0, 1, None, None)),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1", **MEET}, (1, 2, None, "node0")),
        (OPENMPI, (1, 2, 1, LOOPBACK)),
        # mpirun starts its helpers by srun, whose numbers count nodes
        ({**SRUN, "SLURM_NTASKS": "2", **OPENMPI, **MEET}, (1, 2, 1, "node0")),
        (HYDRA, (1, 2, 1, LOOPBACK)),
        ({"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2", **MEET}, (1, 2, None, "node0")),
        # srun --mpi=pmi2
        ({**SRUN, "PMI_RANK": "5", "PMI_SIZE": "8"}, (5, 8, 1, "gpu07")),
        ({"FLUX_TASK_RANK": "1", "FLUX_JOB_SIZE": "2", "FLUX_TASK_LOCAL_ID": "0", **MEET}, (1, 2, 0, "node0")),
    ],
)
def test_the_numbers_of_the_launcher_are_used(variables: dict[str, str], expected: tuple[Any, ...]) -> None:
    found = read_launch(variables)
    assert (found.rank, found.world_size, found.local_rank, found.address) == expected


@pytest.mark.fault("L2")
@pytest.mark.parametrize(
    "step",
    [
        {"SLURM_PROCID": "0"},  # the batch script
        {},  # salloc's shell
        {"SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},  # salloc, interactive step
    ],
)
def test_a_process_that_srun_did_not_start_is_alone_and_says_so(step: dict[str, str]) -> None:
    found = read_launch({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", **step})
    assert found.world_size == 1
    assert found.remark.startswith("note: SLURM gave this job 8 tasks, but this is one process outside of srun")


def test_processes_of_one_job_take_one_port_and_jobs_take_others() -> None:
    ports = [read_launch({**SRUN, "SLURM_PROCID": str(rank)}).port for rank in range(8)]
    other = read_launch({**SRUN, "SLURM_JOB_ID": "8"}).port
    assert len(set(ports)) == 1
    assert other not in ports
    assert all(port and 10000 <= port < 30000 for port in (*ports, other))


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("", ""),
        ("node0", "node0"),
        ("node0,node1", "node0"),
        ("gpu[07-09,12],cpu1", "gpu07"),
        ("rack[2,4]node[0-3]-ib,x", "rack2node0-ib"),
    ],
)
def test_the_first_host_of_slurms_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


REFUSED = [
    *[({"WORLD_SIZE": value}, f"WORLD_SIZE is '{value}', but must be") for value in ("x", "", "0", "1e3", "-1", "2.0")],
    *[({**TORCHRUN, "RANK": value}, f"RANK is '{value}', but must be") for value in ("x", "", "8", "-1", "٣")],
    *[({**TORCHRUN, "LOCAL_RANK": value}, f"LOCAL_RANK is '{value}', but must") for value in ("x", "", "4", "-1")],
    *[({**TORCHRUN, "MASTER_PORT": value}, f"MASTER_PORT is '{value}', but") for value in ("x", "", "0", "65536")],
    ({**TORCHRUN, "MASTER_ADDR": ""}, "MASTER_ADDR is not"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "MASTER_PORT is not"),
    ({"WORLD_SIZE": "8"}, "WORLD_SIZE is 8, but RANK is not set"),
    ({"RANK": "0"}, "RANK is 0, but WORLD_SIZE is not set"),
    ({"RANK": ""}, "RANK is ''"),
    ({"LOCAL_RANK": "1"}, "this process would train alone"),
    ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "SLURM_PROCID is set, but MASTER_ADDR is not"),
    ({**SRUN, "WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but srun started this process as 8"),
    ({**SRUN, "RANK": "0"}, "RANK is 0, but srun started this process as 5"),
    ({**SRUN, **TORCHRUN}, "RANK is 3 where SLURM_PROCID is 5"),
    ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK is set, but MASTER_ADDR is not"),
    ({"OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_RANK is set, but OMPI_COMM_WORLD_SIZE is not"),
    ({"PMI_SIZE": "2"}, "PMI_SIZE is set, but PMI_RANK is not"),
    ({**HYDRA, "PMI_RANK": "2"}, "PMI_RANK is '2'"),
    ({"PMIX_RANK": "1"}, "PMIX_RANK is 1, but nothing says how many"),
]


@pytest.mark.fault("L2", "B21", "M3", "F5")
@pytest.mark.parametrize(("variables", "message"), REFUSED)
def test_what_is_half_set_or_out_of_range_is_one_line(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_launch(variables)
    assert message in str(error.value)


@pytest.mark.fault("B21", "F5")
def test_a_dry_run_is_for_as_many_as_world_size_says() -> None:
    assert read_launch({"WORLD_SIZE": "32"}, dry_run=True).world_size == 32
    assert read_launch({"RANK": "0", "WORLD_SIZE": "32"}, dry_run=True).world_size == 32
    with pytest.raises(ConfigError, match="WORLD_SIZE is '1e3'"):
        read_launch({"WORLD_SIZE": "1e3"}, dry_run=True)


@pytest.fixture
def without_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An environment without any launcher's variables, put back afterwards."""
    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith(VARIABLES):
            del os.environ[name]
    yield monkeypatch
    os.environ.clear()
    os.environ.update(before)


def entry_point(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("entry_point", ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.fault("L2", "B21", "F5")
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "SLURM_PROCID is set, but MASTER_ADDR is not"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE is 8, but RANK is not set"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE is 'x'"),
    ],
)
def test_the_trainer_refuses_in_one_line_before_anything_is_opened(
    variables: dict[str, str],
    message: str,
    without_launcher: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    os.environ.update(variables)
    assert entry_point("pretrain_crnet.py").main(["--config", str(ROOT / "examples/quickstart.yaml")]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.fault("M4")
@pytest.mark.parametrize("option", [["--local_rank=1"], ["--local-rank=1"], ["--local_rank", "1"]])
def test_the_option_that_launchers_add_is_the_local_rank(
    option: list[str], without_launcher: pytest.MonkeyPatch
) -> None:
    assert take_local_rank(["--config", "a.yaml", *option, "--dry-run"]) == ["--config", "a.yaml", "--dry-run"]
    assert os.environ["LOCAL_RANK"] == "1"
    for value in ("0", "x", ""):
        with pytest.raises(ConfigError, match="local_rank"):
            take_local_rank([f"--local_rank={value}"])


def test_each_process_has_a_gpu_of_its_own() -> None:
    assert device_index(Launch(5, 8, 1, "a", 1), 4) == 1
    assert device_index(Launch(5, 8, 1, "a", 1, binds_devices=True), 1) == 0
    assert device_index(Launch(), 8) == 0
    with pytest.raises(ConfigError, match="LOCAL_RANK is 1, but this process sees 1 GPUs"):
        device_index(Launch(5, 8, 1, "a", 1), 1)
    with pytest.raises(ConfigError, match="LOCAL_RANK is not set"):
        device_index(Launch(5, 8, None, "a", 1), 4)


@pytest.mark.fault("M3")
def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"MASTER_PORT {port} cannot be opened on .* \\(it is in use\\)"):
            shared_store(Launch(0, 2, 0, LOOPBACK, port), 0.01)


@pytest.mark.fault("M3")
def test_a_program_that_listens_and_does_not_answer_is_no_store(without_launcher: pytest.MonkeyPatch) -> None:
    with socket.socket() as mute:
        mute.bind((LOOPBACK, 0))
        mute.listen()
        with pytest.raises(PeerLostError, match="is not the store of these ranks: another program may use the port"):
            shared_store(Launch(1, 2, 1, LOOPBACK, mute.getsockname()[1]), 0.01)


@pytest.mark.fault("M3")
def test_a_name_that_does_not_resolve_or_is_another_hosts_is_named(without_launcher: pytest.MonkeyPatch) -> None:
    def unknown(name: str, *_: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    with without_launcher.context() as patch:
        patch.setattr(rendezvous.socket, "getaddrinfo", unknown)
        with pytest.raises(ConfigError) as error:
            shared_store(Launch(1, 2, 1, "nohost", 29500), 0.001)
    assert "MASTER_ADDR nohost does not resolve (Name or service not known)" in str(error.value)
    port = free_ports(1)
    without_launcher.setattr(rendezvous, "_answers", lambda *_: False)
    with pytest.raises(ConfigError, match=r"MASTER_ADDR 192.0.2.1 does not lead to .*, where rank 0 is"):
        shared_store(Launch(0, 2, 0, "192.0.2.1", port), 0.01)


@pytest.mark.fault("L2")
def test_two_processes_of_one_rank_are_refused() -> None:
    """As when RANK is set in a batch script, before srun starts the processes."""
    store = dist.HashStore()
    failures: list[str] = []

    def join(rank: int) -> None:
        try:
            wait_for_all(store, rank, 3, 0.2)
        except ConfigError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=join, args=(rank,)) for rank in (0, 1, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failures) == 3
    assert all("two processes have RANK 1: give each process" in failure for failure in failures)


@pytest.mark.parametrize("agent", [False, True], ids=["rank 0's store", "the launcher's store"])
def test_processes_that_train_twice_meet_twice(agent: bool, without_launcher: pytest.MonkeyPatch) -> None:
    port, seen = free_ports(1), list[tuple[int, bytes | None]]()
    held = dist.TCPStore(LOOPBACK, port, is_master=True, wait_for_workers=False) if agent else None
    if held is not None:
        without_launcher.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")

    def join(rank: int) -> None:
        for run in range(2):
            store = meet(Launch(rank, 2, rank, LOOPBACK, port), 0.2)
            seen.append((run, store.get("left behind") if store.check(["left behind"]) else None))
            store.add(f"looked {run}", 1)
            while store.add(f"looked {run}", 0) < 2:
                pass
            store.set("left behind", f"{run}")

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == [(0, None), (0, None), (1, None), (1, None)]


def test_a_process_that_is_alone_needs_no_address(without_launcher: pytest.MonkeyPatch) -> None:
    assert isinstance(shared_store(read_launch({"RANK": "0", "WORLD_SIZE": "1"}), 1), dist.HashStore)
    assert launcher.ALONE.endswith("set RANK=0 WORLD_SIZE=1")
