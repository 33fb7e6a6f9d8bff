"""`Evaluation`: what a task asks of a model on files of records; the settings that it is given, and the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dora_dist.models.heads import Head
from dora_dist.runtime.errors import UserError

if TYPE_CHECKING:
    from dora_dist.config import RunConfig

MODES = ("generate", "likelihood", "loss")
_ASKING = ("mode", "format", "instruction", "normalise")
_SEARCHING = ("num_beams", "max_new_tokens")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model is evaluated. None: as its task, or the run that it was trained in, has it.

    mode: "generate": what the model writes is compared with the records' answers; "likelihood": the likeliest of a
    record's candidates counts; "loss": of a language model, loss and perplexity of the answers alone. format: of the
    records. instruction: what follows a question about a picture; "": nothing. normalise: of likelihood, "sum" over
    a candidate's tokens (the default) or "mean". limit: only the first so many records of each file. dtype: "bf16",
    "fp16" or "fp32". fields: further fields of the configuration's data section, such as text_fields.
    """

    mode: str | None = None
    format: str | None = None
    instruction: str | None = None
    normalise: str | None = None
    num_beams: int | None = None
    max_new_tokens: int | None = None
    batch_size: int = 8
    limit: int | None = None
    dtype: str | None = None
    fields: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Raises UserError for what no kind of model knows."""
        check_settings(self.mode or MODES[0], self.normalise or "sum", self.batch_size)

    def given(self, names: Collection[str]) -> dict[str, Any]:
        """Those of the settings that are not None."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def refuse_all_but(self, known: Collection[str], task: str) -> None:
        """Raise UserError for the first setting, or field, that means nothing to a model of `task`."""
        for name, value in {**(self.fields or {}), **self.given((*_ASKING, *_SEARCHING))}.items():
            if name not in known:
                raise UserError(
                    f"{_typed(name, value)}: means nothing to this model, whose task is {task}; leave it out"
                )

    def refuse_other_modes(self) -> None:
        """Raise UserError for a setting that another mode than this one has."""
        mode = self.mode or MODES[0]
        of_others = self.given(_SEARCHING) if mode != "generate" else {}
        if mode != "likelihood":
            of_others |= self.given(("normalise",))
        for name, value in of_others.items():
            raise UserError(f"{_typed(name, value)}: means nothing with --mode {mode}; leave it out")

    def refuse_loss(self, task: str) -> None:
        """Raise UserError for the mode that only language models have."""
        if self.mode == "loss":
            raise UserError(f"--mode loss: is for a language model, and this is {task}; leave it out")


def check_settings(mode: str, normalise: str, batch_size: int) -> None:
    """Raise UserError for what no kind of model knows."""
    if mode not in MODES:
        raise UserError(f"--mode {mode}: is unknown; give one of {', '.join(MODES)}")
    if normalise not in ("sum", "mean"):
        raise UserError(f"--normalise {normalise}: is unknown; give sum or mean")
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: must be 1 or more")


def _typed(name: str, value: Any) -> str:
    """A setting as it is typed."""
    shown = " ".join(map(str, value)) if isinstance(value, list) else repr(value) if value == "" else value
    return f"--{name.replace('_', '-')} {shown}"


class Subject(Protocol):
    """The model that is evaluated, before its weights are read. Each property raises UserError for a broken folder."""

    @property
    def path(self) -> str:
        """What the user gave."""

    @property
    def head(self) -> Head:
        """What it was trained for."""

    @property
    def run(self) -> Mapping[str, Any]:
        """The configuration of the run that it was trained in; {} where there was none."""

    @property
    def base(self) -> Path:
        """The folder of the plain model, alone or under its adapter."""

    @property
    def tokenizer_source(self) -> str | Path:
        """The folder, file or hub name of its tokenizer: the adapter's own, or else the run's, or else the base's."""

    @property
    def tokenizer(self) -> Any:
        """Its fast tokenizer."""

    def configuration(self, sections: dict[str, Any]) -> RunConfig:
        """A run of these sections, checked by every rule; raises UserError as `RunConfig.from_dict` does."""


class Asked(ABC):
    """The records of one file, ready for a model."""

    @abstractmethod
    def score(self, model: Any, *, progress: bool) -> dict[str, Any]:
        """Metrics of a model in evaluation mode, "total" (how many records), and what else belongs in the result."""


class Evaluation(ABC):
    """One for each call of `evaluate`. Its constructor raises UserError for settings that mean nothing to the task.

    dtype: what the model is loaded in. facts: what a result begins with. settings: what a result says of them.
    """

    dtype: str
    facts: Mapping[str, Any]
    settings: Mapping[str, Any]

    @abstractmethod
    def read(self, name: str, file: str) -> Asked:
        """The records of a file that the user calls `name`. What can be checked without the model is checked here.

        Raises UserError, naming file and record.
        """

    def loaded(self, model: Any) -> None:
        """Called once, with the model in evaluation mode."""
        return

    def summary(self, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """What can be said of all files together."""
        return {}
