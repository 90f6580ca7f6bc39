"""What a run needs, in closed form: bytes of one rank.

Legend: P parameters of the model, T of them learn, W ranks, b bytes of a number of the computation (4 or 2); H hidden
size, Q query and K key width (heads × head size), F intermediate size, L layers, V vocabulary; S tokens of a
micro-batch on the flat layout, C of them completion tokens. Adam in mixed precision holds 12 bytes a parameter beside
weights and gradients (Rajbhandari et al. 2020, ZeRO, section 3.1); here its float32 master copy is kept from ZeRO 1 on.
"""

from __future__ import annotations

from dataclasses import dataclass

BUCKET = 50_000_000  # numbers of DeepSpeed's reduction buffer at most (`zero.BUCKET`)
LIVE = 1_000_000_000  # parameters that DeepSpeed's ZeRO-3 keeps gathered
TOKENS, SLICE, SLICE_CUDA = 4096, 1 << 20, 1 << 26  # of the head: tokens at a time, logits of a slice of V


@dataclass(frozen=True)
class Shape:
    """The model, as far as memory depends on it."""

    parameters: int
    trainable: int
    hidden: int
    query: int
    key: int
    intermediate: int
    layers: int
    vocabulary: int
    tied: bool = True

    @property
    def of_layers(self) -> int:
        """Parameters without the embeddings and the head."""
        return max(0, self.parameters - self.vocabulary * self.hidden * (1 if self.tied else 2))


@dataclass(frozen=True)
class Batch:
    """One micro-batch: `groups` prompts of p tokens, each with `samples` completions of c tokens."""

    groups: int
    samples: int
    prompt: int
    completion: int

    @property
    def tokens(self) -> int:
        return self.groups * (self.prompt + self.samples * self.completion)

    @property
    def completion_tokens(self) -> int:
        return self.groups * self.samples * self.completion

    @property
    def key_tokens(self) -> int:
        """Keys that attention holds: the prompts' own, and for each completion its prompt's again beside its own."""
        return self.groups * (self.prompt + self.samples * (self.prompt + self.completion))


def weights(p: int, b: int, zero: int, world: int) -> int:
    """b·P. ZeRO-3 leaves each rank its 1/W, and gathers up to 10⁹ that it is about to need."""
    return b * p // world + b * min(p, LIVE) if zero == 3 else b * p


def quantized_weights(shape: Shape, b: int) -> int:
    """NF4 in blocks of 64: half a byte a weight of the layers and a float32 scale a block; embeddings keep b bytes."""
    return shape.of_layers * 9 // 16 + b * (shape.parameters - shape.of_layers)


def master(t: int, zero: int, world: int) -> int:
    """4·T/W: the float32 copy that ZeRO 1 to 3 step on, also when the computation is float32. None without ZeRO."""
    return 4 * t // world if zero else 0


def adam(t: int, zero: int, world: int) -> int:
    """8·T: two float32 moments, a rank's 1/W of them from ZeRO 1 on (ZeRO, stage P_os)."""
    return 8 * t // (world if zero else 1)


def gradients(t: int, b: int, zero: int, world: int) -> int:
    """b·T in ZeRO 0 and 1, b·T/W in 2 and 3 (P_os+g), and the float32 shard that Adam reads where it is another."""
    own = b * t // (world if zero >= 2 else 1)
    return own + (4 * t // world if zero == 3 or (zero and b < 4) else 0)


def bucket(t: int, b: int, zero: int, cuda: bool = False) -> int:
    """DeepSpeed's reduction buffer, from ZeRO 1 on: of all gradients, up to its limit. On a CPU from ZeRO 2 on."""
    return b * min(BUCKET, t) if zero >= (1 if cuda else 2) else 0


def activations(shape: Shape, batch: Batch, b: int, checkpointing: bool) -> int:
    """What a Llama-like backbone keeps for its backward pass, and one layer's gradients of it.

    A layer keeps, a token: 4·H (input and its norm, twice), 2·Q (queries as attention reads them, its output), 3·F
    (gate, up, their product); and 2·K for each key token. Checkpointed, H for a layer and all of it for one layer at a
    time. Scores of attention are not kept. With long rows or on a GPU it is Q more (the flash kernel's own output). A
    family that does not run flat has its prompts repeated and its (S, V) logits whole: more.
    """
    layer = b * (batch.tokens * (4 * shape.hidden + 2 * shape.query + 3 * shape.intermediate))
    layer += b * batch.key_tokens * 2 * shape.key
    kept = b * batch.tokens * shape.hidden * shape.layers + layer if checkpointing else layer * shape.layers
    return kept + layer + 2 * b * batch.tokens * shape.hidden


def logits(shape: Shape, batch: Batch, b: int, cuda: bool = False) -> int:
    """A slice of logits, twice in float32 (once more in two bytes if b is 2), and the head's gradient.

    A slice has at most 4096 tokens and as many of the vocabulary as make 2²⁰ logits (2²⁶ on a GPU), at least 64.
    """
    tokens = min(TOKENS, batch.completion_tokens)
    part = min(max(SLICE_CUDA if cuda else SLICE, 64 * tokens), tokens * shape.vocabulary)
    exact = 4 if batch.completion_tokens > TOKENS else b  # the head's gradient is summed up in float32
    head = exact * shape.vocabulary * shape.hidden if shape.trainable == shape.parameters else 0
    return part * (8 if b == 4 else 12) + head + 4 * batch.completion_tokens * shape.hidden


def kv_cache(shape: Shape, rows: int, prompt: int, completion: int, b: int) -> int:
    """2·L·K numbers for each of rows × (p + c) places: the native backend's static cache, prompts at full length."""
    return 2 * b * shape.layers * shape.key * rows * (prompt + completion)
