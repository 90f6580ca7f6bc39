"""Programs that a model wrote, run where they can do no harm: Linux's Landlock, seccomp and limits, and no other need.

`inside` runs in the sandbox's processes, everything else in the trainer. `docs/rewards.md` says what is kept out
and what is not.
"""

from reward_models.sandbox.pool import Sandbox, why_unavailable
from reward_models.sandbox.process import SandboxError
from reward_models.sandbox.room import Ending, Limits, Room
from reward_models.sandbox.values import same

__all__ = ["Ending", "Limits", "Room", "Sandbox", "SandboxError", "same", "why_unavailable"]
