"""A user's folder on the cluster, and what the user types there."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.slurm import Cluster
from tests.conftest import ROOT
from tests.distributed.training_runs import config, metrics

FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
STEPS = 30


@dataclass
class Workspace:
    """A folder to submit from: the repository's slurm/ and configs/, a toy base model and data."""

    cluster: Cluster
    folder: Path

    def run(self, *words: object, **environment: str) -> str:
        """A command typed on the cluster's head, with this checkout installed; one thread per rank."""
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        ours = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        return self.cluster.run(*words, cwd=self.folder, **{**ours, **environment})

    def sbatch(self, *words: object, **environment: str) -> str:
        """Submit; returns the job's number."""
        return self.run("sbatch", "--parsable", *words, **environment).strip()

    def finish(self, job: str, timeout: float = 240) -> str:
        """Wait until a job is over for good; returns how it ended."""
        self.wait(job, lambda: self.cluster.job(job)["JobState"] in FINAL, "the end", timeout)
        return self.cluster.job(job)["JobState"]

    def wait(self, job: str, condition: Any, what: str, timeout: float = 120) -> None:
        """Wait for a condition; what the job has said goes with the TimeoutError."""
        try:
            self.cluster.wait(condition, f"job {job}: {what}", timeout)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.said(job)}") from None

    def said(self, job: str) -> str:
        """Everything that a job and its ranks have written."""
        files = [self.folder / f"slurm-{job}.out", *sorted((self.folder / "logs" / job).glob("*.log"))]
        return "\n".join(f"--- {file.name}\n{file.read_text()}" for file in files if file.exists())

    def write_config(self, name: str, **changes: dict[str, Any]) -> str:
        """A run's file. The losses of its first steps do not depend on how many are to follow."""
        training = {"max_steps": STEPS, "schedule": "constant", "warmup_steps": 0}
        sections: dict[str, dict[str, Any]] = {"training": training, "checkpoint": {"save_every": 4}}
        changes = {key: {**sections.get(key, {}), **changes.get(key, {})} for key in sections | changes}
        file = self.folder / f"{name}.json"
        file.write_text(json.dumps(config(Path("base"), Path("data.json"), Path("runs") / name, **changes)))
        return file.name

    def losses(self, name: str) -> dict[int, float]:
        """A run's losses by step; none before it has begun."""
        run_dir = self.folder / "runs" / name
        return metrics(run_dir)["losses"] if (run_dir / "metrics.jsonl").exists() else {}

    def wait_for_step(self, job: str, name: str, step: int) -> None:
        """Return when a run has got so far."""
        self.wait(job, lambda: max(self.losses(name), default=0) >= step, f"step {step}")
