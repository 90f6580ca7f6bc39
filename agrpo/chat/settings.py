"""What can be set while a conversation goes on, by `/set name=value`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, ValidationError

from agrpo.config.base import Count, Section
from agrpo.types import InputError


class ChatSettings(Section):
    """How answers are sampled; temperature 0 takes the most likely token."""

    temperature: Annotated[float, Field(ge=0)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    max_tokens: Count = 512
    samples: Annotated[int, Field(ge=1, le=16)] = 1
    seed: Annotated[int, Field(ge=0)] = 0

    def with_setting(self, text: str) -> ChatSettings:
        """These settings but for one `name=value`.

        Raises:
            InputError: no such setting, or a value out of its bounds.
        """
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or name not in type(self).model_fields:
            raise InputError(f"/set: write name=value; there are {', '.join(type(self).model_fields)}")
        try:
            return type(self).model_validate({**self.model_dump(), name: value})
        except ValidationError as error:
            raise InputError(f"/set {name}: {error.errors()[0]['msg']}, got {value!r}") from None

    def in_words(self) -> str:
        return "  ".join(f"{name}={value}" for name, value in self.model_dump().items())
