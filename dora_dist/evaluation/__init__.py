"""Models on files of records: `evaluate` loads a model, asks it what its task says, and collects the scores."""

from dora_dist.evaluation.results import as_table
from dora_dist.evaluation.run import evaluate
from dora_dist.tasks.evaluations.base import Settings
from dora_dist.tasks.evaluations.commonsense import PAPER_TASKS
from dora_dist.tasks.evaluations.labels import score_task

__all__ = ["PAPER_TASKS", "Settings", "as_table", "evaluate", "score_task"]
