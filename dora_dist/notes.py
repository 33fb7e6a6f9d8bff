"""What a run tells its user beside its results: notes (good to know) and warnings (probably not meant)."""

import os
import sys

from dora_dist.launchers import rank_among_several


def note(text: str) -> None:
    """Say on rank 0 what the user may want to know."""
    _say("note", text)


def warn(text: str) -> None:
    """Say on rank 0 what the user has probably not meant."""
    _say("warning", text)


def _say(kind: str, text: str) -> None:
    if rank_among_several(os.environ) in (None, 0):
        print(f"{kind}: {text}", file=sys.stderr, flush=True)
