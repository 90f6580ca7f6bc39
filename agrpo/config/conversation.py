"""Who answers the policy between its turns, by import path."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from agrpo.config.base import Count, Positive, Target


class EnvironmentConfig(Target):
    """An environment: a class or function that makes one. Keys beyond these are its parameters."""

    max_turns: Annotated[int, Field(ge=1, le=127)] = 8  # of the policy in one conversation
    timeout_s: Positive = 30.0  # of one reset or step; a conversation whose environment takes longer is left out
    concurrency: Count = 1  # environments that work at the same time, in threads
