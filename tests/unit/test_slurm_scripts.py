"""What the batch scripts say before Slurm runs them; tests/cluster runs them."""

import os
import subprocess

from tests.conftest import ROOT


def test_llava_asks_slurm_for_the_same_as_every_run() -> None:
    general, llava = (
        [line for line in (ROOT / "slurm" / name).read_text().splitlines() if line.startswith("#SBATCH")]
        for name in ("multinode.sh", "llava_multinode.sh")
    )
    assert llava == general != []


def test_outside_a_job_it_says_how_to_submit() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    for name in ("multinode.sh", "llava_multinode.sh"):
        command = ["bash", f"slurm/{name}"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "sbatch slurm/multinode.sh" in done.stderr
