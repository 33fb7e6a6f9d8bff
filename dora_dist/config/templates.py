"""A prompt's text with named places for the fields of a record: "Question: {question}\\nAnswer: "."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter


@dataclass(frozen=True)
class PromptTemplate:
    """Pieces of text, each followed by the field that it names; no field follows the last."""

    pieces: tuple[tuple[str, str | None], ...]

    @classmethod
    def of(cls, text: str) -> PromptTemplate:
        """{name} is a field, {{ and }} are braces. Nothing in it is looked up but fields by their whole names.

        Raises ValueError, with the reason, for what is not a template.
        """
        pieces = []
        for before, name, spec, conversion in Formatter().parse(text):
            if name is not None and (not name or spec or conversion or set(name) & set(".[]{}")):
                shown = f"{name}{'!' * bool(conversion)}{conversion or ''}{':' * bool(spec)}{spec or ''}"
                raise ValueError(f"{{{shown}}} is not the name of a field (a brace itself is written {{{{ or }}}})")
            pieces.append((before, name))
        return cls(tuple(pieces))

    @property
    def fields(self) -> list[str]:
        """The fields that it names, each once."""
        return list(dict.fromkeys(name for _, name in self.pieces if name is not None))

    def filled(self, record: Mapping[str, str]) -> str:
        """The text for a record."""
        return "".join(before + (record[name] if name is not None else "") for before, name in self.pieces)
