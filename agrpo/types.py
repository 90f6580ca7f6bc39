"""The records that flow through the loop, and the three protocols that users implement.

Legend of the whole library:
    P prompts of a step; N completions, in ragged groups that share a prompt; C completion tokens of all N together;
    K reward functions; H hidden size; V vocabulary. Log-probabilities are natural (nats), at the sampling temperature.
    Where others speak between a completion's turns: E tokens of theirs, which are read and never learnt ("heard").

There is no padding: per-token values are flat (C,), per-completion values (N,). `lengths` (N,) cuts the flat token axis
into completions, in order; `group` (N,) says which prompt each completion answers and never decreases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Message = Mapping[str, str]  # {"role": "user", "content": "…"}
Conversation = Sequence[Message]
Text = str | Conversation  # what a row of data holds: a plain string, or the turns of a conversation


class InputError(ValueError):
    """Bad input: the message says what is wrong, where (file, row, key), and the mend. A stage exits 2 on it."""


def _none() -> Tensor:
    import torch  # here, for what checks configurations without it

    return torch.zeros(0, dtype=torch.long)


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt of one step. `slot` is its position in the step's global batch: it keys the random stream."""

    text: Text
    ids: tuple[int, ...]
    slot: int
    columns: Mapping[str, Any]  # the row's other columns, handed to the rewards by name


@dataclass(frozen=True)
class Rollout:
    """N sampled completions of P prompts, and the weights that sampled them.

    The last four are empty where no environment answered. With one, a completion is a conversation: `tokens` are the
    policy's own, of all its turns, and `heard` what stood between them. Nothing per token has an entry for those.
    """

    prompts: tuple[Prompt, ...]
    group: Tensor  # (N,) index into prompts, non-decreasing
    lengths: Tensor  # (N,) tokens, the end token included
    tokens: Tensor  # (C,)
    logp: Tensor  # (C,) nats, as the sampler computed them
    finished: Tensor  # (N,) bool: ended by itself, not by the length limit
    texts: tuple[str, ...]  # N completions, decoded without special tokens
    weight_version: int
    heard: Tensor = field(default_factory=_none)  # (E,) the environments' tokens, in order
    gaps: Tensor = field(default_factory=_none)  # (C,) how many of them stand directly before each token
    turns: tuple[Conversation, ...] = ()  # N, all that was said behind the prompt
    outcomes: Tensor = field(default_factory=_none)  # (N,) rewards of the environments; NaN where one failed


@dataclass(frozen=True)
class Experience:
    """What an update learns from: the rollout, each completion's rewards and each token's advantage.

    The last three are empty (0,) where the method has no use for them before the update.
    """

    rollout: Rollout
    scores: Tensor  # (N, K) of the reward functions; NaN where one abstained
    rewards: Tensor  # (N,) their weighted sum; NaN where none could score
    advantages: Tensor  # (C,), the same at every token of a completion unless each token has its own
    reference: Tensor  # (C,) log-probabilities under the reference, nats
    values: Tensor  # (C,) the critic's, of the state before each token
    returns: Tensor  # (C,) what the critic regresses on


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the completion to imitate. The prompt is "" for plain text.

    A completion of several turns begins and ends with the assistant's; the turns of others in it are read only.
    """

    prompt: Text
    completion: Text
    columns: Mapping[str, Any]


@dataclass(frozen=True)
class PreferenceGroup:
    """Completions of one prompt with their levels; two completions of a level are a tie.

    `confidences` has one value in [0, 1] for each completion, or is empty: the confidence of a pair is the smaller of
    its two. `margin` is the annotators' score difference of a chosen/rejected pair, None where the data has none.
    `means` and `deviations` are an ensemble's judgement of each completion, or empty.
    """

    prompt: Text
    completions: tuple[str, ...]
    levels: tuple[int, ...]  # higher is better
    confidences: tuple[float, ...]
    margin: float | None
    columns: Mapping[str, Any]
    means: tuple[float, ...] = ()
    deviations: tuple[float, ...] = ()


class Reward(Protocol):
    """TRL's reward signature: one float for each completion, None where this reward abstains.

    A reward that waits for something outside this process may have the attribute `while_sampling`: then it is called
    with some of a rollout's completions, from another thread, while the rest is still sampled. "prompt" hands over all
    completions of a prompt together; a number, so many that follow each other. Calls must give what one call of all
    gives; they never run at the same time. Its `metrics` are added up, and an interrupted run calls its `cancel()`, if
    it has these.
    """

    def __call__(
        self, prompts: list[Text], completions: list[Text], completion_ids: list[list[int]], **columns: list[Any]
    ) -> list[float | None]: ...


@dataclass(frozen=True)
class Step:
    """What an environment makes of a turn of the policy.

    The observation continues a plain prompt as it is; in a conversation a string becomes a user's turn, and messages
    stay as they are. It is needed unless `done`.
    """

    observation: Text = ""
    reward: float = 0.0  # a conversation's rewards are added up
    done: bool = False


class Environment(Protocol):
    """Answers the policy between its turns: a tool, a game, a user. One object for each conversation."""

    def reset(self, row: Mapping[str, Any], seed: int) -> None:
        """Get ready for a conversation. `row` is the prompt's row, its text under "prompt"; seeds differ by sample."""
        ...

    def step(self, said: str) -> Step:
        """Answer a turn, which is given without special tokens."""
        ...


class Ended(Protocol):
    """Is told of completions that have ended while others are still sampled; sampling waits for it."""

    def __call__(self, places: list[int], ids: list[list[int]], texts: list[str], finished: list[bool]) -> None:
        """`places` are those in the rollout."""
        ...


class RolloutBackend(Protocol):
    """Whatever can generate with the engine's current weights."""

    def follow(self, weight_version: int) -> None:
        """Have the policy's weights as they are now, ready to generate."""
        ...

    def rest(self) -> None:
        """Give up memory that training can use, until the next `follow`; costs nothing when done twice."""
        ...

    def shrink(self) -> bool:
        """Generate with less memory from now on, after it ran out; False where that is not possible."""
        ...

    def generate(
        self, prompts: Sequence[Prompt], counts: Sequence[int], sampling: Any, key: tuple[int, int], first: int = 0
    ) -> Rollout:
        """Sample counts[p] completions of each prompt.

        `key` is (seed, step) of the counter-based random streams, `first` the number of a prompt's first sample: more
        samples of the same prompts continue where the ones before ended.
        """
        ...
