"""JSON files of a run, read as typed models. What a file says is checked before it is used, and an error names file and field.

Types are strict: true is no number, "8" is no number, and NaN is refused. Unknown keys are ignored, since later versions of the
project may add some. A key that earlier versions did not write is optional.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from pipeline.errors import StoreError

STRICT = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
RESTORE = "Restore the file from a copy, or delete it and run the same command again, which makes its content anew"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{1,64}$")]
Number = Annotated[int, Field(ge=0, lt=10**9)]  # of a round, a policy, an evaluation
Count = Annotated[int, Field(ge=0, lt=2**48)]
Seconds = Annotated[float, Field(ge=0, lt=1e10)]
Text = Annotated[str, Field(max_length=1000)]
T = TypeVar("T")


class Document(BaseModel):
    """The content of one JSON file."""

    model_config = ConfigDict(**STRICT, frozen=True)


def parse(kind: type[T] | TypeAdapter[T], data: bytes, where: str, remedy: str = RESTORE) -> T:
    """The document in `data`, of a class or as a TypeAdapter reads it.

    Raises StoreError that names the first wrong field, with `where` and `remedy`.
    """
    try:
        adapter: TypeAdapter[T] = kind if isinstance(kind, TypeAdapter) else _adapter(kind)  # type: ignore[arg-type]
        return adapter.validate_json(data)
    except ValidationError as error:
        raise StoreError(_what(error), where, remedy) from None


def check(kind: type[T], value: Any, where: str, remedy: str = RESTORE) -> T:
    """The same for plain data that is to be written, or that came out of another file."""
    return parse(kind, json.dumps(value).encode(), where, remedy)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _what(error: ValidationError) -> str:
    """The first wrong field of a file, in words."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return f"is not JSON ({first['msg'].removeprefix('Invalid JSON: ')})"
    field = ".".join(str(part)[:80] for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    given = "" if first["type"] == "missing" else f" (got {str(first['input'])[:60]!r})"
    return f"{field}: {message}{given}" if field else f"is not what belongs here: {message}"
