"""Questions about pictures of emoji in the formats of VL-BART's tasks: kinds, colours, names, pairs, groups."""

import colorsys
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from emoji_pictures import Emoji

KIND, GROUP, COLOUR = "what kind of thing is this?", "which group does it belong to?", "what is its main colour?"
_HUES = ((15, "red"), (40, "orange"), (70, "yellow"), (165, "green"), (260, "blue"), (295, "purple"), (340, "pink"))
"""The end of each colour's hues in degrees; what follows is red again."""

Record = dict[str, Any]

UNSEEN = "gqa"
"""The task that `unseen` has records of."""


def texts(task: str, record: dict[str, Any]) -> tuple[str, str]:
    """What is asked ("" where a picture is to be named) and what is to be answered."""
    if task == "caption":
        return "", record["sentences"][0]
    answer = record["label"] if task == "nlvr2" else next(iter(record["label"]))
    return record["sent"], {0: "false", 1: "true"}.get(answer, answer)


def identity(one: Emoji) -> str:
    """The name of its features."""
    return Path(one.file).stem


def seen(emoji: Sequence[Emoji], pictures: Path, seed: int) -> dict[str, list[Record]]:
    """What the model is trained on first: kinds and colours (vqa), names (caption), statements of pairs (nlvr2)."""
    order = random.Random(seed)
    kinds = sorted({one.kind for one in emoji})
    questions = []
    for one in emoji:
        other = order.choice([kind for kind in kinds if kind != one.kind])
        questions += [
            _question(one, KIND, one.kind),
            _question(one, COLOUR, main_colour(pictures / one.file)),
            _question(one, f"is it {one.kind}?", "yes"),
            _question(one, f"is it {other}?", "no"),
        ]
    names = [{"img_id": identity(one), "sentences": [one.name]} for one in emoji]
    return {"vqa": questions, "caption": names, "nlvr2": list(_pairs(emoji, order))}


def unseen(emoji: Sequence[Emoji]) -> dict[str, list[Record]]:
    """What the model learns afterwards: groups, which are finer than kinds (gqa)."""
    return {UNSEEN: [_question(one, GROUP, one.group) for one in emoji]}


def _question(one: Emoji, question: str, answer: str) -> Record:
    name = identity(one)
    return {"question_id": f"{name}: {question}", "img_id": name, "sent": question, "label": {answer: 1.0}}


def _pairs(emoji: Sequence[Emoji], order: random.Random) -> Iterator[Record]:
    """For each picture a statement that is true of it and another picture, and one that is not."""
    of_kind: dict[str, list[Emoji]] = {}
    for one in emoji:
        of_kind.setdefault(one.kind, []).append(one)
    for one in emoji:
        alike = order.choice(of_kind[one.kind])
        other = order.choice([another for another in emoji if another.kind != one.kind])
        for second, label in ((alike, 1), (other, 0)):
            pair = [identity(one), identity(second)]
            order.shuffle(pair)
            name = f"{identity(one)}-{label}"
            sent = f"both pictures show {one.kind}"
            yield {"uid": name, "img0": pair[0], "img1": pair[1], "sent": sent, "label": label}


def main_colour(picture: Path) -> str:
    """The colour that most of a picture's area has, apart from what is white, as its background is."""
    from PIL import Image

    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB").resize((32, 32))).reshape(-1, 3) / 255
    areas = Counter(_colour(*rgb) for rgb in pixels.tolist())
    del areas["white"]
    return areas.most_common(1)[0][0] if areas else "white"


def _colour(red: float, green: float, blue: float) -> str:
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    if lightness > 0.93 or saturation < 0.12:
        return "white" if lightness > 0.9 else "gray" if lightness > 0.25 else "black"
    if lightness < 0.15:
        return "black"
    name = next((name for end, name in _HUES if hue * 360 < end), "red")
    return "brown" if name in ("red", "orange") and lightness < 0.4 and hue * 360 > 10 else name
