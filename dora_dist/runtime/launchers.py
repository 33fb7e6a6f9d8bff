"""Which launcher started this process, and as which rank of how many: one answer for every launcher.

`discover` reads an environment and nothing else. `settle` adds what only the other ranks or Slurm know (where to
meet), and writes the answer into this process's environment under the names that torch and DeepSpeed read.
"""

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dora_dist.runtime.errors import UserError

OWN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What every launcher's ranks find in their environment after `settle`."""

_NAMES = {
    "openmpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "mpich": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}
"""Rank, number of ranks and rank on the node, as each launcher calls them. Intel MPI's are MPICH's."""

PORT_OPTIONS = {
    "deepspeed": "deepspeed --master_port N",
    "torchrun": "torchrun --master_port N (with a rendezvous of its own, --rdzv_endpoint HOST:N)",
    "openmpi": "mpirun -x MASTER_PORT=N",
    "mpich": "mpirun -genv MASTER_PORT N",
    "intelmpi": "mpirun -genv MASTER_PORT N",
    "srun": "MASTER_PORT=N srun",
}
"""How a launcher's ranks are told to meet at another port, N."""

_LOCAL_SIZES = {"openmpi": "OMPI_COMM_WORLD_LOCAL_SIZE", "mpich": "MPI_LOCALNRANKS"}
_FIRST_SPECIAL_STEP = 0xFFFFFFF0  # batch scripts, interactive shells and the like are steps beyond this number
_PORTS = range(15_000, 30_000)  # below those that Linux hands to outgoing connections


@dataclass(frozen=True)
class Launch:
    """What the environment says of this process. None: it does not say."""

    launcher: str
    """deepspeed, torchrun, openmpi, mpich, intelmpi, srun, environment (the variables of `OWN`, set by other means),
    or none (one process)."""
    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None
    local_world_size: int | None = None
    address: str | None = None
    port: int | None = None


def discover(environment: Mapping[str, str]) -> Launch:
    """Who started a process with this environment.

    torchrun's and DeepSpeed's agents may themselves be started by mpirun or srun, and mpirun's by srun: the innermost
    launcher counts. Where its own variables and those of `OWN` are both set, they must agree. A process in a Slurm job
    that srun did not start is one process. Raises UserError, naming variables and values, where the environment
    contradicts itself.
    """
    rank, world_size, local_rank, local_size = (_number(environment, name) for name in OWN[:4])
    given = Launch(
        launcher=_agent(environment) or "environment",
        rank=rank or 0,
        world_size=world_size or 1,
        local_rank=local_rank,
        local_world_size=local_size or _number(environment, "LOCAL_SIZE"),
        address=environment.get("MASTER_ADDR") or None,
        port=_number(environment, "MASTER_PORT"),
    )
    starter = None if given.launcher != "environment" else _starter(environment)
    if starter is not None:
        launch = _started_by(starter, environment, given)
    elif rank is None and world_size in (None, 1):
        return Launch("none", local_rank=0, local_world_size=1)
    else:
        launch = given
        _check_own(environment)
    if launch.port is not None and not 0 < launch.port < 1 << 16:
        raise UserError(f"MASTER_PORT = {launch.port} in the environment is not a port (1 to 65535); set another")
    if launch.rank >= launch.world_size:
        name, size = ("RANK", "WORLD_SIZE") if starter is None else _NAMES[starter][:2]
        raise UserError(
            f"the environment has {name} = {launch.rank} with {size} = {launch.world_size}: ranks count from 0. "
            + _remedy(environment)
        )
    return launch


def settle() -> Launch:
    """Find out who started this process and where the ranks meet, and write it into os.environ (collective under MPI).

    In the result only local_world_size may be None: where the variables of `OWN` were set by hand. Raises UserError as
    `discover` does, and when a launcher's MPI library cannot be used.
    """
    launch = discover(os.environ)
    if launch.world_size == 1 and launch.launcher not in ("torchrun", "deepspeed"):
        launch = replace(launch, local_rank=0, local_world_size=1)
        if launch.launcher != "environment" or None in (launch.address, launch.port):
            launch = replace(launch, address="127.0.0.1", port=free_port())
    elif launch.launcher == "srun" and launch.address is None:
        launch = replace(launch, address=first_host(os.environ["SLURM_STEP_NODELIST"]))
    elif None in (launch.local_rank, launch.address, launch.port):
        launch = _ask_mpi(launch)
    found = (launch.rank, launch.world_size, launch.local_rank, launch.local_world_size, launch.address, launch.port)
    os.environ.update({name: str(value) for name, value in zip(OWN, found, strict=True) if value is not None})
    if launch.local_world_size is not None:
        # DeepSpeed's name for it. Where it equals the world size, DeepSpeed may use shared memory.
        os.environ["LOCAL_SIZE"] = str(launch.local_world_size)
    return launch


def rank_among_several(environment: Mapping[str, str]) -> int | None:
    """This process's rank if it is one of several and says so without contradiction."""
    try:
        launch = discover(environment)
    except UserError:
        return None
    return launch.rank if launch.world_size > 1 else None


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list such as "n[1-3,7],m2"."""
    if shutil.which("scontrol") is not None:
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
        if listed.returncode == 0 and listed.stdout.strip():
            return listed.stdout.split()[0]
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodes).split(",")[0]  # containers seldom hold Slurm's commands


def free_port() -> int:
    """A TCP port that nobody on this machine listens on now."""
    with socket.socket() as s:
        s.bind(("", 0))
        return int(s.getsockname()[1])


def source_address(target: str) -> str:
    """This machine's address on the way to `target` (name or address). Raises OSError where none leads there."""
    family, kind, protocol, _, place = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as s:
        s.connect(place)  # sends nothing: a datagram socket only picks its route
        return str(s.getsockname()[0])


def _agent(environment: Mapping[str, str]) -> str | None:
    """The launcher that sets `OWN` itself, and whose marks nobody exports by hand."""
    if "TORCHELASTIC_RUN_ID" in environment:
        return "torchrun"
    return "deepspeed" if "CROSS_SIZE" in environment else None


def _starter(environment: Mapping[str, str]) -> str | None:
    """The key in `_NAMES` of the launcher that started this process."""
    step = environment.get("SLURM_STEP_ID", "")
    in_step = step.isdigit() and int(step) < _FIRST_SPECIAL_STEP and "SLURM_STEP_NUM_TASKS" in environment
    if "OMPI_COMM_WORLD_RANK" in environment:
        return "openmpi"
    # srun sets PMI_* as well, for MPI programs; where hydra started the ranks, SLURM_* are those of its proxy.
    if "PMI_RANK" in environment and ("MPI_LOCALNRANKS" in environment or not in_step):
        return "mpich"
    return "srun" if in_step else None


def _started_by(starter: str, environment: Mapping[str, str], given: Launch) -> Launch:
    rank, world_size, local_rank = (_number(environment, name) for name in _NAMES[starter])
    for own, theirs in zip(OWN, _NAMES[starter][:2], strict=False):
        if environment.get(theirs) is None:
            raise UserError(f"{theirs} is not set, though this process seems to be started by {starter}")
        if own in environment and int(environment[own]) != int(environment[theirs]):
            raise UserError(
                f"the environment has {own} = {environment[own]}, but {theirs} = {environment[theirs]}: {starter} "
                f"started this process, and {own} is left over. " + _remedy(environment)
            )
    assert rank is not None and world_size is not None
    launch = replace(given, launcher=starter, rank=rank, world_size=world_size, local_rank=local_rank)
    if starter == "srun":
        return _srun(environment, launch)
    if "I_MPI_HYDRA_UUID" in environment:
        launch = replace(launch, launcher="intelmpi")
    return replace(launch, local_world_size=_number(environment, _LOCAL_SIZES[starter]))


def _srun(environment: Mapping[str, str], launch: Launch) -> Launch:
    address = launch.address
    if address is None and environment.get("SLURM_STEP_NUM_NODES") == "1":
        address = "127.0.0.1"
    port = launch.port
    if port is None:  # a function of what all ranks know, and another for each step and each requeued run of a job
        job, step, restart = (
            _number(environment, f"SLURM_{name}") or 0 for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT")
        )
        port = _PORTS[(61 * job + step + 7919 * restart) % len(_PORTS)]
    counts = [
        int(count)
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
        for _ in range(int(times or 1))
    ]
    node = _number(environment, "SLURM_NODEID") or 0
    size = counts[node] if node < len(counts) else None
    return replace(launch, address=address, port=port, local_world_size=size)


def _check_own(environment: Mapping[str, str]) -> None:
    """`OWN` alone has to say everything."""
    several = _number(environment, "WORLD_SIZE") != 1
    needed = (*OWN[:3], *OWN[4:]) if several else OWN[:2]
    missing = [name for name in needed if not environment.get(name)]
    if missing:
        there = ", ".join(f"{name} = {environment[name]}" for name in OWN if environment.get(name))
        raise UserError(
            f"the environment has {there}, but not {', '.join(missing)}: it is left over from another run, or "
            "incomplete. " + _remedy(environment)
        )


def _remedy(environment: Mapping[str, str]) -> str:
    names = " ".join(name for name in OWN if name in environment)
    unset = f"Unset what no launcher set (unset {names}), and start" if names else "Start"
    return f"{unset} with deepspeed, torchrun, mpirun or srun"


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "").strip()
    if text and not text.isdigit():
        raise UserError(f"{name} = {text!r} in the environment is not a whole number. " + _remedy(environment))
    return int(text) if text else None


def _ask_mpi(launch: Launch) -> Launch:
    """Ask the other ranks, over MPI, for what the environment leaves open. MPI is finalised before this returns."""
    # Several MPI libraries on one machine are common, and mpi4py would take the first it finds.
    library = "libmpi.so.40" if launch.launcher == "openmpi" else "libmpi.so.12"
    os.environ.setdefault("MPI4PY_LIBMPI", f"{library}:libmpi.so")
    other_ways = (
        "set MPI4PY_LIBMPI to the libmpi.so that belongs to mpirun, or give MASTER_ADDR and MASTER_PORT to all ranks "
        "(mpirun -x, -genv), or start with torchrun or srun"
    )
    try:
        import mpi4py

        mpi4py.rc.initialize = mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"{launch.launcher} started this process, but mpi4py cannot load an MPI library: {error}; {other_ways}"
        ) from error
    MPI.Init()
    world = MPI.COMM_WORLD
    loaded, mine = MPI.Get_library_version().split("\n")[0].strip(), (world.Get_rank(), world.Get_size())
    if mine == (launch.rank, launch.world_size):
        local = world.Split_type(MPI.COMM_TYPE_SHARED)
        launch = replace(launch, local_rank=local.Get_rank(), local_world_size=local.Get_size())
        hosts = world.allgather(socket.gethostname())
        place = (launch.address or _address_for(hosts), launch.port or free_port()) if launch.rank == 0 else None
        address, port = world.bcast(place)
        launch = replace(launch, address=address, port=port)
    MPI.Finalize()
    if mine != (launch.rank, launch.world_size):
        raise UserError(
            f"{launch.launcher} started rank {launch.rank} of {launch.world_size}, but to mpi4py's library ({loaded}) "
            f"this is rank {mine[0]} of {mine[1]}: it is not mpirun's own; {other_ways}"
        )
    return launch


def _address_for(hosts: list[str]) -> str:
    """An address of this machine that the other hosts can reach. Its own name may mean 127.0.1.1 here."""
    mine = socket.gethostname()
    others = [host for host in hosts if host != mine]
    if not others:
        return "127.0.0.1"
    try:
        return source_address(others[0])
    except OSError:
        return mine
