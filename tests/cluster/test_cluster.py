"""The cluster itself: it is one, and nothing of it stays."""

import subprocess
import sys
from pathlib import Path

import psutil

from tests.cluster.slurm import Cluster
from tests.conftest import ROOT

# A process that starts a cluster with a job on it, says where, and is killed.
OWNER = """
import time
from tests.cluster.slurm import Cluster
with Cluster() as cluster:
    cluster.run("sbatch", "--output", "/dev/null", "--wrap", "sleep 1000")
    print(cluster.folder, flush=True)
    time.sleep(1000)
"""


def test_two_nodes_with_names_and_addresses_of_their_own(cluster: Cluster) -> None:
    said = cluster.run("srun", "--nodes", 2, "--label", "sh", "-c", "hostname; hostname -I")
    assert sorted(said.split("\n")) == ["", "0: 10.77.0.10 ", "0: n0", "1: 10.77.0.11 ", "1: n1"]


def test_nothing_is_left_of_a_cluster_whose_owner_is_killed(cluster: Cluster) -> None:
    command = [sys.executable, "-c", OWNER]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        folder = Path(owner.stdout.readline().strip())  # beside the other cluster: they do not meet
        processes = psutil.Process(owner.pid).children(recursive=True)
        assert folder.exists() and len(processes) > 5
        owner.kill()
    assert psutil.wait_procs(processes, timeout=10)[1] == []
    cluster.wait(lambda: not folder.exists(), "the end of its folder", 10)
