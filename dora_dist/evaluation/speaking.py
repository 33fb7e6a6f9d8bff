"""A model that answers prompts in its own words, in one process: token by token, or several prompts at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dora_dist.evaluation.inference import EvaluatedModel
from dora_dist.runtime.errors import UserError
from dora_dist.tasks import task_named
from dora_dist.tasks.prompting.answering import Answer, answers
from dora_dist.tasks.prompting.base import Prompt


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen: the likeliest one, or (where one of the first three is given) drawn.

    max_new_tokens: the longest answer, cut where the model reads no further. temperature: 0 is the likeliest. top_p,
    top_k: drawn from the likeliest tokens that have this probability together, or from so many. repetition_penalty:
    above 1 makes what was said before less likely. seed: of what is drawn.
    """

    max_new_tokens: int = 512
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UserError, by the option's name, for a number that means nothing."""
        for name, right, range in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature is None or 0 <= self.temperature <= 100, "between 0 and 100"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k is None or self.top_k >= 1, "1 or more"),
            ("repetition_penalty", self.repetition_penalty is None or self.repetition_penalty > 0, "above 0"),
        ):
            if not right:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be {range}")
        if self.temperature == 0 and (self.top_p, self.top_k) != (None, None):
            raise UserError("--temperature 0: takes the likeliest token, so --top-p and --top-k mean nothing with it")

    @property
    def draws(self) -> bool:
        return bool(self.temperature) or (self.top_p, self.top_k) != (None, None)

    @property
    def settings(self) -> dict[str, Any]:
        """What transformers' GenerationConfig has of it, where that is not the likeliest token each time."""
        found: dict[str, Any] = {"repetition_penalty": self.repetition_penalty or 1.0}
        if self.draws:
            found |= {"do_sample": True, "temperature": self.temperature or 1.0}
            found |= {"top_p": self.top_p or 1.0, "top_k": self.top_k or 0}
        return found


class Speaker:
    """A model and how it is asked; `load` reads its weights, and `answers` asks it."""

    def __init__(
        self,
        path: str,
        *,
        base: str | None = None,
        format: str | None = None,
        chat_template: str | None = None,
        dtype: str | None = None,
    ) -> None:
        """path, base and dtype: as of `evaluate`. Raises UserError for what is not a model, or writes no texts."""
        self.model: Any = None
        self._subject = EvaluatedModel(path, base)
        head = self._subject.head
        prompting = task_named(head.task).prompting(self._subject, format=format, chat_template=chat_template)
        if prompting is None:
            raise UserError(
                f"{path}: its task is {head.task}, which answers no prompts; measure it (dora-dist evaluate)"
            )
        self.prompting, self._dtype = prompting, dtype or prompting.dtype

    def load(self) -> None:
        """Raises UserError as `load_for_inference` does."""
        self.model = self._subject.load(self._dtype)

    def answers(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        write: Callable[[str], object] | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> list[Answer]:
        """The model's answer to each prompt, together, in batches padded on the left.

        write: is called with each piece of the text of a single prompt's answer as it comes. interrupted: asked after
        each token whether to stop. Raises UserError for a prompt that is too long, and for NaN in the model.
        """
        place = next(self.model.parameters()).device
        if sampling.draws:
            torch.manual_seed(sampling.seed)
        return answers(
            self.model,
            self.prompting.tokenizer,
            prompts,
            place=place,
            max_new_tokens=min(self.prompting.room(prompt, sampling.max_new_tokens) for prompt in prompts),
            inputs=self.prompting.inputs(prompts, place),
            drawn=sampling.settings,
            write=write,
            interrupted=interrupted,
        )
