"""Rows with the columns of the published data sets that `configs/` names, made up: small sums and small talk."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]


def rows_of(source: str, count: int, seed: int = 0) -> list[Row]:
    """`count` rows as the data set `source` has them.

    Raises:
        KeyError: nothing is known about its columns.
    """
    draw = random.Random(seed)
    return [MAKERS[source](draw, number) for number in range(count)]


def _sum(draw: random.Random) -> tuple[str, str, int]:
    """A question, its working and its answer."""
    name, thing = draw.choice(("Ann", "Ben", "Cleo")), draw.choice(("apples", "books", "coins"))
    a, b = draw.randint(2, 60), draw.randint(2, 60)
    return (
        f"{name} has {a} {thing} and buys {b} more. How many {thing} are there?",
        f"There are {a}+{b}={a + b}.",
        a + b,
    )


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _gsm8k(draw: random.Random, number: int) -> Row:
    question, working, answer = _sum(draw)
    marked = working.replace(f"={answer}", f"=<<{working[10:].split('=')[0]}={answer}>>{answer}")
    return {"question": f"{question} ({number})", "answer": f"{marked}\n#### {answer}"}


def _numina(draw: random.Random, number: int) -> Row:
    question, working, answer = _sum(draw)
    problem, solution = f"{question} ({number})", f"{working} $\\boxed{{{answer}}}$"
    messages = [_turn("user", problem), _turn("assistant", solution)]
    return {"source": "synthetic_math", "problem": problem, "solution": solution, "messages": messages}


def _stratos(draw: random.Random, number: int) -> Row:
    question, working, answer = _sum(draw)
    thought = f"<|begin_of_thought|>\n\n{working}\n\n<|end_of_thought|>"
    said = f"{thought}\n\n<|begin_of_solution|>\n\n\\boxed{{{answer}}}\n\n<|end_of_solution|>"
    turns = [{"from": "user", "value": f"{question} ({number})"}, {"from": "assistant", "value": said}]
    return {"system": "Think first, then give the solution.", "conversations": turns}


def _math(draw: random.Random, number: int) -> Row:
    question, working, answer = _sum(draw)
    solution = f"{working} Thus $\\boxed{{{answer}}}$."
    return {"problem": f"{question} ({number})", "level": "Level 1", "type": "Algebra", "solution": solution}


def _math_500(draw: random.Random, number: int) -> Row:
    row = _math(draw, number)
    answer = row["solution"].split("boxed{")[1].split("}")[0]
    ids = {"subject": row.pop("type"), "unique_id": f"test/algebra/{number}.json"}
    return {**row, "level": 1, "answer": answer, **ids}


def _helpful(draw: random.Random, number: int) -> Row:
    topic = draw.choice(("bread", "chess", "rain"))
    prompt = [_turn("user", f"Tell me about {topic} ({number})."), _turn("assistant", "What would you like to know?")]
    prompt.append(_turn("user", draw.choice(("Something short.", "How it works."))))
    good, bad = f"Of course. Here is how {topic} works.", "I do not know."
    return {"prompt": prompt, "chosen": [_turn("assistant", good)], "rejected": [_turn("assistant", bad)]}


def _post(draw: random.Random, number: int) -> tuple[str, str]:
    pet = draw.choice(("cat", "dog", "parrot"))
    text = f"My {pet} wakes me at {draw.randint(3, 6)} every morning. I have tried everything ({number})."
    prompt = f"SUBREDDIT: r/pets\n\nTITLE: My {pet} and I\n\nPOST: {text}\n\nTL;DR:"
    return prompt, f" My {pet} wakes me too early."


def _tldr(draw: random.Random, number: int) -> Row:
    prompt, summary = _post(draw, number)
    return {"prompt": prompt, "completion": summary}


def _tldr_preference(draw: random.Random, number: int) -> Row:
    prompt, summary = _post(draw, number)
    return {"prompt": prompt, "chosen": summary, "rejected": " I have a pet and I write about it here today."}


MAKERS: dict[str, Callable[[random.Random, int], Row]] = {
    "openai/gsm8k": _gsm8k,
    "AI-MO/NuminaMath-CoT": _numina,
    "bespokelabs/Bespoke-Stratos-17k": _stratos,
    "DigitalLearningGmbH/MATH-lighteval": _math,
    "HuggingFaceH4/MATH-500": _math_500,
    "trl-lib/hh-rlhf-helpful-base": _helpful,
    "trl-lib/tldr": _tldr,
    "trl-lib/tldr-preference": _tldr_preference,
}
