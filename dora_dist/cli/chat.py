"""A conversation in the terminal: lines of the user, the model's answers as they come, and a few commands."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from dora_dist.evaluation.speaking import Sampling, Speaker
from dora_dist.runtime.console import say, visible
from dora_dist.runtime.errors import UserError
from dora_dist.tasks.prompting.answering import INTERRUPTED, Answer
from dora_dist.tasks.prompting.base import Message, Picture, Prompt

HELP = (
    "/reset forgets the conversation · /system TEXT sets its system turn and resets · /image FILE shows a picture with "
    "the next question · Ctrl-C ends an answer · Ctrl-D or /quit ends"
)


class Chat:
    """One conversation after another with a model that is loaded."""

    def __init__(self, speaker: Speaker, sampling: Sampling, system: str | None, pictures: list[str]) -> None:
        """pictures: files shown with the first question of the first conversation. Raises UserError where the model has
        no place for them, for a system turn, or for a text alone; its weights need not be loaded yet."""
        self._speaker, self._sampling, self._system = speaker, sampling, system
        self._turns: list[Message] = []
        self._pictures: list[Picture] = []  # of the turns
        self._shown = [Picture(path) for path in pictures]  # with the next question
        self._prompt("a")  # refuses what the model has no place for

    def run(self) -> None:
        with suppress(ImportError):
            import readline  # noqa: F401  # lines can be edited then, and called back
        prompting = self._speaker.prompting
        forgets = "" if prompting.remembers else "; it has no place for earlier turns, so each question stands alone"
        say(f"The prompt is that of {prompting.name}{forgets}.\n{HELP}")
        while (line := self._line()) is not None:
            if line.startswith("/"):
                if line.split()[0] in ("/quit", "/exit"):
                    return
                self._command(line)
            elif line.strip():
                self._ask(line)

    def _line(self) -> str | None:
        """What the user types; None at the end."""
        while True:
            try:
                return input("\n> ")
            except EOFError:
                say()
                return None
            except KeyboardInterrupt:
                say("\n(Ctrl-D ends)")

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name == "/reset":
            self._reset()
        elif name == "/system":
            before, self._system = self._system, rest.strip() or None
            self._reset()
            try:
                self._prompt("a")
            except UserError as error:
                self._system = before
                say(f"{error}")
        elif name == "/image" and rest.strip():
            self._show(rest.strip())
        else:
            say(HELP)

    def _reset(self) -> None:
        self._turns, self._pictures, self._shown = [], [], []
        say("(a new conversation)")

    def _show(self, path: str) -> None:
        self._shown.append(Picture(path))
        try:
            prompt = self._prompt("a")
            self._speaker.prompting.inputs([prompt], next(self._speaker.model.parameters()).device)
        except UserError as error:
            self._shown.pop()
            say(f"{error}")

    def _conversation(self, said: str) -> list[Message]:
        turns = self._speaker.prompting.opened(said, self._system, len(self._shown))
        return [*self._turns, *(turns[-1:] if self._turns else turns)]

    def _prompt(self, said: str) -> Prompt:
        return self._speaker.prompting.of_turns(self._conversation(said), [*self._pictures, *self._shown])

    def _ask(self, said: str) -> None:
        try:
            prompt = self._prompt(said)
            with _interruptible() as interrupted:
                answer = self._speaker.answers([prompt], self._sampling, write=_write, interrupted=interrupted.is_set)[
                    0
                ]
        except UserError as error:
            remedy = "; /reset begins a new conversation" if self._turns else ""
            say(f"{error}{remedy}")
            return
        say(_remark(answer))
        if self._speaker.prompting.remembers:
            self._turns = [*self._conversation(said), {"role": "assistant", "content": answer.text}]
            self._pictures += self._shown
        self._shown = []


def _remark(answer: Answer) -> str:
    """What ends an answer: nothing but the line, where the model has ended it."""
    why = {INTERRUPTED: " (ended by Ctrl-C)", "length": " (cut: --max-new-tokens)"}
    return why.get(answer.ended, "")


def _write(text: str) -> None:
    print(visible(text), end="", flush=True)


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets the event; a second one raises KeyboardInterrupt, for a model that does not get to its next token."""
    interrupted = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
