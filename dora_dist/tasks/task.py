"""`Task`: all that the rest asks of what a model is trained for; and the registry of tasks.

A task is looked at before torch is loaded, to check a configuration. So its file imports nothing heavy: a method that
needs models, data or losses imports them itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dora_dist.runtime import extras
from dora_dist.runtime.errors import UserError

if TYPE_CHECKING:
    from dora_dist.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
    from dora_dist.data import Reader, TokenizedData
    from dora_dist.models.heads import Head
    from dora_dist.tasks.evaluations.base import Evaluation, Settings, Subject
    from dora_dist.tasks.objectives.base import Objective
    from dora_dist.tasks.prompting.base import Prompting


STREAM = ("streaming", "shuffle_buffer")
"""The `Task.fields` of a task whose records can be read as a stream: each is a sample, whatever the others are."""


class Task(ABC):
    """What a model is trained for. The defaults here are those of a task on texts.

    name: as in model.task. formats: of its records, as in data.format. fields: of the data section,
    those that mean nothing to most other tasks. searching: settings of evaluation by which the model writes its answers
    (num_beams, max_new_tokens). packages: modules of pyproject's extras that it imports. trains_in_full: whether
    something is trained in full besides the adapters even where adapter.trained_modules is null. several: whether
    data.train says by name of which of several tasks its sources are.
    """

    name: ClassVar[str]
    formats: ClassVar[tuple[str, ...]]
    fields: ClassVar[tuple[str, ...]] = ()
    searching: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[tuple[str, ...]] = ()
    trains_in_full: ClassVar[bool] = True
    several: ClassVar[bool] = False

    # --- the configuration ------------------------------------------------------------------------------------------

    def metrics(self, model: ModelConfig) -> tuple[str, ...]:
        """What evaluation finds besides the loss, by which training.metric can choose a checkpoint."""
        return ()

    def words(self, model: ModelConfig) -> str:
        """The task for messages about fields that do not fit it, as fields and their values."""
        return f'model.task = "{self.name}"'

    def problems(self, config: RunConfig) -> Iterator[str]:
        """What is wrong with a run of this task, one line each, naming the fields and the way out."""
        metric, known = config.training.metric, ("loss", *self.metrics(config.model))
        if metric not in known:
            yield f'training.metric = "{metric}": there is none for {self.words(config.model)}; use {", ".join(known)}'
        if (remedy := extras.missing(*self.packages)) is not None:
            yield f'model.task = "{self.name}": {remedy}'
        adapter = config.adapter
        in_full = self.trains_in_full if adapter.trained_modules is None else bool(adapter.trained_modules)
        others = adapter.magnitude_only_modules or adapter.trained_parameters
        if adapter.target_modules == [] and not others and not in_full:
            yield "adapter.target_modules = []: nothing to train; name modules, or null for the family's default"

    def fields_of(self, data: DataConfig) -> tuple[str, ...]:
        """Those of all tasks' `fields` that mean something for records of data.format."""
        return self.fields

    def problems_of_data(self, data: DataConfig) -> Iterator[str]:
        """As `problems`, with a data section whose format is one of this task's."""
        yield from ()

    def sources(self, name: str, file: str) -> Any:
        """What data.train is where `evaluate` measures a model on a file that the user calls `name`."""
        return file

    # --- a run ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def head(self, model: ModelConfig) -> Head:
        """The model's class of transformers, and what is new in it."""

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

    @abstractmethod
    def reader(self, processor: Any, *, model: ModelConfig, data: DataConfig) -> Reader:
        """What reads the records of a run."""

    def check_sets(self, data: TokenizedData, training: TrainingConfig) -> None:
        """Raise UserError where the sets that were read lack what `training` measures; warn of what they lack."""
        return

    @abstractmethod
    def objective(self, processor: Any, model: Any, *, data: DataConfig, training: TrainingConfig) -> Objective:
        """What a run minimises and measures, for a `model` of transformers."""

    def evaluation(self, subject: Subject, settings: Settings) -> Evaluation | None:
        """How `evaluate` measures a model. Raises UserError for settings that mean nothing here.

        None: as training does, by the objective's metrics on records of the task's format.
        """
        return None

    def prompting(self, subject: Subject, *, format: str | None, chat_template: str | None) -> Prompting | None:
        """How `generate` and `chat` ask a model, by data.format and data.chat_template where they are given.

        None: a model of this task writes no texts of its own. Raises UserError for what means nothing here.
        """
        return None


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
