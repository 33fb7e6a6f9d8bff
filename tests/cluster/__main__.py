"""`python -m tests.cluster` brings the cluster up and opens a shell on its head; the cluster ends with the shell.

`python -m tests.cluster --check` only says what keeps a cluster from starting here, if anything, and then exits with 1.
"""

import os
import subprocess
import sys

from tests.cluster.slurm import Cluster, missing


def main() -> int:
    problem = missing()
    if problem:
        print(problem, file=sys.stderr)
        return 1
    if "--check" in sys.argv:
        return 0
    with Cluster() as cluster:
        print("n0 and n1, and g0 with two GPUs that only Slurm believes in. Try: sinfo; srun -N2 hostname;")
        print(f"sbatch slurm/multinode.sh configs/quickstart.json. It ends with this shell. Its logs: {cluster.folder}")
        shell = os.environ.get("SHELL", "/bin/bash")
        return subprocess.call(cluster.on_head(shell), env=cluster.environment)


if __name__ == "__main__":
    sys.exit(main())
