"""Records that cannot be used: each is an error, or is left out and counted (data.bad_records)."""

from __future__ import annotations

from collections.abc import Sequence

from dora_dist.data.columns import Columns
from dora_dist.data.doubts import Doubts
from dora_dist.data.reader import Reader
from dora_dist.data.records import Record
from dora_dist.runtime.errors import UserError

MOST = 0.1
"""The largest share of a set's records that may be left out: with more, the fault is hardly the records'."""
_FIRST = 3  # that are named


class BadRecords:
    """The records of a set that cannot be used, as they are found."""

    def __init__(self, *, skip: bool) -> None:
        """skip: leave them out; else the first is an error."""
        self.skip, self.count = skip, 0
        self._first: list[str] = []

    def take(self, error: UserError) -> None:
        """Take in what is wrong with a record, which names it. Raises UserError with it unless records are skipped."""
        if not self.skip:
            raise with_remedy(error) from error
        self.count += 1
        self._first += [str(error)] * (len(self._first) < _FIRST)

    def found(self, field: str, used: int) -> list[str]:
        """What to warn of, if anything, where `used` records are left. Raises UserError, naming the set as `field`, for
        too many bad ones.
        """
        if not self.count:
            return []
        read = self.count + used
        self.check(field, read)
        first = "; ".join(self._first)
        return [f"{self.count:,} of {read:,} records are left out, for they cannot be used (the first: {first})"]

    def check(self, field: str, read: int, *, left: int = 0) -> None:
        """Raise UserError, naming the set as `field`, for too many bad ones of `read`, with `left` still to see."""
        if self.count > MOST * read:
            raise UserError(too_many(field, self.count, read, "; ".join(self._first), left=left))


def with_remedy(error: UserError) -> UserError:
    """What is wrong with a record, and how to do without it."""
    return UserError(f'{error} (data.bad_records = "skip" would leave such records out)')


def too_many(field: str, bad: int, read: int, first: str, *, left: int = 0) -> str:
    """That so many of the records read, `left` of which were not looked at, cannot be used that leaving them out would
    hide another fault.
    """
    found = f"at least {bad:,}" if left else f"{bad:,}"
    return (
        f"{field}: {found} of {read:,} records cannot be used, and data.bad_records leaves out 1 in {round(1 / MOST)} "
        f"at most; look at the data, data.format and the fields that it names (the first: {first})"
    )


def encode_usable(
    reader: Reader, records: Sequence[tuple[str, Record]], into: Columns, doubts: Doubts, *, bad: BadRecords
) -> None:
    """As the reader's `encode`, without those records that it refuses, which `bad` takes.

    They are found by halving: a reader says of a chunk only what is wrong with the first.
    """
    if not records:
        return
    columns, seen = into.mark(), doubts.mark()
    try:
        reader.encode(records, into, doubts)
    except UserError as error:
        into.back_to(columns)
        doubts.back_to(seen)
        if len(records) == 1 or not bad.skip:
            bad.take(error)
            return
        half = len(records) // 2
        for part in (records[:half], records[half:]):
            encode_usable(reader, part, into, doubts, bad=bad)
    else:
        into.records += len(records)


def usable(reader: Reader, place: str, record: Record) -> bool:
    """Whether `encode_usable` would not leave this record out."""
    try:
        reader.encode([(reader.place(place, record), record)], Columns(), Doubts(reader.tokenizer, but=reader.allowed))
    except UserError:
        return False
    return True
