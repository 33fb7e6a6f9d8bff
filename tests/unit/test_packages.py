"""Fetching archives with the real pip, from a folder that stands in for the package index."""

import hashlib
import zipfile
from pathlib import Path

import pytest
from package_archives import extract_member, fetch_package

from dora_dist.runtime.errors import UserError

WHEEL = "tiny_data-1.2-py3-none-any.whl"


def make_wheel(folder: Path, text: str = "one line") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / WHEEL
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny_data/items.jsonl", text)
        info = "tiny_data-1.2.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip's only source for this test: a folder with one wheel."""
    folder = tmp_path / "index"
    make_wheel(folder)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_downloads_once_and_then_needs_no_index(index: Path, tmp_path: Path) -> None:
    wheel = index / WHEEL
    checksum = sha256(wheel)
    cache = tmp_path / "deep" / "cache"
    path = fetch_package("tiny-data==1.2", checksum, cache)
    assert path == cache / WHEEL
    assert sha256(path) == checksum
    wheel.unlink()
    assert fetch_package("Tiny.Data==1.2", checksum, cache) == path
    assert list(cache.iterdir()) == [path]


def test_a_damaged_cached_archive_is_fetched_again(index: Path, tmp_path: Path) -> None:
    checksum = sha256(index / WHEEL)
    path = fetch_package("tiny-data==1.2", checksum, tmp_path / "cache")
    path.write_bytes(path.read_bytes()[:100])
    assert sha256(fetch_package("tiny-data==1.2", checksum, tmp_path / "cache")) == checksum


def test_a_wrong_checksum_names_both(index: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match=f"expected sha256 {'0' * 64}, got {sha256(index / WHEEL)}"):
        fetch_package("tiny-data==1.2", "0" * 64, cache)
    assert list(cache.iterdir()) == []


def test_a_package_that_is_not_there_shows_pips_words(index: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)absent-data==9 could not be downl.*No matching distribution"):
        fetch_package("absent-data==9", "0" * 64, tmp_path / "cache")


def test_an_unreachable_index_shows_pips_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(UserError, match="could not be downloaded; check that pip reaches its package index"):
        fetch_package("tiny-data==1.2", "0" * 64, tmp_path / "cache")


@pytest.mark.parametrize("requirement", ["tiny-data", "tiny-data>=1", "tiny-data==1 --pre", "-r other==1"])
def test_only_exact_versions_are_accepted(requirement: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name==version"):
        fetch_package(requirement, "0" * 64, tmp_path)


def test_extracts_one_member(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "index", "some text")
    path = extract_member(wheel, "tiny_data/items.jsonl", tmp_path / "out")
    assert path == tmp_path / "out" / "tiny_data" / "items.jsonl"
    assert path.read_text() == "some text"
    assert [file.name for file in path.parent.iterdir()] == ["items.jsonl"]


@pytest.mark.parametrize("member", ["../outside.txt", "/outside.txt", "a/../../outside.txt"])
def test_refuses_paths_that_leave_the_folder(tmp_path: Path, member: str) -> None:
    archive = tmp_path / "evil.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(member, "text")
    with pytest.raises(UserError, match="outside"):
        extract_member(archive, member, tmp_path / "out")
    assert not (tmp_path / "outside.txt").exists()


def test_a_missing_member_and_a_damaged_archive_leave_nothing(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "index", "x" * 1000)
    with pytest.raises(UserError, match="has no member 'tiny_data/other'"):
        extract_member(wheel, "tiny_data/other", tmp_path / "out")
    wheel.write_bytes(wheel.read_bytes().replace(b"x" * 1000, b"x" * 999 + b"y"))
    with pytest.raises(UserError, match="Bad CRC-32"):
        extract_member(wheel, "tiny_data/items.jsonl", tmp_path / "out")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []
