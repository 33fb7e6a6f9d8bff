"""Where to get the pictures of well-known conversation data, which are published apart from the conversations."""

import shlex
from collections.abc import Iterable
from pathlib import PurePosixPath

_LLAVA_1_5 = {
    "coco/train2017": "http://images.cocodataset.org/zips/train2017.zip",
    "gqa/images": "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip",
    "textvqa/train_images": "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
    "vg/VG_100K": "https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip",
    "vg/VG_100K_2": "https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip",
    "ocr_vqa/images": "https://drive.google.com/drive/folders/1_GYPY5UkUy7HIcR0zq3ZCFgeZN7BAfm_ (script)",
}
"""The source of each folder of pictures in LLaVA-1.5's mixture."""
_PRETRAIN = "hf download liuhaotian/LLaVA-Pretrain images.zip --repo-type dataset --local-dir data/LLaVA-Pretrain"


def how_to_get(image_folder: str, sources: Iterable[str]) -> str:
    """How to fill `image_folder` with the pictures of data `sources`: further lines of a message, "" if unknown."""
    names = {PurePosixPath(source.rpartition(":")[2]).name for source in sources}
    folder = shlex.quote(image_folder)
    lines = []
    if "blip_laion_cc_sbu_558k.json" in names:
        lines += [
            "the pictures of blip_laion_cc_sbu_558k.json are one archive on the hub:",
            f"  {_PRETRAIN}",
            f"  unzip -q data/LLaVA-Pretrain/images.zip -d {folder}",
        ]
    if "llava_v1_5_mix665k.json" in names:
        lines += ["the pictures of llava_v1_5_mix665k.json go into these folders (an archive holds its last folder):"]
        lines += [f"  {f'{image_folder}/{name}':<33} {place}" for name, place in _LLAVA_1_5.items()]
        lines += ["with --data.bad_images skip, records whose pictures are missing are left out"]
    return "".join(f"\n    {line}" for line in lines)
