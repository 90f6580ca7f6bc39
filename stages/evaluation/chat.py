"""`agrpo chat`: talk to a model, or to two at once, in the terminal or through a pipe."""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from agrpo.chat.settings import ChatSettings
from agrpo.evaluation.command import exit_code, specs_of
from agrpo.evaluation.runs import find_model, spoken_to_in_turns
from agrpo.types import InputError, Text


def main(arguments: list[str]) -> None:
    options = parser().parse_args(arguments)
    names = [find_model(name) for name in (options.model, *([options.compare] if options.compare else []))]
    known = [turns for turns in map(spoken_to_in_turns, names) if turns is not None]
    turns = (all(known) if known else True) if options.chat is None else options.chat
    if options.system is not None and not turns:
        raise InputError("--system: the model is asked in plain prompts, as it was trained; --chat gives it turns")
    settings = settings_of(options)
    specs = specs_of(options) if options.reward else []
    from agrpo.chat.conversation import Conversation
    from agrpo.chat.screens import screen
    from agrpo.chat.speaker import Speaker

    shown = screen()
    conversation = Conversation(
        [Speaker(name, options.dtype) for name in names],
        shown,
        settings,
        turns=turns,
        system=options.system,
        judge=judge(specs) if specs else None,
    )
    kind = "chat template" if turns else "plain prompts, as it was trained: each line is one (--chat gives it turns)"
    print(f"{' and '.join(names)}: {kind}; /help lists the commands", file=sys.stderr, flush=True)
    try:
        conversation.run(lines())
    except KeyboardInterrupt:
        print(file=sys.stderr)


def judge(specs: list) -> Any:
    """What the rewards say of answers, in words: their weighted sum, and each one's score."""
    from reward_models.configured import reward_set

    rewards = reward_set(specs)

    def say(prompt: Text, answers: Sequence[Any], columns: dict[str, str]) -> list[str]:
        count = len(answers)
        texts = [a.text if isinstance(prompt, str) else [{"role": "assistant", "content": a.text}] for a in answers]
        given = {name: [value] * count for name, value in columns.items()}
        given["finished"] = [a.finished for a in answers]
        scores = rewards.score([prompt] * count, texts, [list(a.ids) for a in answers], given)
        lost = rewards.take_errors()
        if lost:
            name = next(iter(lost))
            return [f"{name}: {in_words(rewards.first_error[name].strip().splitlines()[-1])}"] * count
        totals = rewards.total(scores).tolist()
        return [
            f"reward {shown(total)}" + "".join(f"  {n} {shown(s)}" for n, s in zip(rewards.names, row, strict=True))
            for total, row in zip(totals, scores.tolist(), strict=True)
        ]

    return say


def in_words(error: str) -> str:
    """Why a reward failed; a column that it wants is one that /data gives."""
    wanted = re.findall(r"'(\w+)'", error) if "required keyword-only argument" in error else []
    return f"needs {', '.join(f'/data {name}=…' for name in wanted)}" if wanted else error


def shown(score: float) -> str:
    return "–" if score != score else f"{score:.3f}"


def lines() -> Iterator[str]:
    """What is typed, or what a pipe holds."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401 (lets input() edit and recall lines)

    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def settings_of(options: argparse.Namespace) -> ChatSettings:
    fields = ("temperature", "top_p", "top_k", "max_tokens", "samples", "seed")
    given = {name: getattr(options, name) for name in fields if getattr(options, name) is not None}
    try:
        return ChatSettings(**given)
    except ValidationError as error:
        problem = error.errors()[0]
        raise InputError(f"--{str(problem['loc'][0]).replace('_', '-')}: {problem['msg']}") from None


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="agrpo chat", description=__doc__)
    options.add_argument("model", metavar="RUN_OR_MODEL", help="a run, a model's folder, or a Hub id")
    options.add_argument("--compare", metavar="OTHER", help="a second model that answers too")
    options.add_argument("--system", metavar="TEXT", help="a system turn")
    options.add_argument("--chat", action=argparse.BooleanOptionalAction, help="turns; default: as it was trained")
    options.add_argument("--reward", action="append", metavar="TARGET", help="shown at each answer; may be repeated")
    for name, kind in (("temperature", float), ("top-p", float), ("top-k", int), ("max-tokens", int)):
        options.add_argument(f"--{name}", type=kind)
    options.add_argument("--samples", type=int, metavar="N", help="answers side by side")
    options.add_argument("--seed", type=int)
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options.set_defaults(run_code=False)
    return options


if __name__ == "__main__":
    raise SystemExit(exit_code(main, sys.argv[1:]))
