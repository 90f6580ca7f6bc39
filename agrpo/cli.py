"""The `agrpo` command: a table. A command's code is imported when it runs, and each stage runs as its run.sh does."""

from __future__ import annotations

import difflib
import importlib
import runpy
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from agrpo.places import own_folder

_STAGES = own_folder("stages")
_SETTINGS = "[--config FILE] [key.path=value …] [--print-config]"


def main() -> int:
    name, *arguments = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        print(f"error: agrpo {name}: {_nearest(name)}" if name else usage(), file=sys.stderr)
        return 2
    return COMMANDS[name].run(arguments)


def usage() -> str:
    """Every command with what it does and what it takes, a line each."""
    rows = [f"  {name:<14}{one.does:<45}{one.takes}" for name, one in COMMANDS.items()]
    return "\n".join(["usage: agrpo COMMAND …", "", *rows])


def _nearest(name: str) -> str:
    near = [one for one in COMMANDS if one.startswith(name) or name.startswith(one)]
    near = near or difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
    meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}."
    return f"no such command; {meant} agrpo --help tells what each does"


def _module(name: str, arguments: list[str]) -> int:
    """A module's `main(arguments)`."""
    return importlib.import_module(name).main(arguments)


def _stage(script: str, arguments: list[str]) -> int:
    """A stage, in as many processes as the environment asks for, its configuration checked first."""
    from agrpo.launch import main as launch

    return launch([str(_STAGES / script), *arguments])


def _measure(script: str, arguments: list[str]) -> int:
    """A script in as many processes, which reads its arguments itself."""
    from agrpo.launch import main as launch

    return launch([str(_STAGES / script), *arguments], check=lambda arguments: None)


def _quickstart(arguments: list[str]) -> int:
    return _module("agrpo.pipeline", ["configs/quickstart", *arguments])


def _preferences(arguments: list[str]) -> int:
    if not any(argument.startswith("--convert") for argument in arguments):
        return _stage("stage2_reward/preferences.py", arguments)
    from agrpo.data.convert import main as convert
    from agrpo.reporting.files import replace

    return convert(arguments, write=replace)


def _serve_reward(arguments: list[str]) -> int:
    sys.argv = ["agrpo serve-reward", *arguments]
    runpy.run_module("reward_models.server", run_name="__main__", alter_sys=True)  # exits; rewards stand above us
    return 0


def _serve_rollout(arguments: list[str]) -> int:
    from agrpo.types import InputError

    try:
        return _module("agrpo.rollout_server", arguments)
    except InputError as error:  # an extra that is not installed
        print(f"error: {error}", file=sys.stderr)
        return 2


def _chat(arguments: list[str]) -> int:
    sys.argv = ["agrpo chat", *arguments]
    runpy.run_path(str(_STAGES / "evaluation" / "chat.py"), run_name="__main__")  # exits
    return 0


class Command(NamedTuple):
    """One command: its code, called with the arguments behind its name and returning the exit code; and its usage."""

    run: Callable[[list[str]], int]
    does: str
    takes: str


COMMANDS = {
    "sft": Command(partial(_stage, "stage1_sft/main.py"), "stage 1: supervised fine-tuning", _SETTINGS),
    "preferences": Command(
        _preferences,
        "groups for stage 2: sampled, or converted",
        "the same, or --convert gsm8k|hh IN OUT [--held-out SHARE] [--json]",
    ),
    "reward": Command(partial(_stage, "stage2_reward/main.py"), "stage 2: a reward model", "as sft"),
    "train": Command(partial(_stage, "stage3_agrpo/main.py"), "stage 3: policy optimisation", "as sft"),
    "pipeline": Command(
        partial(_module, "agrpo.pipeline"), "the stages of a folder, in sequence", "CONFIGS [key.path=value …]"
    ),
    "quickstart": Command(_quickstart, "the three stages, on a CPU", "[key.path=value …]"),
    "ablate": Command(
        partial(_module, "agrpo.ablation.command"),
        "a grid of settings, seeds, methods",
        "GRID [key.path=value …] [--jobs N] [--plan] [--json]",
    ),
    "eval": Command(
        partial(_measure, "evaluation/evaluate.py"),
        "pass@1, pass@k, maj@k of a model",
        "--model RUN|DIR|ID --benchmark NAME | --data FILE [--help]",
    ),
    "compare": Command(
        partial(_measure, "evaluation/compare.py"),
        "which of two models is better",
        "A B --data FILE --reward TARGET [--help]",
    ),
    "chat": Command(_chat, "talk to a model", "RUN|DIR|ID [--compare OTHER] [--samples N] [--reward TARGET]"),
    "merge": Command(partial(_module, "agrpo.merge"), "a whole model of LoRA's adapters", "RUN|ADAPTER OUT"),
    "push": Command(
        partial(_module, "agrpo.reporting.hub"), "a model to the Hub, private", "RUN|DIR OWNER/NAME [--public]"
    ),
    "export": Command(partial(_module, "agrpo.export"), "a model for llama.cpp", "--gguf RUN|DIR OUT.gguf"),
    "summary": Command(partial(_module, "agrpo.reporting.summary"), "what a run measured", "DIR [--json]"),
    "plot": Command(
        partial(_module, "agrpo.reporting.plots"),
        "a run's curves, several runs' too",
        "DIR… [--dynamics] [--out PNG]",
    ),
    "report": Command(
        partial(_module, "agrpo.reporting.report.command"),
        "one HTML file of a run, or several",
        "DIR… [--out HTML] [--serve [--port N]]",
    ),
    "serve-reward": Command(_serve_reward, "rewards for runs elsewhere", "--config FILE [--host H] [--port N]"),
    "serve-rollout": Command(
        _serve_rollout, "sampling for runs elsewhere", "--model DIR [--backend native|vllm] [--host H] [--port N]"
    ),
    "doctor": Command(
        partial(_module, "agrpo.doctor.command"),
        "what works on this machine",
        "[--config FILE] [key.path=value …] [--stage STAGE] [--json]",
    ),
    "benchmark": Command(
        partial(_module, "agrpo.benchmark.command"), "what a step costs here", "step|parts|growth [--json FILE] …"
    ),
    "smoke": Command(
        partial(_module, "agrpo.smoke.command"),
        "a configuration offline, in seconds",
        "--config FILE [key.path=value …] [--out DIR] [--steps N]",
    ),
    "theory": Command(
        partial(_module, "agrpo.theory"),
        "how far training can move a prompt",
        "--beta B --group-size G|inf [--pass-rate Q] [--plot FILE] [--json]",
    ),
}


if __name__ == "__main__":
    raise SystemExit(main())
