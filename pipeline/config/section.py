"""What every group of settings is made of: frozen sections, common types, and the marks of settings that digests leave out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Dtype = Literal["float32", "bfloat16", "float16"]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Temperature = Annotated[float, Field(gt=0, le=2)]  # vLLM takes no larger one
Count = Annotated[int, Field(ge=1)]
LATER = "later"  # marks a setting that is younger than existing runs: its default changes no digest
UNCOUNTED = "uncounted"  # marks a setting that no result depends on: it counts in no digest
MOST, MOST_S = 1e12, 1e9  # no setting is larger; a timer of Python takes no more than 9e9 seconds
CHOOSES = "chooses"  # marks a setting that chooses problems: the plan of a round holds what it chose, and no digest counts it


USER_FIRST = ("abfs", "abfss", "hdfs", "viewfs")  # their URIs name a container or a user before the host


def holds_credentials(uri: str) -> bool:
    """Whether a URI has a user or a secret before its host. Those of USER_FIRST have a name there, which is no secret."""
    scheme, found, rest = uri.partition("://")
    user, at, _ = rest.split("/")[0].rpartition("@")
    return bool(found and at) and (":" in user or scheme not in USER_FIRST)


class Section(BaseModel):
    """A group of settings. It is frozen, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _possible(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse a number so large that what it counts fits into no memory, and a time that no timer takes."""
        most = MOST_S if (info.field_name or "").endswith("_s") else MOST
        if isinstance(value, int | float) and info.field_name != "seed" and abs(value) > most:
            raise ValueError(f"is larger than {most:g}, the most that a setting may be")
        return value


def left_out(section: Section, name: str) -> bool:
    """Whether a setting counts in no digest: it is marked UNCOUNTED or CHOOSES, or marked LATER and at its default."""
    field = type(section).model_fields[name]
    later = LATER in field.metadata and getattr(section, name) == field.get_default(call_default_factory=True)
    return later or UNCOUNTED in field.metadata or CHOOSES in field.metadata


def counted(value: Any) -> Any:
    """The value of a setting, or the part of a section that counts in a digest."""
    if isinstance(value, tuple) and any(isinstance(part, Section) for part in value):
        return [counted(part) for part in value]
    if isinstance(value, dict):
        return {name: counted(part) for name, part in value.items()}
    if not isinstance(value, Section):
        return value
    return {name: counted(part) for name, part in value if not left_out(value, name)}
