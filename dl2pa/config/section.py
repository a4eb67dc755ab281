"""Base of the sections of a configuration, and the types of their numbers."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Triple = tuple[float, float, float]


class Section(BaseModel):
    """Base of all sections: immutable; unknown keys are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _reject_boolean(cls, value: object, info: ValidationInfo) -> object:
        """Reject true and false for numbers, to which they would convert. Text has its own message."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        types = (annotation, *get_args(annotation))
        if isinstance(value, bool) and bool not in types and str not in types:
            raise ValueError("must not be true or false")
        return value
