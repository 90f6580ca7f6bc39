"""Rewards that only wait, as for a judge elsewhere: what does scoring while sampling save?"""

import time
from typing import Any

_SECONDS = 0.1  # a completion


def after(prompts: Any, completions: list, completion_ids: Any = None, **columns: Any) -> list:
    """Called when sampling is over."""
    time.sleep(_SECONDS * len(completions))
    return [0.0] * len(completions)


def meanwhile(prompts: Any, completions: list, completion_ids: Any = None, **columns: Any) -> list:
    """The same, called as groups end."""
    return after(prompts, completions, completion_ids, **columns)


meanwhile.while_sampling = "prompt"
