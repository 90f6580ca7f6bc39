"""What sections are made of: a frozen pydantic model that refuses unknown keys, one of a thing that is named by its
import path, and bounded numbers."""

from __future__ import annotations

import importlib.util
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NonEmpty = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Target(BaseModel):
    """What an import path names. Keys beyond the declared ones are parameters of that itself."""

    model_config = ConfigDict(extra="allow", frozen=True)
    target: str

    @property
    def parameters(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _importable(self) -> Self:
        package = self.target.replace(":", ".").split(".")[0]
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"target: no module {package!r} can be found for {self.target!r}; is its folder on PYTHONPATH?"
            )
        return self
