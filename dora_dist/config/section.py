"""What the sections of the configuration are made of: their base class, and kinds of values with their ranges."""

import os
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from dora_dist.config.names import largest

ABSURD = "absurd"
"""The type of pydantic's finding about a number that no run comes near."""


class Section(BaseModel):
    """A part of the configuration. It cannot be changed, and refuses unknown fields and values of another type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def at_most(most: float) -> AfterValidator:
    """Refuses slips of the hand, before they overflow an int64 or ask for memory; not part of the documented range."""

    def check(value: Any) -> Any:
        if largest(value) > most:
            meant = {"most": f"{most:,.15g}"}
            raise PydanticCustomError(ABSURD, "is more than any run needs; give at most {most}", meant)
        return value

    return AfterValidator(check)


def known(*names: str) -> WithJsonSchema:
    """For names that a plugin may add to: editors and `--help` show those of the package."""
    return WithJsonSchema({"anyOf": [{"type": "string", "enum": list(names)}, {"type": "string", "minLength": 1}]})


Steps = Annotated[int, Field(ge=1), at_most(10**9)]
Count = Annotated[int, Field(ge=1), at_most(2**20)]
Elements = Annotated[int, Field(ge=0), at_most(2**50)]
Seconds = Annotated[float, Field(gt=0), at_most(10**8)]
Rate = Annotated[float, Field(gt=0), at_most(1e30)]
Text = Annotated[str, Field(min_length=1)]
Patterns = list[Text]
PathText = Annotated[
    str, Field(min_length=1, max_length=4095, pattern=r"^[^\x00]+$"), AfterValidator(os.path.expanduser)
]
PathTexts = Annotated[list[PathText], Field(min_length=1)]
PathsByTask = Annotated[dict[Text, PathText | PathTexts], Field(min_length=1)]
