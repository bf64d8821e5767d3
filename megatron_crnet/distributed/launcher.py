"""Rank and number of processes, from the launcher's environment variables.

torchrun, crnet launch, `deepspeed` and `torch.distributed.launch` set RANK and WORLD_SIZE; srun, mpirun and others have
names of their own. Variables that are half set or contradict each other are refused: each process would train alone.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_crnet.utils.errors import ConfigError, require

MOST_PROCESSES = 2**20
LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 29500
"""PyTorch's own."""
FIRST_STEP_OF_SLURM = 4294967290
"""SLURM numbers from here the steps that srun did not start: the batch script, salloc's shell and the like."""
ALONE = "to run this process alone, set RANK=0 WORLD_SIZE=1"


@dataclass(frozen=True)
class Launch:
    """This process among those that were started together.

    Attributes:
        local_rank: among those on this node; None if unknown.
        address, port: where the processes meet; None for a single process.
        binds_devices: the launcher may show each process its own device only.
        remark: a line for the user on variables that were not used, or "".
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None
    address: str | None = None
    port: int | None = None
    binds_devices: bool = False
    remark: str = ""

    def variables(self) -> dict[str, str]:
        """torchrun's variables of processes that meet, which libraries read."""
        if self.world_size == 1:
            return {}
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": str(self.address),
            "MASTER_PORT": str(self.port),
        }


@dataclass(frozen=True)
class Launcher:
    """The environment variables of one launcher; of several names the first that is set counts.

    Attributes:
        rank, size: it sets both.
        job: their values identify a job.
    """

    name: str
    rank: str
    size: str
    local_rank: tuple[str, ...] = ()
    local_size: tuple[str, ...] = ()
    job: tuple[str, ...] = ()


TORCHRUN = Launcher("torchrun", "RANK", "WORLD_SIZE", ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE",))
# mpirun starts its helpers on other nodes by srun, so its own variables come first
LAUNCHERS = (
    Launcher(
        "mpirun of Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
        ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    ),
    Launcher(
        "mpirun of MVAPICH",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        ("MV2_COMM_WORLD_LOCAL_RANK",),
        ("MV2_COMM_WORLD_LOCAL_SIZE",),
    ),
    Launcher("jsrun", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", ("JSM_NAMESPACE_LOCAL_RANK",), (), ("LSB_JOBID",)),
    Launcher("flux run", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", ("FLUX_TASK_LOCAL_ID",), (), ("FLUX_JOB_ID",)),
)
# srun --mpi=pmi2 sets these as well, without a rank on the node
PMI = Launcher(
    "mpirun of MPICH or Intel MPI",
    "PMI_RANK",
    "PMI_SIZE",
    ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID"),
    ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
    ("PMI_JOBID",),
)
SRUN = Launcher(
    "srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ("SLURM_LOCALID",), (), ("SLURM_JOB_ID", "SLURM_STEP_ID")
)


def keep_launch_order(tensor_parallel: int) -> None:
    """Have kernels start in the order of their launches; a variable that is set stays.

    With several hardware queues a collective call may start after the products that it should overlap, as Megatron-Core
    says of GPUs up to Hopper. The driver reads the variable when CUDA is first asked for anything, the number of GPUs
    too: to be called before libraries are imported that ask.
    """
    if tensor_parallel > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def read_launch(environment: Mapping[str, str] = os.environ, dry_run: bool = False) -> Launch:
    """Read the launcher's variables.

    Args:
        dry_run: WORLD_SIZE may be set alone, and no address is needed.

    Raises:
        ConfigError: they are half set, not numbers, out of range, or contradict each other.
    """
    launcher = _launcher(environment)
    ours = [name for name in (TORCHRUN.rank, TORCHRUN.size) if name in environment]
    if len(ours) == 2:
        _check_against(launcher, environment)
        return _numbers(TORCHRUN, environment, dry_run)
    if dry_run and ours == [TORCHRUN.size]:
        return Launch(world_size=_whole(environment, TORCHRUN.size, 1))
    if launcher is not None:
        launch = _numbers(launcher, environment, dry_run)
        for name in (*ours, *TORCHRUN.local_rank):
            _check_agrees(name, launch, launcher, environment)
        return launch
    return _alone(environment)


def take_local_rank(argv: Sequence[str]) -> list[str]:
    """Take `--local_rank=N` out of the options, which `deepspeed` and `torch.distributed.launch` add.

    It becomes LOCAL_RANK where that is not set.

    Raises:
        ConfigError: no number follows, or LOCAL_RANK is another.
    """
    rest: list[str] = []
    options = iter(argv)
    for option in options:
        name, equals, value = option.partition("=")
        if name not in ("--local_rank", "--local-rank"):
            rest.append(option)
            continue
        given = {name: value if equals else next(options, "")}
        number = _whole(given, name, 0)
        known = os.environ.setdefault("LOCAL_RANK", str(number))
        require(known == str(number), f"{name} is {number}, but LOCAL_RANK is {known}: give one of them")
    return rest


def _launcher(environment: Mapping[str, str]) -> Launcher | None:
    """The launcher that started this process with others, by its own variables."""
    for launcher in LAUNCHERS:
        if launcher.rank in environment or launcher.size in environment:
            return launcher
    if PMI.local_rank[0] not in environment and _is_task_of_srun(environment):
        return SRUN
    if PMI.rank in environment or PMI.size in environment:
        return PMI
    require(
        "PMIX_RANK" not in environment or TORCHRUN.size in environment,
        f"PMIX_RANK is {environment.get('PMIX_RANK')}, but nothing says how many processes were started: set RANK, "
        f"WORLD_SIZE and LOCAL_RANK for each, or start them with crnet launch; {ALONE}",
    )
    return None


def _is_task_of_srun(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process.

    A batch script and salloc's shell have SLURM's variables, too: as process 0 without a step, or in a reserved step.
    """
    step = environment.get("SLURM_STEP_ID", "")
    in_a_step = step.isascii() and step.isdigit() and int(step) < FIRST_STEP_OF_SLURM
    return SRUN.rank in environment and (in_a_step or environment[SRUN.rank] != "0")


def _numbers(launcher: Launcher, environment: Mapping[str, str], dry_run: bool) -> Launch:
    size_name = _size_name(launcher, environment)
    for name, other in ((launcher.rank, size_name), (size_name, launcher.rank)):
        if name not in environment:
            raise ConfigError(
                f"{other} is set, but {name} is not, so nothing says which of the processes this is: start them "
                f"with {launcher.name} or crnet launch; {ALONE}"
            )
    size = _whole(environment, size_name, 1)
    rank = _whole(environment, launcher.rank, 0, size, size_name)
    local = next((name for name in launcher.local_rank if name in environment), None)
    local_size_name = next((name for name in launcher.local_size if name in environment), None)
    local_size = None if local_size_name is None else _whole(environment, local_size_name, 1)
    local_rank = None
    if local is not None:
        local_rank = _whole(environment, local, 0, local_size or size, local_size_name or size_name)
    if size == 1:
        return Launch(local_rank=local_rank)
    if dry_run:
        return Launch(rank, size, local_rank)
    address, port = _meeting(launcher, environment, size, size == local_size)
    return Launch(rank, size, local_rank, address, port, binds_devices=launcher is not TORCHRUN)


def _meeting(launcher: Launcher, environment: Mapping[str, str], size: int, one_node: bool) -> tuple[str, int]:
    address = environment.get("MASTER_ADDR", "")
    if not address and launcher is SRUN:
        address = first_host(environment.get("SLURM_STEP_NODELIST", ""))
    if not address and launcher is not TORCHRUN and one_node:
        address = LOOPBACK
    if not address:
        raise ConfigError(
            f"{launcher.rank} is set, but MASTER_ADDR is not, so {size} ranks cannot meet: start them with "
            f"crnet launch or torchrun, or set MASTER_ADDR to the name of the first node; {ALONE}"
        )
    if "MASTER_PORT" in environment:
        return address, _whole(environment, "MASTER_PORT", 1, 2**16, "the number of ports")
    require(
        launcher is not TORCHRUN,
        f"RANK is set, but MASTER_PORT is not, so ranks cannot meet: start them with crnet launch or torchrun; {ALONE}",
    )
    job = ".".join(environment[name] for name in launcher.job if name in environment)
    # a port for each job of a node, below those that the system assigns
    return address, 10000 + zlib.crc32(job.encode()) % 20000 if job else DEFAULT_PORT


def first_host(nodes: str) -> str:
    """The first name of SLURM's list of nodes: `gpu[07-09,12],cpu1` begins with gpu07."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first.group()) if first else ""


def _check_against(launcher: Launcher | None, environment: Mapping[str, str]) -> None:
    """Refuse a RANK that was set before srun or mpirun started the processes, so that all have the same.

    An agent below them, such as torchrun, numbers its processes itself.
    """
    if launcher is None or {"TORCHELASTIC_RUN_ID", "CROSS_RANK", "GROUP_RANK"} & set(environment):
        return
    rank, size = environment["RANK"], environment["WORLD_SIZE"]
    theirs = environment.get(launcher.rank, rank)
    require(
        theirs == rank or size == "1" or size != environment.get(_size_name(launcher, environment)),
        f"RANK is {rank} where {launcher.rank} is {theirs}, so it was set before {launcher.name} started the processes "
        "and is the same in all of them: set it for each, or unset RANK and WORLD_SIZE",
    )


def _size_name(launcher: Launcher, environment: Mapping[str, str]) -> str:
    return launcher.size if launcher is not SRUN or launcher.size in environment else "SLURM_NTASKS"


def _check_agrees(name: str, launch: Launch, launcher: Launcher, environment: Mapping[str, str]) -> None:
    found = {"RANK": launch.rank, "WORLD_SIZE": launch.world_size, "LOCAL_RANK": launch.local_rank}[name]
    if name not in environment or found is None:
        return
    number = _whole(environment, name, 0)
    require(
        number == found,
        f"{name} is {number}, but {launcher.name} started this process as {found}: unset {name}, or set RANK, "
        "WORLD_SIZE and LOCAL_RANK for each process",
    )


def _alone(environment: Mapping[str, str]) -> Launch:
    size = _whole(environment, TORCHRUN.size, 1) if TORCHRUN.size in environment else 1
    require(
        size == 1,
        f"WORLD_SIZE is {size}, but RANK is not set, so no launcher started {size} processes: start them with "
        f"crnet launch, add --dry-run to plan for {size}, or unset WORLD_SIZE",
    )
    if TORCHRUN.rank in environment:
        rank = _whole(environment, TORCHRUN.rank, 0)
        raise ConfigError(
            f"RANK is {rank}, but WORLD_SIZE is not set, so nothing says how many processes there are: start them with "
            f"crnet launch or torchrun; {ALONE}"
        )
    local = _whole(environment, "LOCAL_RANK", 0) if "LOCAL_RANK" in environment else 0
    require(
        local == 0,
        f"LOCAL_RANK is {local}, but RANK and WORLD_SIZE are not set, so this process would train alone: start the "
        f"processes with crnet launch or torchrun; {ALONE}",
    )
    tasks = environment.get("SLURM_NTASKS", "")
    if not (tasks.isascii() and tasks.isdigit() and int(tasks) > 1):
        return Launch()
    return Launch(
        remark=f"note: SLURM gave this job {tasks} tasks, but this is one process outside of srun, so it trains alone: "
        "start it with srun for one process per task"
    )


def _whole(environment: Mapping[str, str], name: str, least: int, below: int = MOST_PROCESSES, reason: str = "") -> int:
    text = environment[name]
    plain = text.isascii() and text.isdigit() and len(text) < 20
    if not plain or not least <= int(text) < below + (not reason):
        most = f"below {reason} ({below})" if reason else f"{below} at most"
        raise ConfigError(f"{name} is {text!r}, but must be a whole number, {least} at least and {most}: correct it")
    return int(text)
