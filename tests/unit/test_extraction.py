"""Features of pictures and videos: those of transformers' own towers, kept whole, gone on with, refused by name."""

import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import h5py
import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dora_dist.adapters.methods import LowRank, WeightDecomposed
from dora_dist.cli import main
from dora_dist.config import DataConfig
from dora_dist.data import VisionReader
from dora_dist.data import read as read_data
from dora_dist.data.pictures import PictureReader
from dora_dist.extraction import store, videos
from dora_dist.extraction.items import find_items
from dora_dist.extraction.options import ExtractionOptions, option
from dora_dist.extraction.run import extract_features
from dora_dist.extraction.videos import read_frames
from dora_dist.models.build import build_model
from dora_dist.models.families import adapter_plan
from dora_dist.models.heads import VISION_SEQ2SEQ_LM
from dora_dist.models.tokenizer import load_tokenizer
from dora_dist.models.vision_tower import VisionTower
from dora_dist.runtime.errors import UserError
from dora_dist.tasks.objectives.vision import VisionWriting
from dora_dist.weights.placement import WholePlacement
from tests import llava, summaries

OPTIONS = ExtractionOptions(grid=(2, 2), batch_size=3)
Arrays = dict[str, dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each kind, a whole CLIP with its projection, and a convolutional tower."""
    import transformers

    folder = tmp_path_factory.mktemp("towers")
    for kind in llava.TOWERS:
        llava.tower(folder / kind, kind)
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    seen: Any = transformers.CLIPConfig(vision_config=llava.TOWER_SIZES, text_config=text, projection_dim=12)
    transformers.CLIPModel(seen).save_pretrained(folder / "whole-clip")
    convolutional: Any = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1])
    transformers.ResNetModel(convolutional).save_pretrained(folder / "resnet")
    normalised = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"shortest_edge": 32}}
    (folder / "resnet" / "preprocessor_config.json").write_text(json.dumps(normalised))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    noise = torch.Generator().manual_seed(0)
    for number in range(8):
        pixels = torch.randint(0, 256, (30 + number, 40, 3), dtype=torch.uint8, generator=noise)
        (folder / str(number % 2)).mkdir(exist_ok=True)
        Image.fromarray(pixels.numpy()).save(folder / str(number % 2) / f"p{number}.png")
    (folder / "0" / "README.txt").write_text("not a picture")
    return folder


def read(output: Path) -> Arrays:
    with h5py.File(output) as file:
        return {name: {key: values[()] for key, values in group.items()} for name, group in file.items()}


def same(found: Arrays, expected: Arrays, tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, arrays in expected.items():
        assert found[name].keys() == arrays.keys()
        for key, values in arrays.items():
            np.testing.assert_allclose(found[name][key], values, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("kind", "grid", "before"), [("clip", (2, 2), 1), ("siglip", (1, 2), 0), ("dinov2", (2, 1), 1)]
)
def test_features_are_what_transformers_computes_pooled(
    towers: Path, pictures: Path, tmp_path: Path, kind: str, grid: tuple[int, int], before: int
) -> None:
    from transformers import AutoModel
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    done = extract_features(pictures, str(towers / kind), tmp_path / "f.h5", replace(OPTIONS, grid=grid))
    assert (done.new, done.present, done.total, done.complete, done.skipped) == (8, 0, 8, True, ())
    tower = VisionTower.read(towers / kind, dtype="fp32")
    means = {name: getattr(tower.processor, name) for name in ("image_mean", "image_std")}
    sizes: Any = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    processor = LlavaImageProcessorPil(do_pad=True, **sizes, **means)
    model: Any = AutoModel.from_pretrained(towers / kind).eval()
    expected = {}
    for number in range(8):
        with Image.open(pictures / str(number % 2) / f"p{number}.png") as image, torch.no_grad():
            pixels = processor(image, return_tensors="pt")["pixel_values"]
            hidden = model(pixels, output_hidden_states=True).hidden_states[-2][0, before:]  # (4, d), row by row
        groups = {(2, 2): [[0], [1], [2], [3]], (1, 2): [[0, 2], [1, 3]], (2, 1): [[0, 1], [2, 3]]}[grid]
        expected[f"p{number}"] = {"features": torch.stack([hidden[group].amax(0) for group in groups]).numpy()}
    same(read(tmp_path / "f.h5"), expected, 1e-5)
    assert not list(tmp_path.glob("*parts*")) and not list(tmp_path.glob(".*partial*"))


def test_batches_loader_processes_and_parts_change_nothing(towers: Path, pictures: Path, tmp_path: Path) -> None:
    tower = str(towers / "clip")
    boxed = replace(OPTIONS, boxes="grid", batch_size=1)
    extract_features(pictures, tower, tmp_path / "one.h5", boxed)
    extract_features(pictures, tower, tmp_path / "many.h5", replace(boxed, batch_size=8, num_workers=2))
    second = extract_features(pictures, tower, tmp_path / "parts.h5", replace(boxed, part=(2, 2)))
    assert (second.new, second.complete, (tmp_path / "parts.h5").exists()) == (4, False, False)
    assert extract_features(pictures, tower, tmp_path / "parts.h5", replace(boxed, part=(1, 2))).complete
    expected = read(tmp_path / "one.h5")
    same(read(tmp_path / "many.h5"), expected, 1e-6)
    same(read(tmp_path / "parts.h5"), expected)
    corners = [[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 1, 1]]
    assert all((arrays["boxes"] == corners).all() for arrays in expected.values())


class Killed(BaseException):
    """As SIGKILL: nothing that handles errors sees it."""


def test_an_extraction_that_was_killed_goes_on_and_leaves_the_same_file(
    towers: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower, output = str(towers / "clip"), tmp_path / "f.h5"
    extract_features(pictures, tower, tmp_path / "whole.h5", OPTIONS)
    written = 0
    savez = np.savez

    def killed(file: Any, **arrays: Any) -> None:
        nonlocal written
        written += 1
        if written == 5:
            file.write(b"half")
            raise Killed
        savez(file, **arrays)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(store.np, "savez", killed)
        extract_features(pictures, tower, output, OPTIONS)
    parts = tmp_path / "f.h5.parts"
    assert {file.stem for file in parts.glob("*.npz")} == {"p0", "p1", "p2", "p3"}
    (parts / ".p4.npz.partial-1").write_bytes(b"half")  # what a SIGKILL leaves
    assert not output.exists()
    with monkeypatch.context() as patched, pytest.raises(Killed):  # killed while the file is made
        fsync = store.fsync

        def killed_in_a_flush(path: Path) -> None:
            if path.name == ".f.h5.partial":
                raise Killed
            fsync(path)

        patched.setattr(store, "fsync", killed_in_a_flush)
        extract_features(pictures, tower, output, OPTIONS)
    assert not output.exists() and len(list(parts.glob("[!.]*.npz"))) == 8

    def killed_in_a_deletion(folder: Path, **options: Any) -> None:
        if folder.exists():
            (folder / store.SETTINGS).unlink()
            raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(store.shutil, "rmtree", killed_in_a_deletion)
        extract_features(pictures, tower, output, OPTIONS)
    assert len(read(output)) == 8
    done = extract_features(pictures, tower, output, OPTIONS)
    assert (done.new, done.present, done.complete, parts.exists()) == (0, 8, True, False)
    # Another number of pictures in a batch can be another product on a processor, with other last bits.
    same(read(output), read(tmp_path / "whole.h5"), 1e-6)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["f.h5", "whole.h5"]


def test_what_is_there_is_passed_over_and_more_is_added(
    towers: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower, output = str(towers / "clip"), tmp_path / "f.h5"
    extract_features(pictures / "0", tower, output, OPTIONS)
    first = read(output)
    done = extract_features(pictures, tower, output, OPTIONS)
    assert (done.new, done.present) == (4, 4)
    found = read(output)
    assert len(found) == 8
    same({name: found[name] for name in first}, first)
    for changed, named in (
        (replace(OPTIONS, layer=-1), "layer = -2, this command has -1"),
        (replace(OPTIONS, store="fp16"), "store = 'fp32', this command has 'fp16'"),
    ):
        with pytest.raises(UserError, match=named):
            extract_features(pictures, tower, output, changed)
    with pytest.raises(UserError, match="made with tower"):
        extract_features(pictures, str(towers / "dinov2"), output, OPTIONS)
    same(read(output), found)


def test_pictures_that_the_tower_sees_in_another_way_do_not_get_into_one_file(
    towers: Path, pictures: Path, tmp_path: Path
) -> None:
    output, last = tmp_path / "f.h5", replace(OPTIONS, layer=-1)
    extract_features(pictures, str(towers / "resnet"), output, last)
    other = tmp_path / "other"
    shutil.copytree(towers / "resnet", other)
    for changed, named in (
        ({"image_std": [0.25] * 3}, r"image_std = \[0.5, 0.5, 0.5\], this command has \[0.25, 0.25, 0.25\]"),
        ({"size": {"shortest_edge": 48}}, "image_size = 32, this command has 48"),
        ({"resample": 2}, "resample = 3, this command has 2"),
    ):
        settings = json.loads((towers / "resnet" / "preprocessor_config.json").read_text())
        (other / "preprocessor_config.json").write_text(json.dumps({**settings, **changed}))
        with pytest.raises(UserError, match=named):
            extract_features(pictures, str(other), output, last)


def test_parts_that_start_together_share_one_folder(tmp_path: Path) -> None:
    """Each writes as soon as it may; one that comes a little later must not take the folder for somebody else's."""
    for attempt in range(25):
        outputs, together = tmp_path / str(attempt) / "f.h5", threading.Barrier(6)

        def start(number: int, output: Path = outputs, together: threading.Barrier = together) -> None:
            part = store.FeatureStore(output, {"layer": -2}, "image")
            together.wait()
            part.open()
            part.parts.write(f"p{number}", {"features": np.ones((4, 3), np.float32)})

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(start, range(6)))
        assert store.FeatureStore(outputs, {"layer": -2}, "image").complete([f"p{number}" for number in range(6)])
        assert list(read(outputs)) == [f"p{number}" for number in range(6)]


def test_what_another_part_is_about_to_read_again_is_not_done(tmp_path: Path) -> None:
    output, settings = tmp_path / "f.h5", {"layer": -2}
    first, second = (store.FeatureStore(output, settings, "image") for _ in range(2))
    assert first.open(["a", "b"]) == {"a", "b"}
    first.parts.skip("b", "cannot be read")
    assert first.open(["b"]) == {"b"}  # the file is there now
    assert second.open(["c"]) == {"c"}
    second.parts.write("c", {"features": np.ones((4, 3))})
    first.parts.write("a", {"features": np.ones((4, 3))})
    assert not second.complete(["a", "b", "c"])
    first.parts.write("b", {"features": np.ones((4, 3))})
    assert first.complete(["a", "b", "c"]) and list(read(output)) == ["a", "b", "c"]


def test_what_one_part_skipped_the_others_need_not_wait_for(tmp_path: Path) -> None:
    output, wanted = tmp_path / "f.h5", ["a", "b", "c"]
    first, second = (store.FeatureStore(output, {"layer": -2}, "image") for _ in range(2))
    assert first.open(["a", "b"]) == {"a", "b"} and second.open(["c"]) == {"c"}
    first.parts.write("a", {"features": np.ones((4, 3))})
    first.parts.skip("b", "cannot be read")
    second.parts.write("c", {"features": np.ones((4, 3))})
    assert second.complete(wanted) and list(read(output)) == ["a", "c"]
    assert first.complete(wanted)  # it has ended later
    assert not second.open(["c"]) and second.complete(wanted)  # and one that is started again
    assert first.open(["b"]) == {"b"} and not second.complete(wanted)
    first.parts.write("b", {"features": np.ones((4, 3))})
    assert first.complete(wanted) and list(read(output)) == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["f.h5"]


def test_damaged_outputs_are_refused_by_name(towers: Path, pictures: Path, tmp_path: Path) -> None:
    tower, output = str(towers / "clip"), tmp_path / "f.h5"
    extract_features(pictures / "0", tower, output, OPTIONS)
    whole = output.read_bytes()
    output.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"f\.h5: is damaged \(.*; delete it and start the command again"):
        extract_features(pictures, tower, output, OPTIONS)
    output.write_bytes(whole)
    for said in ("{", "[]"):
        with h5py.File(output, "r+") as file:
            file.attrs[store.MADE_WITH] = said
        with pytest.raises(UserError, match=r"f\.h5: is damaged"):
            extract_features(pictures, tower, output, OPTIONS)
    folder = tmp_path / "videos"
    store.FeatureFolder(folder).open({})
    (folder / store.SETTINGS).write_text("")
    with pytest.raises(UserError, match=r"extraction\.json: not readable as JSON \(.*; delete .*videos and start"):
        store.FeatureFolder(folder).open({})


def test_records_name_their_features(towers: Path, pictures: Path, tmp_path: Path) -> None:
    records = [{"id": 17, "image": "1/p1.png"}, {"image": "0/p2.png"}, {"id": 17, "image": "1/p1.png"}]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    named = replace(OPTIONS, image_folder=pictures, store="fp16")
    extract_features(tmp_path / "list.jsonl", str(towers / "clip"), tmp_path / "f.h5", named)
    found = read(tmp_path / "f.h5")
    assert list(found) == ["17", "p2"]
    assert found["17"]["features"].dtype == np.float16


def listed(folder: Path, *records: Any) -> Path:
    (folder / "list.json").write_text(json.dumps(records))
    return folder / "list.json"


def test_sources_are_refused_by_name(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "one.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    with pytest.raises(UserError, match=r'one\.png are both named "one"; give a list'):
        find_items(tmp_path)
    (tmp_path / "a" / "clip.mp4").touch()
    with pytest.raises(UserError, match=r"has pictures \(one.png\) and videos \(clip.mp4\)"):
        find_items(tmp_path / "a")
    with pytest.raises(UserError, match="no image .* or video .* in it"):
        find_items(tmp_path / "empty")
    with pytest.raises(UserError, match="nowhere: no such file"):
        find_items(tmp_path / "nowhere")
    for record, message in (
        ({"picture": "a.png"}, 'record 1: needs "image" or "video"'),
        ({"image": "../a.png"}, "record 1.*not below the folder"),
        ({"image": "/etc/a.png"}, "record 1.*not below the folder"),
        ({"image": "a.png", "id": "x/y"}, "record 1: the name 'x/y' cannot be used"),
        ({"image": "a.png", "id": "..", "more": 1}, "cannot be used"),
        ({"image": "a.pdf"}, "a.pdf: its name is not that of an image"),
    ):
        with pytest.raises(UserError, match=message):
            find_items(listed(tmp_path, record))


def test_towers_and_outputs_are_refused_by_name(towers: Path, pictures: Path, tmp_path: Path) -> None:
    clip = str(towers / "clip")
    for changed, message in (
        (replace(OPTIONS, layer=9), "--layer 9: the tower has 3 layers; give -4 to 3"),
        (replace(OPTIONS, grid=(6, 6)), "--grid 6x6: layer -2 of the tower has 2 x 2 patches of a picture of 28 x 28"),
        (replace(OPTIONS, image_size=42), r"--tower: refuses pictures of 42 x 42 pixels.*--image-size"),
    ):
        with pytest.raises(UserError, match=message):
            extract_features(pictures, clip, tmp_path / "f.h5", changed)
    with pytest.raises(UserError, match="--tower .*: 'llama' is not a vision tower"):
        extract_features(pictures, str(llava.language_model(tmp_path / "llama")), tmp_path / "f.h5", OPTIONS)
    with pytest.raises(UserError, match=r"features of images are kept in an HDF5 file, named .h5"):
        extract_features(pictures, clip, tmp_path / "f", OPTIONS)
    with h5py.File(tmp_path / "theirs.h5", "w") as file:
        file.create_dataset("17/features", data=np.zeros((36, 4)))
    with pytest.raises(UserError, match=r"theirs.h5: is there already and was not made by extract-features"):
        extract_features(pictures, clip, tmp_path / "theirs.h5", OPTIONS)
    assert not list(tmp_path.glob("f*"))


def test_pictures_that_cannot_be_read_end_the_command_or_are_counted(
    towers: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    whole, out = str(pictures / "0" / "p2.png"), str(tmp_path / "f.h5")
    source = listed(tmp_path, {"image": "broken.png"}, {"image": "gone.png"}, {"image": "p2.png"})
    (tmp_path / "p2.png").write_bytes(Path(whole).read_bytes())
    command = ["extract-features", str(source), "--tower", str(towers / "clip"), "--output", out, "--grid", "2x2"]
    assert main(command) == 2
    assert "gone.png: does not exist (1 files are missing in all)" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"broken.png cannot be read.*--bad-images skip"):
        extract_features(tmp_path / "broken.png", str(towers / "clip"), tmp_path / "g.h5", OPTIONS)
    assert main([*command, "--bad-images", "skip"]) == 0
    shown = capsys.readouterr()
    assert "2 left out" in shown.err and "broken.png cannot be read" in shown.err
    assert "1 new and 0 older of 3; complete" in shown.out
    assert list(read(Path(out))) == ["p2"]
    Image.new("RGB", (9, 9)).save(tmp_path / "gone.png")  # was missing, and is tried again
    assert main([*command, "--bad-images", "skip"]) == 0
    assert list(read(Path(out))) == ["gone", "p2"]


def test_a_convolutional_tower_gives_its_map(towers: Path, pictures: Path, tmp_path: Path) -> None:
    extract_features(pictures, str(towers / "resnet"), tmp_path / "f.h5", replace(OPTIONS, layer=-1))
    assert read(tmp_path / "f.h5")["p0"]["features"].shape == (4, 12)


# --- videos -----------------------------------------------------------------------------------------------------------


def video(
    path: Path, shown: str, *, frames: int = 20, rate: int = 10, size: tuple[int, int] = (48, 48), rotation: int = 0
) -> Path:
    """A film over one of scikit-learn's photographs: the window moves to the right while the light fades.

    size: width and height. rotation: degrees counterclockwise, by which whoever shows it turns it.
    """
    photograph = Image.fromarray(load_sample_image(shown))
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(frames):
            window = photograph.crop((8 * number, 0, 8 * number + 400, 400)).resize(size)
            faded = ImageEnhance.Brightness(window).enhance(1 - 0.5 * number / frames)
            container.mux(stream.encode(av.VideoFrame.from_image(faded)))
        container.mux(stream.encode(None))
    return path


def test_a_video_is_the_embeddings_of_its_frames(towers: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel

    film = video(tmp_path / "film.mp4", "china.jpg")
    two = replace(OPTIONS, frames_per_second=2.0)
    done = extract_features(film, str(towers / "whole-clip"), tmp_path / "out", two)
    assert (done.new, done.complete) == (1, True)
    with np.load(tmp_path / "out" / "film.npz", allow_pickle=False) as arrays:
        found = arrays["features"]
    model: Any = CLIPModel.from_pretrained(towers / "whole-clip").eval()
    tower = VisionTower.read(towers / "whole-clip", dtype="fp32")
    with av.open(str(film)) as container, torch.no_grad():
        images = [frame.to_image() for frame in container.decode(video=0)]
        assert len(images) == 20
        pixels = [tower.processor(image, return_tensors="pt")["pixel_values"][0] for image in images[::5]]
        expected = model.get_image_features(torch.stack(pixels)).pooler_output
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    # Pooled to three: 20 frames a second are all there are.
    three = replace(OPTIONS, frames_per_second=20.0, most_frames=3)
    extract_features(film, str(towers / "dinov2"), tmp_path / "three", three)
    extract_features(film, str(towers / "dinov2"), tmp_path / "all", replace(three, most_frames=64))
    pooled, every = (np.load(tmp_path / name / "film.npz")["features"] for name in ("three", "all"))
    assert every.shape == (20, 20)
    np.testing.assert_array_equal(pooled, np.stack([every[:7].max(0), every[6:14].max(0), every[13:].max(0)]))


def test_loader_processes_decode_videos_to_the_same_features(
    towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    films = tmp_path / "films"
    films.mkdir()
    for number in range(3):
        video(films / f"{number}.mp4", "china.jpg", frames=10 + 10 * number)
    (films / "cut.mp4").write_bytes((films / "0.mp4").read_bytes()[:200])
    options = replace(OPTIONS, frames_per_second=5.0, batch_size=4, bad_images="skip")
    alone = extract_features(films, str(towers / "dinov2"), tmp_path / "alone", options)
    monkeypatch.setattr(videos, "read_frames", in_another_process(videos.read_frames))
    shared = extract_features(films, str(towers / "dinov2"), tmp_path / "shared", replace(options, num_workers=2))
    assert alone == shared and [name for name, _ in shared.skipped] == ["cut"]
    for number in range(3):
        found, expected = (np.load(tmp_path / name / f"{number}.npz")["features"] for name in ("shared", "alone"))
        assert len(expected) == 5 + 5 * number
        np.testing.assert_array_equal(found, expected)


def in_another_process(read: Any) -> Any:
    """The same; fails in the process of the test."""
    here = os.getpid()

    def checked(*arguments: Any) -> Any:
        assert os.getpid() != here
        return read(*arguments)

    return checked


def frames_of(film: Path, max_pixels: int = 10_000) -> list[np.ndarray]:
    reader = PictureReader(film.parent, CLIPImageProcessorPil(), pad=True, max_pixels=max_pixels, named=option)
    return [np.asarray(image) for image in read_frames(film, 10.0, reader)]


def test_frames_stand_as_the_file_says_that_they_are_shown(tmp_path: Path) -> None:
    plain = frames_of(video(tmp_path / "plain.mp4", "china.jpg", frames=3, size=(64, 48)))
    turned = frames_of(video(tmp_path / "turned.mp4", "china.jpg", frames=3, size=(64, 48), rotation=-90))
    assert plain[0].shape == (48, 64, 3) and turned[0].shape == (64, 48, 3)
    for frame, other in zip(plain, turned, strict=True):
        np.testing.assert_array_equal(other, np.rot90(frame, k=-1))  # clockwise


def test_frames_that_grow_in_the_middle_of_a_video_are_refused(tmp_path: Path) -> None:
    small = video(tmp_path / "small.ts", "china.jpg", frames=3, size=(48, 48))
    large = video(tmp_path / "large.ts", "china.jpg", frames=3, size=(96, 64))
    grows = tmp_path / "grows.ts"
    grows.write_bytes(small.read_bytes() + large.read_bytes())
    assert (48, 48, 3) in {frame.shape for frame in frames_of(grows)}
    with pytest.raises(UserError, match=r"grows.ts has 96 x 64 pixels.*, more than --max-image-pixels = 5,000"):
        frames_of(grows, max_pixels=5000)


def test_videos_are_refused_by_name(towers: Path, tmp_path: Path) -> None:
    tower, folder = str(towers / "clip"), tmp_path / "films"
    folder.mkdir()
    film = video(folder / "a.mp4", "flower.jpg")
    (folder / "cut.mp4").write_bytes(film.read_bytes()[:200])
    (folder / "list.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{film}\n#EXT-X-ENDLIST\n")
    with av.open(str(folder / "sound.mkv"), "w") as container:
        stream: Any = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    for name, message in (
        ("cut.mp4", r"video .*cut.mp4 cannot be read"),
        ("list.mp4", r"video .*list.mp4 cannot be read"),
        ("sound.mkv", r"video .*sound.mkv has no pictures in it"),
    ):
        with pytest.raises(UserError, match=message):
            extract_features(folder / name, tower, tmp_path / name, OPTIONS)
    small = replace(OPTIONS, max_image_pixels=1000, bad_images="error")
    with pytest.raises(UserError, match=r"a.mp4 has 48 x 48 pixels, more than --max-image-pixels = 1,000"):
        extract_features(film, tower, tmp_path / "small", small)
    done = extract_features(folder, tower, tmp_path / "out", replace(OPTIONS, bad_images="skip"))
    assert (done.new, [name for name, _ in done.skipped], done.complete) == (1, ["cut", "list", "sound"], True)
    assert {file.name for file in (tmp_path / "out").glob("*.npz")} == {"a.npz"}
    with pytest.raises(UserError, match="features of videos are kept in a folder"):
        extract_features(folder, tower, tmp_path / "out.h5", OPTIONS)


def test_a_vl_bart_learns_from_films(towers: Path, tmp_path: Path) -> None:
    """From files of films to a step of DoRA: extraction, records, features, batch, loss, gradients."""
    films = {"temple": "china.jpg", "bloom": "flower.jpg"}
    (tmp_path / "films").mkdir()
    for name, photograph in films.items():
        video(tmp_path / "films" / f"{name}.mp4", photograph)
    extract_features(tmp_path / "films", str(towers / "whole-clip"), tmp_path / "features", OPTIONS)
    records = [
        {"vid_name": name, "q": "what is shown?", "a0": "a roof", "a1": "a flower", "answer_idx": number}
        for number, name in enumerate(films)
    ]
    listed(tmp_path, *records)
    base = summaries.base_model(tmp_path / "base", [json.dumps(records), "tvqa: a0: a1:"])
    data = DataConfig(
        train={"tvqa": str(tmp_path / "list.json")},
        features=str(tmp_path / "features"),
        format="vision_text",
        cutoff_len=60,
        target_len=8,
        validation_samples=0,
        cache=None,
    )
    tokenizer = load_tokenizer(base)
    samples = read_data(VisionReader(data, tokenizer), data, seed=0, progress=False).train
    plan = adapter_plan(WeightDecomposed(LowRank(4, 8.0)))
    model = build_model(base, plan, WholePlacement(), dtype="fp32", head=VISION_SEQ2SEQ_LM.with_features(12)).model
    aim = VisionWriting(tokenizer, model, data.target_len, 1)
    batch = aim.prepared(aim.collator([samples[0], samples[1]]))
    seen = batch["visual_features"]
    assert seen.shape == (2, 64, 12) and seen[:, :2].any(2).all() and not seen[:, 2:].any()  # a frame of each second
    labels = batch.pop("labels")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(2):
        loss = aim.loss(model(**batch), labels, 2)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert trained["model.encoder.visual_embedding.features.weight"].grad.any()
