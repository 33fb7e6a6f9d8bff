"""A real Slurm cluster of two nodes on this machine: `with Cluster() as cluster: cluster.run("sinfo")`.

Head and nodes are Linux namespaces, each with its own host name, address, mounts and processes, on a bridge that
only they see: slurmctld and munged on the head, a slurmd on each node. All of it lives inside the head's process
namespace, and the head ends when its standard input closes. So nothing outlives the process that started the
cluster, however that ends; several clusters can be up at once; and no file of the machine's own is touched.
"""

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

NODES = ("n0", "n1", "g0")
TOOLS = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "munged": "munge", "ip": "iproute2"}

# Slurm is told to be quick: to see that a node is lost (SlurmdTimeout), to start a requeued job (cred_expire,
# sched_interval), to kill what does not end (KillWait). It asks a machine for its CPUs, but believes us instead.
_CONF = """
ClusterName=test
SlurmctldHost=head(10.77.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
SlurmdLogFile={folder}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0
MinJobAge=100000
ReturnToService=2
SlurmdTimeout=5
MessageTimeout=4
KillWait=10
OverTimeLimit=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[0-1] NodeAddr=10.77.0.[10-11] CPUs=4 Sockets=1 CoresPerSocket=4 RealMemory=2000
GresTypes=gpu
NodeName=g0 NodeAddr=10.77.0.12 CPUs=4 Sockets=1 CoresPerSocket=4 Gres=gpu:2
PartitionName=main Nodes=n[0-1] Default=YES GraceTime=60
PartitionName=gpu Nodes=g0
PartitionName=urgent Nodes=n[0-1] PriorityTier=10
"""

# The working directory of what follows is the cluster's folder.


# `cat` ends when the pipe from outside closes, and everything with it.
_HEAD = """
set -e
hostname head
mount --bind hosts /etc/hosts
ip link set lo up
ip link add br0 type bridge
ip addr add 10.77.0.1/24 dev br0
ip link set br0 up
munged --force --key-file=$PWD/munge.key --socket=$PWD/munge.socket --pid-file=$PWD/munge.pid \
    --log-file=$PWD/munge.log --seed-file=$PWD/munge.seed
slurmctld
echo ready
cat >/dev/null
kill -KILL -1
rm -rf "$PWD"
"""

# Run on the head. Killing `unshare` ends all of a node at once, as a power cut would.
_NODE = """
set -e
node=$1
unshare --net --uts --mount --pid --fork --kill-child --mount-proc bash -c "
    hostname $node
    until ip link show up | grep -q eth0; do sleep 0.02; done
    slurmd -D -N $node
    exit" >>$node.out 2>&1 </dev/null &
echo $! >$node.unshare
until [ $(readlink /proc/$!/ns/net) != $(readlink /proc/self/ns/net) ]; do sleep 0.02; done
ip link add $node type veth peer name eth0 netns $!
ip link set $node master br0 up
address=$(awk -v node=$node '$2 == node { print $1 }' hosts)
nsenter --target $! --net sh -c "ip link set lo up; ip addr add $address/24 dev eth0; ip link set eth0 up"
"""

_HOSTS = """127.0.0.1 localhost
10.77.0.1 head
10.77.0.10 n0
10.77.0.11 n1
10.77.0.12 g0
"""

# `ssh [OPTIONS] HOST COMMAND` on the head, without a server, keys or the user's settings.
_SSH = """#!/bin/bash
while getopts 2axqo:p:l: _; do :; done
shift $((OPTIND - 1))
unshare=$(<{folder}/"$1".unshare)
read -r init </proc/"$unshare"/task/"$unshare"/children
shift
exec nsenter --target "$init" --net --uts --mount --pid --wdns="$HOME" env -i HOME="$HOME" \
    PATH=/usr/sbin:/usr/bin:/sbin:/bin bash -c "$*"
"""


def missing() -> str:
    """What keeps a cluster from starting on this machine, and what to do; "" if nothing does."""
    if os.geteuid() != 0:
        return "a Slurm cluster for tests needs root (for namespaces and slurmd)"
    packages = {package for tool, package in TOOLS.items() if shutil.which(tool, path=_PATH) is None}
    if packages:
        return f"a Slurm cluster for tests needs: apt-get install {' '.join(sorted(packages))}"
    if subprocess.run([*_NAMESPACES, "true"], check=False, capture_output=True).returncode:
        return "a Slurm cluster for tests needs the right to make namespaces (in a container: --privileged)"
    return ""


_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
_NAMESPACES = ("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc")


class Cluster:
    """Two nodes, n0 and n1, and a head to submit from."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-cluster-"))
        ours = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        self.environment = {**ours, "PATH": _PATH, "SLURM_CONF": f"{self.folder}/slurm.conf"}
        self._head: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End every process of the cluster and remove its folder."""
        if self._head is not None:
            self._head.communicate()  # closes its standard input and waits
        shutil.rmtree(self.folder, ignore_errors=True)  # gone already, unless the head never came up

    def _start(self) -> None:
        if problem := missing():
            raise RuntimeError(problem)
        self._write_files()
        self._head = subprocess.Popen(
            [*_NAMESPACES, "bash", "-c", _HEAD],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for whoever uses the cluster
        )
        assert self._head.stdout is not None
        if self._head.stdout.readline() != "ready\n":
            raise RuntimeError(f"the head did not start\n{self.logs()}")
        for node in NODES:
            self.start_node(node)
        self.wait(lambda: self.run("sinfo", "-h", "-o", "%D %T", "-p", "main") == "2 idle\n", "both nodes")

    def _write_files(self) -> None:
        self.folder.chmod(0o755)  # Slurm's clients reach munged's socket through it
        files = {
            "slurm.conf": _CONF.format(folder=self.folder),
            # None are used, so it does not matter which kind the machine has; finding out fails on some.
            "cgroup.conf": "CgroupPlugin=cgroup/v1\n",
            "gres.conf": "NodeName=g0 Name=gpu File=/dev/zero\nNodeName=g0 Name=gpu File=/dev/full\n",
            "hosts": _HOSTS,
            "ssh": _SSH.format(folder=self.folder),
        }
        for name, text in files.items():
            (self.folder / name).write_text(text)
        (self.folder / "ssh").chmod(0o755)
        (self.folder / "munge.key").touch(0o600)
        (self.folder / "munge.key").write_bytes(os.urandom(128))

    # --- commands -----------------------------------------------------------------------------------------------

    def on_head(self, *words: object, cwd: Path | None = None) -> list[str]:
        """The command line, to be run with `environment`, that runs a command on the head."""
        assert self._head is not None
        (init,) = psutil.Process(self._head.pid).children()
        spaces = ["--net", "--uts", "--mount", "--pid", f"--wdns={cwd or Path.cwd()}"]
        return ["nsenter", "--target", str(init.pid), *spaces, *map(str, words)]

    def run(self, *words: object, cwd: Path | None = None, timeout: float = 300, **environment: str) -> str:
        """Run a command on the head; returns what it prints. Raises RuntimeError if it fails."""
        done = subprocess.run(
            self.on_head(*words, cwd=cwd),
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, words))}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def wait(self, condition: Callable[[], bool], what: str, timeout: float = 120) -> None:
        """Return once `condition()` holds. Raises TimeoutError, with the cluster's logs, after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not within {timeout:g} s\n{self.logs()}")
            time.sleep(0.1)

    def logs(self, lines: int = 30) -> str:
        """The end of every daemon's log."""
        files = sorted(file for pattern in ("*.log", "*.out") for file in self.folder.glob(pattern))
        return "\n".join(f"--- {file.name}\n" + "\n".join(file.read_text().splitlines()[-lines:]) for file in files)

    # --- nodes --------------------------------------------------------------------------------------------------

    def start_node(self, node: str) -> None:
        """Switch a node on."""
        self.run("bash", "-c", _NODE, "bash", node, cwd=self.folder)

    def lose_node(self, node: str) -> None:
        """Cut a node's power: no process of it is left, and nobody is told."""
        unshare = (self.folder / f"{node}.unshare").read_text().strip()
        self.run("ip", "link", "del", node)
        self.run("kill", "-KILL", unshare)

    # --- jobs ---------------------------------------------------------------------------------------------------

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says, by field."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "-o", number)))

    def ranks(self, number: str) -> dict[int, psutil.Process]:
        """The Python process of each task of a job, by task number."""
        assert self._head is not None
        found: dict[int, psutil.Process] = {}
        for process in psutil.Process(self._head.pid).children(recursive=True):
            try:
                environ = process.environ()
                step = environ.get("SLURM_JOB_ID"), environ.get("SLURM_STEP_ID")  # a batch script is no step
                if step == (number, "0") and process.name() == "python":
                    found.setdefault(int(environ["SLURM_PROCID"]), process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue  # it ended just now
        return found
