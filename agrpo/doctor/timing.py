"""How long a step takes, in closed form, from three speeds that are measured on the machine in a second.

Legend as in memory.py. A step's work is matrix products, at the speed of one as wide as the model's; elementwise
operations, at the speed of memory; and the start of many small operations, which is what a small model's decoding
costs. The factors below are counts of what the code does, not fitted to runs: what no run can be faster than. How many
times as long real steps took is SLACK, measured on a CPU by `python scripts/calibrate_doctor.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from agrpo.doctor.memory import Batch, Shape

PASSES = 5.0  # how often what a layer keeps for its backward pass is read or written in both passes
LOGITS_PASSES = 12.0  # the same of float32 logits: log-softmax, entropy, and again in the backward pass
ADAM_PASSES = 12.0  # the same of a float32 number a parameter: gradient, moments, master, and their norms
FORWARD_OPERATIONS = 70  # of a layer
DECODE_OPERATIONS = 55  # of a layer, for a token of every line
# Six models and shapes, 0.2 M to 135 M: sampling took 1.68 to 2.33 times what is counted, updates 1.26 to 2.38 times.
SLACK = {"sampling": (1.5, 2.5), "update": (1.2, 2.5)}


@dataclass(frozen=True)
class Speeds:
    """Of this machine: the work per second, and the least time that any operation takes."""

    flops: float  # of a product of (tokens, H) and (H, F)
    bandwidth: float  # bytes that an elementwise operation reads and writes
    operation: float  # seconds


def body_flops(shape: Shape, batch: Batch) -> float:
    """Of one forward of a micro-batch: 2 a token and weight of the layers, and 4·Q a pair of query and key."""
    pairs = batch.groups * batch.prompt**2 / 2
    pairs += batch.groups * batch.samples * batch.completion * (batch.prompt + batch.completion / 2)
    return 2.0 * shape.of_layers * batch.tokens + 4.0 * shape.query * shape.layers * pairs


def head_flops(shape: Shape, tokens: int) -> float:
    return 2.0 * shape.vocabulary * shape.hidden * tokens


def forward_seconds(shape: Shape, batch: Batch, kept: float, speeds: Speeds) -> float:
    """One forward without gradient, as the reference's: `kept` bytes are what a layer's outputs take."""
    flops = body_flops(shape, batch) + head_flops(shape, batch.completion_tokens)
    logits = 4.0 * batch.completion_tokens * shape.vocabulary
    moved = kept * PASSES / 3 + logits * LOGITS_PASSES / 3
    started = FORWARD_OPERATIONS * shape.layers * speeds.operation
    return flops / speeds.flops + moved / speeds.bandwidth + started


def update_seconds(shape: Shape, batch: Batch, kept: float, checkpointing: bool, speeds: Speeds) -> float:
    """Forward and backward of one micro-batch: a backward pass is two forwards, one where only adapters learn.

    The chunked head computes its logits again for the backward pass; a checkpointed body all of its layers.
    """
    backward = 2 if shape.trainable > shape.parameters / 2 else 1
    body = body_flops(shape, batch) * (1 + backward + checkpointing)
    head = head_flops(shape, batch.completion_tokens) * (2 + backward)
    logits = 4.0 * batch.completion_tokens * shape.vocabulary
    moved = kept * PASSES * (1 + checkpointing / 3) + logits * LOGITS_PASSES
    started = FORWARD_OPERATIONS * (3 + checkpointing) * shape.layers * speeds.operation
    return (body + head) / speeds.flops + moved / speeds.bandwidth + started


def optimiser_seconds(trained: float, speeds: Speeds) -> float:
    """Of one Adam step over `trained` parameters of this rank."""
    return 4.0 * ADAM_PASSES * trained / speeds.bandwidth


def sampling_seconds(
    shape: Shape, rows: int, prompts: float, prompt: int, completion: int, b: int, speeds: Speeds
) -> float:
    """`rows` completions at once, each at full length: their prompts, then a token of each at a time.

    A decoding step reads all weights, and the keys and values so far; or computes 2 operations a weight and row,
    whichever takes longer. The next token's distribution is float32.
    """
    read = (
        2.0 * shape.of_layers * prompts * prompt / speeds.flops + FORWARD_OPERATIONS * shape.layers * speeds.operation
    )
    weights = shape.of_layers + shape.vocabulary * shape.hidden
    cache = 2.0 * b * shape.layers * shape.key * rows * (prompt + completion)  # the static cache at its full width
    logits = 4.0 * rows * shape.vocabulary * LOGITS_PASSES / 2
    products = max(2.0 * weights * rows / speeds.flops, b * weights / speeds.bandwidth)
    started = DECODE_OPERATIONS * shape.layers * speeds.operation
    return read + completion * (products + (cache + logits) / speeds.bandwidth + started)
