"""`Task`: all that the rest asks of what a model is trained for; and the registry of tasks.

A task is looked at before torch is loaded, to check a configuration. So its file imports nothing heavy: a method that
needs models, data or losses imports them itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dora_dist.runtime.errors import UserError

if TYPE_CHECKING:
    from dora_dist.config import DataConfig, ModelConfig, TrainingConfig
    from dora_dist.models.heads import Head
    from dora_dist.tasks.objectives.base import Objective


class Task:
    """What a model is trained for. The defaults here are those of a task on texts.

    name: as in model.task. formats: of its records, as in data.format.
    """

    name: ClassVar[str]
    formats: ClassVar[tuple[str, ...]]

    def head(self, model: ModelConfig) -> Head:
        """The model's class of transformers, and what is new in it."""
        raise NotImplementedError

    def processor(self, base: Path, model: ModelConfig, data: DataConfig) -> Any:
        """What turns records into a model's input, from the folder `base`: a fast tokenizer. Raises UserError."""
        from dora_dist.models.tokenizer import load_tokenizer

        source, own_code = model.tokenizer or str(base), model.trust_remote_code
        return load_tokenizer(source, trust_remote_code=own_code, generative=self.head(model).generative)

    def tokenizer(self, processor: Any) -> Any:
        """The tokenizer in a `processor`."""
        return processor

    def files(self, processor: Any, base: Path) -> dict[str, bytes]:
        """What belongs in an adapter's folder so that it can be used by itself, by the files' names."""
        from dora_dist.models.tokenizer import files_of

        return files_of(self.tokenizer(processor))

    def objective(self, processor: Any, model: Any, *, data: DataConfig, training: TrainingConfig) -> Objective:
        """What a run minimises and measures, for a `model` of transformers."""
        raise NotImplementedError


TASKS: dict[str, Task] = {}


def register(task: Task) -> None:
    """Make a task known by its name, which no other may have."""
    if type(TASKS.setdefault(task.name, task)) is not type(task):
        raise ValueError(f"there is another task of the name {task.name!r}: {TASKS[task.name]!r}")


def task_named(name: str) -> Task:
    """Raises UserError for a name that no task has."""
    if name not in TASKS:
        raise UserError(f'model.task = "{name}": must be one of {", ".join(TASKS)}')
    return TASKS[name]
