"""Feature files of pictures and videos: what is read, how it is pooled, what is refused by name."""

import multiprocessing
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy
import pytest
import torch

from dora_dist.data.features import (
    FRAMES,
    REGIONS,
    FeatureFile,
    FeatureFiles,
    PictureFeatures,
    PictureFolder,
    VideoFeatures,
)
from dora_dist.runtime.errors import UserError


def numbers(*shape: int, seed: int = 0) -> Any:
    return numpy.random.default_rng(seed).normal(size=shape).astype(numpy.float32)


def pictures(path: Path, **groups: Any) -> str:
    """An HDF5 file of groups {id: features, or {name: array}}."""
    with h5py.File(path, "w") as file:
        for id, arrays in groups.items():
            for name, values in (arrays if isinstance(arrays, dict) else {"features": arrays}).items():
                file[f"{id}/{name}"] = values
    return str(path)


def video(folder: Path, id: str, **arrays: Any) -> str:
    folder.mkdir(exist_ok=True)
    numpy.savez(folder / f"{id}.npz", **arrays)
    return str(folder)


@pytest.mark.parametrize("side", [7, 9, 12])
def test_a_grid_is_max_pooled_to_six_by_six(side: int, tmp_path: Path) -> None:
    grid = numbers(side * side, 5)
    found = PictureFeatures(pictures(tmp_path / "a.h5", p=grid))("p")
    expected = numpy.full((6, 6, 5), -numpy.inf, dtype=numpy.float32)
    for row in range(6):
        for column in range(6):  # cell i of 6 covers floor(i·side/6) up to ceil((i + 1)·side/6)
            rows, columns = (slice(i * side // 6, -(-(i + 1) * side // 6)) for i in (row, column))
            expected[row, column] = grid.reshape(side, side, 5)[rows, columns].max((0, 1))
    assert torch.equal(found.features, torch.from_numpy(expected.reshape(36, 5)))
    assert found.features.is_contiguous() and not found.boxes.any() and found.boxes.shape == (REGIONS, 4)


def test_36_regions_stay_as_they_are_with_their_boxes(tmp_path: Path) -> None:
    regions = numbers(36, 3).astype(numpy.float16)
    corners = numpy.random.default_rng(1).uniform(size=(36, 2, 2)).astype(numpy.float32)
    boxes = numpy.sort(corners, axis=1).reshape(36, 4)
    found = PictureFeatures(pictures(tmp_path / "a.h5", p={"features": regions, "boxes": boxes}))("p")
    assert found.features.dtype == found.boxes.dtype == torch.float32
    assert torch.equal(found.features, torch.from_numpy(regions).float())
    assert torch.equal(found.boxes, torch.from_numpy(boxes))


@pytest.mark.parametrize(("regions", "shape"), [(36, (36, 4)), (36, (36, 5)), (36, (1, 4)), (49, (36, 4))])
def test_boxes_that_are_all_zero_are_no_boxes(regions: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    arrays = {"features": numbers(regions, 3), "boxes": numpy.zeros(shape, "f4")}
    boxes = PictureFeatures(pictures(tmp_path / "a.h5", p=arrays))("p").boxes
    assert boxes.shape == (REGIONS, 4) and not boxes.any()


def test_files_say_how_they_were_made(tmp_path: Path) -> None:
    read = PictureFeatures(pictures(tmp_path / "a.H5", p=numbers(36, 3)))
    assert read.made_with() == "" and FeatureFiles([read.path], "data.features", of="pictures").located(
        ["p"]
    ).tolist() == [0]
    with h5py.File(read.path, "a") as file:
        file.attrs["extraction"] = '{"layer": -2}'
    assert read.made_with() == '{"layer": -2}'
    films = VideoFeatures(video(tmp_path / "v", "a", features=numbers(3, 4)))
    assert films.made_with() == ""
    (tmp_path / "v" / "extraction.json").write_text("{}")
    assert films.made_with() == "{}" and films.ids() == {"a"}


def test_a_video_has_64_frames_by_zeros_or_by_max_pooling(tmp_path: Path) -> None:
    short, long = numbers(9, 4), numbers(FRAMES * 2, 4)
    video(tmp_path / "v", "short", features=short)
    read = VideoFeatures(video(tmp_path / "v", "long", features=long))
    padded = numpy.concatenate([short, numpy.zeros((FRAMES - 9, 4), "f4")])
    assert torch.equal(read("short").features, torch.from_numpy(padded)) and read("short").boxes.shape == (64, 4)
    expected = long.reshape(FRAMES, 2, 4).max(1)
    assert torch.equal(read("long").features, torch.from_numpy(expected)) and read("long").boxes.shape == (64, 4)
    assert read.ids() == {"short", "long"}


def test_several_files_are_looked_through_in_order(tmp_path: Path) -> None:
    first = pictures(tmp_path / "a.h5", x=numbers(36, 3), y=numbers(36, 3, seed=1))
    second = pictures(tmp_path / "b.hdf5", y=numbers(36, 3, seed=2), z=numbers(36, 3, seed=3))
    both = FeatureFiles([first, second], "data.features", of="pictures")
    assert both.located(["z", "x", "absent", "y"]).tolist() == [1, 0, -1, 0]
    assert torch.equal(both.files[1]("z").features, torch.from_numpy(numbers(36, 3, seed=3)))


def test_a_folder_has_a_file_for_each_picture_as_the_authors_have_them(tmp_path: Path) -> None:
    folder = tmp_path / "data_clip_RN101_att"
    folder.mkdir()
    ids = ["COCO_train2014_000000000009", "n1.2"]
    for seed, id in enumerate(ids):
        pictures(folder / f"{id}.h5", **{id: numbers(49, 3, seed=seed)})
    whole = PictureFeatures(pictures(tmp_path / "a.h5", **{ids[1]: numbers(49, 3, seed=1)}))
    [read] = FeatureFiles([str(folder)], "data.features", of="pictures").files
    assert isinstance(read, PictureFolder) and read.ids() == {*ids} and read.made_with() == ""
    assert torch.equal(read(ids[1]).features, whole(ids[1]).features) and read.most == REGIONS
    (folder / "linked.h5").symlink_to(f"{ids[0]}.h5")
    (folder / "damaged.h5").write_bytes(b"no HDF5")
    pictures(folder / "other.h5", another=numbers(36, 3))
    for id, message in {
        "linked": "linked.h5 is a link, which is not followed; copy the file",
        "../n1.2": "an id is the name of a file in that folder, without .h5",
        "damaged": "damaged.h5 cannot be read as HDF5",
        "other": "features of 'other' are missing: there is no \"other\"",
        "absent": "absent.h5 cannot be read as HDF5: .*No such file",
    }.items():
        with pytest.raises(UserError, match=message):
            read(id)


def _in_another_process(read: FeatureFile, id: str) -> Any:
    return read(id).features.numpy()


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_each_process_opens_the_file_for_itself(start: str, tmp_path: Path) -> None:
    read = PictureFeatures(pictures(tmp_path / "a.h5", p=numbers(36, 3)))
    here = read("p").features
    with multiprocessing.get_context(start).Pool(1) as pool:
        assert torch.equal(torch.from_numpy(pool.apply(_in_another_process, (read, "p"))), here)
    assert torch.equal(pickle.loads(pickle.dumps(read))("p").features, here)


def _linked(path: Path) -> str:
    pictures(path.with_name("other.h5"), p=numbers(36, 3))
    with h5py.File(path, "w") as file:
        file["p"] = h5py.ExternalLink("other.h5", "/p")
    return str(path)


def _virtual(path: Path) -> str:
    other = pictures(path.with_name("other.h5"), p=numbers(36, 3))
    layout = h5py.VirtualLayout((36, 3), dtype="f4")
    layout[:] = h5py.VirtualSource(other, "p/features", shape=(36, 3))
    with h5py.File(path, "w") as file:
        file.create_group("p").create_virtual_dataset("features", layout)
    return str(path)


GRIDS: dict[str, tuple[Any, str]] = {
    "nan": (numpy.full((36, 3), numpy.nan, numpy.float32), "a.h5: the features of 'p' hold NaN or infinity"),
    "no grid": (numbers(50, 3), "are 50 regions, which are not a square grid of 6 x 6 or more; give 36 regions"),
    "a small grid": (numbers(25, 3), "are 25 regions, which are not a square grid of 6 x 6 or more"),
    "a single region": (numbers(1, 3), "are 1 regions, which are not a square grid of 6 x 6 or more"),
    "one vector": (numbers(36), r'"features"\) must be floating-point numbers \(L, d\), found float32 \(36,\)'),
    "nothing": (numpy.zeros((0, 3), numpy.float32), r"found float32 \(0, 3\)"),
    "pictures": (numpy.zeros((36, 3), numpy.uint8), r"found uint8 \(36, 3\)"),
    "boxes of a grid": ({"features": numbers(49, 3), "boxes": numpy.ones((49, 4), "f4")}, "leave them out of a grid"),
    "boxes in pixels": ({"features": numbers(36, 3), "boxes": numpy.full((36, 4), 8.0)}, "boxes beyond 0 to 1"),
    "boxes backwards": (
        {"features": numbers(36, 3), "boxes": numpy.tile([0.5, 0, 0.25, 1], (36, 1))},
        "boxes that end before they begin; give x1, y1, x2, y2 in this order",
    ),
    "another name": ({"feature": numbers(36, 3)}, "a.h5: the features of 'p' are missing: there is no \"features\""),
    "deeper": ({"features/x": numbers(36, 3)}, r"must be floating-point numbers \(L, d\), found a group"),
}


@pytest.mark.parametrize("kind", GRIDS)
def test_pictures_that_cannot_be_used_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    values, message = GRIDS[kind]
    with pytest.raises(UserError, match=message):
        PictureFeatures(pictures(tmp_path / "a.h5", p=values))("p")


@pytest.mark.parametrize(("make", "message"), [(_linked, '"p" is a link'), (_virtual, "numbers in another file")])
def test_no_link_out_of_the_file_is_followed(make: Callable[[Path], str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        PictureFeatures(make(tmp_path / "a.h5"))("p")


def test_videos_that_cannot_be_used_are_refused_by_name(tmp_path: Path) -> None:
    video(tmp_path / "v", "pickled", features=numpy.array([[object()]]))
    video(tmp_path / "v", "named", frames=numbers(3, 4))
    read = VideoFeatures(video(tmp_path / "v", "nan", features=numpy.full((2, 3), numpy.inf, "f4")))
    (tmp_path / "v" / "damaged.npz").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "v" / "linked.npz").symlink_to("nan.npz")
    for id, message in {
        "pickled": r"v: the features of 'pickled' must be floating-point numbers \(L, d\), found object \(1, 1\)",
        "named": 'are missing: the file has no array "features"',
        "nan": "of 'nan' hold NaN or infinity",
        "damaged": "of 'damaged' cannot be read: ",
        "linked": "linked.npz is a link, which is not followed; copy the file",
        "../v/named": "an id is the name of a file in that folder",
        "..": "an id is the name of a file in that folder",
    }.items():
        with pytest.raises(UserError, match=message):
            read(id)


@pytest.mark.parametrize("save", [numpy.savez, numpy.savez_compressed])
def test_a_video_damaged_anywhere_is_refused_by_name(save: Any, tmp_path: Path) -> None:
    save(tmp_path / "a.npz", features=numbers(3, 2))
    whole, read = (tmp_path / "a.npz").read_bytes(), VideoFeatures(str(tmp_path))
    said = []
    for place in range(len(whole)):
        for flipped in (0x01, 0xFF):
            (tmp_path / "a.npz").write_bytes(whole[:place] + bytes([whole[place] ^ flipped]) + whole[place + 1 :])
            try:
                read("a")  # what nobody reads can be anything
            except UserError as error:
                said.append(str(error))
    assert len(said) > len(whole) / 2 and all("features of 'a'" in message for message in said)


def npz_that_says(path: Path, header: dict[str, Any]) -> None:
    """A video whose array is only a header."""
    with zipfile.ZipFile(path, "w") as archive, archive.open("features.npy", "w") as array:
        numpy.lib.format.write_array_header_1_0(array, header)


@pytest.mark.parametrize("dtype", ["<f4", "|O"])
def test_no_array_is_read_before_its_size_is_known(dtype: str, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:  # nothing is written of it, so it is small
        file.create_dataset("p/features", (10_000_000, 2048), "f4", chunks=(1000, 2048), compression="gzip")
        file.create_dataset("q/features", (36, 3), "f4")
        file.create_dataset("q/boxes", (10_000_000, 2048), "f4", chunks=(1000, 2048))
    for id in ("p", "q"):
        with pytest.raises(
            UserError, match=f"of '{id}' .* are 10,000,000 of 2,048 numbers each, more than one picture"
        ):
            PictureFeatures(str(tmp_path / "a.h5"))(id)
    npz_that_says(tmp_path / "v.npz", {"descr": dtype, "fortran_order": False, "shape": (2**40, 2**40)})
    message = "more than one picture or video can have" if dtype == "<f4" else "must be floating-point numbers"
    with pytest.raises(UserError, match=f"of 'v' .*{message}"):
        VideoFeatures(str(tmp_path))("v")
    npz_that_says(tmp_path / "v.npz", {"descr": "<f4", "fortran_order": False, "shape": (-(2**70), 2)})
    with pytest.raises(UserError, match="the features of 'v' cannot be read: "):
        VideoFeatures(str(tmp_path))("v")


def test_a_file_damaged_anywhere_is_refused_by_name(tmp_path: Path) -> None:
    path = pictures(tmp_path / "a.h5", p=numbers(36, 2))
    whole, read = Path(path).read_bytes(), PictureFeatures(path)
    said = []
    for place in (*range(0, 96, 4), *range(96, len(whole), 200)):  # the superblock and the root's header come first
        Path(path).write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        for look in (read.ids, read.made_with, lambda: read("p")):
            try:
                look()
            except UserError as error:
                said.append(str(error))
            read.close()
    assert all("a.h5" in message for message in said)
    assert any("cannot be read as HDF5" in message for message in said)
    assert all(message.count("cannot be read") <= 1 for message in said)


def test_paths_that_hold_no_features_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.h5").write_bytes(b"not HDF5")
    (tmp_path / "a.pt").write_bytes(b"")
    for name in ("empty", "both"):
        (tmp_path / name).mkdir()
    video(tmp_path / "both", "a", features=numbers(3, 4))
    pictures(tmp_path / "both" / "p.h5", p=numbers(36, 4))
    films = video(tmp_path / "films", "a", features=numbers(3, 4))
    for path, message in {
        "a.pt": r'data.features = ".*a.pt": is none of what features are read from; give an HDF5 file \(',
        "b.h5": r"b.h5\": no such file; `dora-dist extract-features` makes one",
        "empty": r'empty": the folder holds no .h5 or .npz file; give an HDF5 file',
        "both": r'both": the folder holds both .h5 and .npz files; give',
        "films": r'films": has features of videos, and its records are about pictures; give those of each task',
    }.items():
        with pytest.raises(UserError, match=message):
            FeatureFiles([str(tmp_path / path)], "data.features", of="pictures")
    with pytest.raises(UserError, match="has features of pictures, and its records are about videos"):
        FeatureFiles([films, str(pictures(tmp_path / "p.h5", p=numbers(36, 4)))], "data.features", of="videos")
    with pytest.raises(UserError, match=r"a.h5 cannot be read as HDF5"):
        FeatureFiles([str(tmp_path / "a.h5")], "data.features", of="pictures").located(["p"])
