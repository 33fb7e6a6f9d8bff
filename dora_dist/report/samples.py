"""Generated answers of a run's evaluations: each prompt once, with its answers, the newest first."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dora_dist.config.outputs import MOST_SAMPLES
from dora_dist.report.reading import Run

MOST_ANSWERS, MOST_CHARACTERS, MOST_OF_A_QUESTION = 12, 4000, 100


@dataclass(frozen=True)
class Sample:
    """`answers` are (step, text), the newest first."""

    prompt: str
    expected: str
    answers: Sequence[tuple[int, str]]

    @property
    def question(self) -> str:
        """In a line, the end of the prompt."""
        return _end(" ".join(self.prompt.split()), MOST_OF_A_QUESTION)


def of_run(run: Run) -> list[Sample]:
    """What the history has under "samples": objects with "prompt", "answer" and perhaps "expected"."""
    found: dict[tuple[int, str], Sample] = {}
    for step, number, sample in _said(run):
        prompt = str(sample.get("prompt", ""))
        known = found.get((number, prompt))
        if known is None and len(found) < MOST_SAMPLES:
            expected = _cut(sample.get("expected") or "")
            known = found[number, prompt] = Sample(_end(prompt, MOST_CHARACTERS), expected, [])
        if known is not None and len(known.answers) < MOST_ANSWERS:
            answers = [*known.answers, (step, _cut(sample.get("answer") or ""))]
            found[number, prompt] = Sample(known.prompt, known.expected, answers)
    return list(found.values())


def _said(run: Run) -> Iterator[tuple[int, int, Mapping[str, Any]]]:
    """Steps, the newest first; a sample's place in its evaluation, as pictures may share a question; and samples."""
    for record in reversed(list(run.records)):
        said = record.get("samples")
        for number, sample in enumerate(said if isinstance(said, list) else ()):
            if isinstance(sample, Mapping) and isinstance(record.get("step"), int):
                yield record["step"], number, sample


def _cut(text: Any) -> str:
    words = str(text)
    return words if len(words) <= MOST_CHARACTERS else f"{words[:MOST_CHARACTERS]} …"


def _end(text: str, most: int) -> str:
    return text if len(text) <= most else f"… {text[-most:]}"
