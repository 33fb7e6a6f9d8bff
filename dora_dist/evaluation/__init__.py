"""Models on files: accuracy of language models, generated as in the paper or by likelihood; answers about pictures;
other tasks' metrics."""

from dora_dist.evaluation.commonsense import PAPER_TASKS, Task
from dora_dist.evaluation.labels import score_task
from dora_dist.evaluation.run import as_table, evaluate

__all__ = ["PAPER_TASKS", "Task", "as_table", "evaluate", "score_task"]
