"""Named pictures with a category each, from an npm package of emoji: LLaVA conversations and held-out questions."""

import json
import random
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

PACKAGE = (
    "emoji-datasource-google@16.0.0",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
)
KIND, NAME = "What kind of thing is this?", "What is this?"
_PICTURES = "package/img/google/64/"
_VARIANT = re.compile(r"\b(man|men|woman|women|male|female|person|people|boy|girl|facing right)\b")
"""What tells nearly equal pictures of one thing apart."""


@dataclass(frozen=True)
class Emoji:
    """`file` is below the folder of pictures."""

    file: str
    name: str
    kind: str
    group: str
    """Finer than its kind, such as animal."""

    @property
    def subject(self) -> str:
        """What pictures that look nearly the same have in common."""
        return " ".join(_VARIANT.sub(" ", self.name).split()) or self.name


def extract(archive: Path, folder: Path) -> list[Emoji]:
    """Write the package's pictures into `folder`, on white, and list them.

    Parts of pictures, and pictures that another one equals, are left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[bytes, Emoji] = {}
    with tarfile.open(archive) as package:
        listed = {
            f"{_PICTURES}{entry['image']}": Emoji(
                entry["image"], entry["name"].lower(), entry["category"], _group(entry["subcategory"])
            )
            for entry in json.load(_open(package, "package/emoji.json"))
            if entry["has_img_google"] and entry["category"] != "Component" and "/" not in entry["image"]
        }
        for member in package:
            if one := listed.get(member.name):
                picture = _on_white(_open(package, member).read())
                picture.save(folder / one.file)
                found.setdefault(picture.tobytes(), one)
    return sorted(found.values(), key=lambda one: one.file)


def _group(subcategory: str) -> str:
    """What subcategories such as animal-mammal and animal-bug have in common."""
    return "flag" if "flag" in subcategory else subcategory.partition("-")[0]


def _open(package: tarfile.TarFile, member: str | tarfile.TarInfo) -> Any:
    file = package.extractfile(member)
    assert file is not None, member
    return file


def _on_white(png: bytes) -> Any:
    from PIL import Image

    with Image.open(BytesIO(png), formats=["PNG"]) as image:
        picture = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def split(emoji: Sequence[Emoji], held_out: int, seed: int) -> tuple[list[Emoji], list[Emoji]]:
    """Those to train on, and at least `held_out` others; no subject is on both sides."""
    subjects = sorted({one.subject for one in emoji})
    random.Random(seed).shuffle(subjects)
    chosen: set[str] = set()
    count = 0
    for subject in subjects:
        if count >= held_out:
            break
        chosen.add(subject)
        count += sum(one.subject == subject for one in emoji)
    return [one for one in emoji if one.subject not in chosen], [one for one in emoji if one.subject in chosen]


def captions(emoji: Sequence[Emoji]) -> Iterator[dict[str, Any]]:
    """Records that pre-train the projector: a picture, and its name."""
    for one in emoji:
        yield _record(one, [("<image>", one.name)])


def conversations(emoji: Sequence[Emoji], seed: int) -> Iterator[dict[str, Any]]:
    """Records of two questions about one picture, either of them first."""
    order = random.Random(seed)
    for one in emoji:
        turns = [(KIND, one.kind), (NAME, one.name)]
        order.shuffle(turns)
        turns[0] = (f"<image>\n{turns[0][0]}", turns[0][1])
        yield _record(one, turns)


def _record(one: Emoji, turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    values = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]
    return {"id": one.name, "image": one.file, "conversations": values}
