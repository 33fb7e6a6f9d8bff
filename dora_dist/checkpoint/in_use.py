"""A lock on a run folder, so that one run at a time writes it."""

from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from dora_dist.runtime.console import note, warn
from dora_dist.runtime.errors import UserError

IN_USE = ".in_use"


class InUse:
    """At most one run at a time writes a folder: an advisory lock that ends with the process, however it ends.

    Where the process ended with its node, a file server gives the lock free only after a lease, which is 90 s by
    default on NFS: a run that goes on elsewhere waits for up to `patience_s`.
    """

    def __init__(self, run_dir: Path, patience_s: float = 120.0) -> None:
        self._lock, self._patience_s = FileLock(run_dir / IN_USE), patience_s

    def claim(self) -> None:
        """Lock the folder, making it if need be. Raises UserError if another run holds it."""
        path = Path(self._lock.lock_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with suppress(Timeout):
                self._lock.acquire(timeout=0)
                return
            note(f"{path.parent} is in use by another run; waiting up to {self._patience_s:g} s for it to end")
            self._lock.acquire(timeout=self._patience_s, poll_interval=0.5)
        except Timeout:
            raise UserError(
                f"checkpoint.run_dir: {path.parent} is in use by another run; wait for it, or give another folder"
            ) from None
        except NotImplementedError:
            warn(f"{path.parent} is on a file system without locks: take care that one run at a time uses it")

    def __enter__(self) -> "InUse":
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release(force=True)
