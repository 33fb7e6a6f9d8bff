"""Fetching npm packages with the real npm, from a registry that this process serves."""

import functools
import hashlib
import http.server
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from package_archives import fetch_npm_package

from dora_dist.runtime.errors import UserError

NAME = "tiny-pictures"


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with one package, in the layout that npm asks for over HTTP, and npm told of it."""
    folder = tmp_path / "registry"
    folder.mkdir()
    manifest = {"name": NAME, "version": "1.2.0"}
    archive = folder / f"{NAME}-1.2.0.tgz"
    with tarfile.open(archive, "w:gz") as package:
        data = json.dumps(manifest).encode()
        member = tarfile.TarInfo("package/package.json")
        member.size = len(data)
        package.addfile(member, io.BytesIO(data))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        dist = {
            "tarball": f"{address}/{archive.name}",
            "shasum": hashlib.sha1(archive.read_bytes()).hexdigest(),
        }
        listed = {"name": NAME, "dist-tags": {"latest": "1.2.0"}, "versions": {"1.2.0": {**manifest, "dist": dist}}}
        (folder / NAME).write_text(json.dumps(listed))
        monkeypatch.setenv("npm_config_registry", address)
        monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder
        server.shutdown()


def test_an_npm_package_is_downloaded_once_and_checked(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = registry / f"{NAME}-1.2.0.tgz"
    checksum = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.chdir(tmp_path)
    cache = Path("cache")  # relative, as the demo's is
    with pytest.raises(UserError, match=f"expected sha256 {'0' * 64}, got {checksum}"):
        fetch_npm_package(f"{NAME}@1.2.0", "0" * 64, cache)
    assert list(cache.iterdir()) == []
    path = fetch_npm_package(f"{NAME}@1.2.0", checksum, cache)
    assert path.read_bytes() == archive.read_bytes()
    archive.unlink()
    assert fetch_npm_package(f"{NAME}@1.2.0", checksum, cache) == path
    with pytest.raises(UserError, match=r"(?s)tiny-pictures@9.0.0 could not.*No matching version"):
        fetch_npm_package(f"{NAME}@9.0.0", checksum, cache)


@pytest.mark.parametrize("package", [NAME, f"{NAME}@^1", "--registry=x@1", "../x@1.0.0"])
def test_only_exact_versions_are_accepted(package: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name@version"):
        fetch_npm_package(package, "0" * 64, tmp_path)


def test_without_npm_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no npm; .*apt-get install npm"):
        fetch_npm_package(f"{NAME}@1.2.0", "0" * 64, tmp_path / "cache")
