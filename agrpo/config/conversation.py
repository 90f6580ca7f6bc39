"""Who answers the policy between its turns, by import path."""

from __future__ import annotations

import importlib.util
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from agrpo.config.base import Count, Positive


class EnvironmentConfig(BaseModel):
    """An environment by import path. Keys beyond these are parameters of the environment itself."""

    model_config = ConfigDict(extra="allow", frozen=True)
    target: str  # package.module:Name of a class or function that makes one
    max_turns: Annotated[int, Field(ge=1, le=127)] = 8  # of the policy in one conversation
    timeout_s: Positive = 30.0  # of one reset or step; a conversation whose environment takes longer is left out
    concurrency: Count = 1  # environments that work at the same time, in threads

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
