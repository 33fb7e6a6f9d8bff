"""How a weight's magnitude and direction move while a run trains (Liu et al., section 3), and the file that says it.

For one matrix, with rows w of W0, v of V and the magnitude m (for LoRA and full fine-tuning m = ‖v‖):

    ΔM = mean over rows |m − ‖w‖|        ΔD = mean over rows (1 − cos(v, w))

A run with `analysis.every` writes both for every matrix into RUN/analysis.jsonl, a line for each recording.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dora_dist.adapters.row_changes import RowChange
from dora_dist.runtime.errors import UserError


class Moved(NamedTuple):
    """ΔM in units of the weights, ΔD from 0 to 2, and how many rows the means are over; without rows both are None.

    `magnitude` is the mean of m over the same rows; lines of earlier versions lack it.
    """

    delta_m: float | None
    delta_d: float | None
    rows: int
    magnitude: float | None = None


def sums_over_rows(change: RowChange) -> Tensor:
    """(4,) fp64 on the rows' device: Σ|m − ‖w‖|, Σ(1 − cos(v, w)), Σm, and how many rows the sums are over.

    Rows of zeros have no direction: they are left out. With d = v − w,

        1 − cos(v, w) = (‖w‖²‖d‖² − ⟨w,d⟩²) / (‖w‖‖v‖·(‖w‖‖v‖ + ⟨v,w⟩))

    No two numbers close to 1 are subtracted, so that the first small steps of a run have digits, too.
    """
    base, cross, squares = (sums.double() for sums in (change.base_squares, change.cross, change.squares))
    gained = 2 * cross + squares  # ‖v‖² beyond ‖w‖²
    w, v = base.sqrt(), (base + gained).clamp(min=0).sqrt()
    inner = base + cross
    small = (base * squares - cross.square()).clamp(min=0) / (w * v * (w * v + inner))
    turned = torch.where(inner > 0, small, 1 - inner / (w * v))
    offset = change.magnitude_offset
    gain = gained / (v + w) if offset is None else offset.double()
    counted = (w > 0) & (v > 0)
    return torch.stack([torch.where(counted, x, 0.0).sum() for x in (gain.abs(), turned, w + gain, counted.double())])


def moved(changes: Mapping[str, RowChange]) -> dict[str, Moved]:
    """ΔM and ΔD of each matrix by name; one transfer from the device for all."""
    if not changes:
        return {}
    table = torch.stack([sums_over_rows(change) for change in changes.values()]).tolist()
    return {
        name: Moved(m / rows, d / rows, int(rows), total / rows) if rows else Moved(None, None, 0)
        for name, (m, d, total, rows) in zip(changes, table, strict=True)
    }


@dataclass(frozen=True)
class Recording:
    """A line of analysis.jsonl: what moved how far up to an optimizer step. `method` is what people call it."""

    step: int
    method: str
    matrices: Mapping[str, Moved]

    def line(self) -> str:
        matrices = {name: own._asdict() for name, own in self.matrices.items()}
        return json.dumps({"step": self.step, "method": self.method, "matrices": matrices}) + "\n"

    @classmethod
    def of(cls, record: Any) -> "Recording":
        """From a line's JSON; what is not finite there is None. Raises ValueError, TypeError or KeyError for anything
        else.
        """
        found = {str(name): own.items() for name, own in record["matrices"].items()}
        matrices = {name: Moved(**{key: _finite(value) for key, value in own}) for name, own in found.items()}
        return cls(int(record["step"]), str(record["method"]), matrices)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_recordings(file: Path) -> list[Recording]:
    """The recordings of a run, in the order of their steps; a last line that a killed process began is left out.

    Raises UserError for a file that is not there, or is something else.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; a run writes it with --analysis.every N") from error
    return list(_parsed(file, lines))


def _parsed(file: Path, lines: list[str]) -> Iterable[Recording]:
    found: dict[int, Recording] = {}
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            break
        try:
            recording = Recording.of(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{file}, line {number}: not a recording of an analysis ({type(error).__name__}: {error})"
            ) from error
        found[recording.step] = recording
    return [found[step] for step in sorted(found)]
