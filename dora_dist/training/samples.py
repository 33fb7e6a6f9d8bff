"""Answers to a few validation records after each evaluation, to see what the model has learnt to say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dora_dist.config import RunConfig
from dora_dist.data import RaggedDataset, TokenizedData, validation_records
from dora_dist.models.heads import Head
from dora_dist.runtime.console import note, warn
from dora_dist.runtime.distributed import World, together
from dora_dist.runtime.errors import FailedAlone, LostRank, Stopped, UserError
from dora_dist.tasks import problems, task_named
from dora_dist.tasks.prompting.answering import answers
from dora_dist.tasks.prompting.base import Prompt, Prompting
from dora_dist.training.loaders import on_device
from dora_dist.zero3.teardown import abandon_forward

PATIENCE = timedelta(seconds=60)
"""How long ranks that are through with a batch of answers wait for one another; their gathers keep them in step."""

PASSED_OVER = 16
"""Records that are looked at for each sample: some may have no answer, or a prompt that is too long."""

_HOST = torch.device("cpu")


@dataclass(frozen=True)
class Sample:
    """A prompt of `Prompting.asked`, what its record answers, and how many tokens there is room for."""

    prompt: Prompt
    expected: str
    room: int


@dataclass(frozen=True)
class Asked:
    """Samples that are answered at once, and what the model reads of them besides tokens, in host memory."""

    samples: Sequence[Sample]
    inputs: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Subject:
    """The model of a run that has not begun, as `Task.prompting` wants one."""

    path: str
    head: Head
    run: Mapping[str, Any]
    base: Path
    tokenizer_source: str | Path
    tokenizer: Any

    def configuration(self, sections: dict[str, Any]) -> RunConfig:
        return RunConfig.from_dict(sections, origin="the run", rules=problems)


class Samples:
    """Asks a model in evaluation mode, greedily. A failure is said once, and then nothing is asked any more."""

    def __init__(self, tokenizer: Any, batches: Sequence[Asked]) -> None:
        self._tokenizer, self._batches = tokenizer, batches

    def answered(
        self, engine: Any, device: torch.device, dtype: torch.dtype, *, stopping: Callable[[], bool]
    ) -> list[dict[str, str]]:
        """[{"prompt", "answer", "expected"}], the same on every rank (collective).

        All ranks generate all answers: each takes part in every gather of a weight, and one has as much to do as
        four in a batch. `stopping` (collective) is asked before each batch whether to leave out those that are left.
        A rank that fails alone ends the run, as it does in training.
        """
        found: list[dict[str, str]] = []
        try:
            for asked in self._batches:
                if stopping():
                    break
                with together("generating samples", PATIENCE):
                    found += self._batch(engine.module, asked, device, dtype)
        except (Stopped, LostRank, FailedAlone):
            raise
        except Exception as error:  # what a model cannot generate must not end a run that learns
            warn(f"logging.samples: no answers of this run are recorded from here on: {_line(error)}")
            self._batches = []
            abandon_forward(engine)
            return []
        return found

    def _batch(self, model: Any, asked: Asked, device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, str]]:
        said = answers(
            model,
            self._tokenizer,
            [sample.prompt for sample in asked.samples],
            place=device,
            max_new_tokens=asked.samples[0].room,
            inputs=on_device(dict(asked.inputs), device, dtype),
            sharded=dist.get_world_size() > 1,
        )
        for sample, answer in zip(asked.samples, said, strict=True):
            yield {"prompt": sample.prompt.text, "answer": answer.text, "expected": sample.expected.strip()}


def read_samples(config: RunConfig, base: Path, processor: Any, data: TokenizedData, *, world: World) -> Samples | None:
    """The samples of a run whose names are `fetched` (collective); None where there are none, or none can be made.

    Rank 0 reads them for all: its logging section counts, and the files need not be read again by every rank.
    """
    if not config.training.eval_every or data.validation is None:
        return None
    tokenizer = task_named(config.model.task).tokenizer(processor)
    try:
        chosen: list[Any] = [[]]
        with together("choosing samples"):
            if world.first and config.logging.samples:
                chosen = [choose(config, base, tokenizer, data.validation)]
        dist.broadcast_object_list(chosen)
        with together("reading samples"):  # their pictures, on every node
            batches = batches_of(config, base, tokenizer, chosen[0])
    except (Stopped, LostRank):
        raise
    except Exception as error:  # the data is read, and the run can do without
        warn(f"logging.samples: no answers of this run will be recorded: {_line(error)}")
        return None
    return Samples(tokenizer, batches) if batches else None


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).split("\n")[0]


def choose(config: RunConfig, base: Path, tokenizer: Any, rows: RaggedDataset) -> list[Sample]:
    """The first samples of a validation set whose prompt fits, and whose answer has words. Raises UserError."""
    wanted, longest = config.logging.samples, config.data.longest_text
    if (own := _prompting(config, base, tokenizer)) is None:
        return []  # the task's models write no texts
    prompting: dict[str, Prompting | None] = {config.data.format: own}
    found: list[Sample] = []
    for format, record in validation_records(rows, config.data, most=PASSED_OVER * wanted):
        if format not in prompting:
            prompting[format] = _prompting(config, base, tokenizer, format)
        how = prompting[format]
        assert how is not None  # it is of the same task
        try:
            prompt, expected = how.asked(record)
            how.inputs([prompt], _HOST)  # a picture that cannot be read is known before others rely on it
            room = how.room(prompt, config.logging.sample_tokens)
        except UserError:
            continue
        if len(prompt.ids) <= longest and expected.strip():
            found.append(Sample(prompt, expected, room))
        if len(found) == wanted:
            break
    if not found:
        note(
            "logging.samples: none of the first validation records is answered after evaluations: their prompts exceed "
            f"data.cutoff_len = {longest} or what the model reads, or they have no answer"
        )
    return found


def _prompting(config: RunConfig, base: Path, tokenizer: Any, format: str | None = None) -> Prompting | None:
    """Of the run's data.format, or of that of one of its sources."""
    task, run = task_named(config.model.task), config.model_dump(mode="json")
    run["data"] |= {"train": None, "format": format or config.data.format}  # not those of a mixture's other sources
    source = config.model.tokenizer or base
    subject = _Subject(config.model.path, task.head(config.model), run, base, source, tokenizer)
    return task.prompting(subject, format=None, chat_template=None)


def batches_of(config: RunConfig, base: Path, tokenizer: Any, samples: Sequence[Sample]) -> list[Asked]:
    """Batches of no more tokens than training's have, or of one prompt, answered alike, in order. Raises UserError for
    a picture that cannot be read.
    """
    if not samples:
        return []
    prompting = _prompting(config, base, tokenizer)
    assert prompting is not None  # else there were none
    most = config.training.micro_batch_size * config.data.longest_row
    groups: list[list[Sample]] = []
    for sample in samples:
        group = [*groups[-1], sample] if groups else []
        longest = max((len(each.prompt.ids) + each.room for each in group), default=0)
        if group and _kind(group[0]) == _kind(sample) and len(group) * longest <= most:
            groups[-1] = group
        else:
            groups.append([sample])
    return [Asked(group, prompting.inputs([sample.prompt for sample in group], _HOST)) for group in groups]


def _kind(sample: Sample) -> tuple[Any, ...]:
    return sample.prompt.ends, sample.prompt.stop, bool(sample.prompt.pictures), sample.room
