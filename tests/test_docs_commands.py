"""Every command that the docs show: run as it stands; or, where that takes hours, a GPU or a network, read by the
parser that would read it, and its configuration resolved. A command that is neither is an error.
"""

import argparse
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from stage_runs import ROOT, TINY, environment

from agrpo import cli
from agrpo.config import load_config, stage_of
from agrpo.launch import stage_of as stage_of_script
from agrpo.pipeline import check, stages_of

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted(ROOT.glob("stages/*/README.md"))

# What really runs here, page by page, in their order: as it stands, in a folder with small runs of these names.
RUN = {
    "docs/choosing.md": ["agrpo theory"],
    "docs/algorithms.md": ["agrpo theory"],
    "docs/preferences.md": ["mkdir", "head", "(head", "agrpo summary", "agrpo compare"],
    "docs/quickstart.md": ["agrpo summary", "agrpo report"],
    "docs/report.md": ["agrpo report runs/quickstart #", "agrpo report runs/a-seed", "agrpo plot"],
    "docs/evaluation.md": [
        "agrpo eval --model runs/mine --data mine.jsonl",
        "agrpo compare runs/quickstart-seed0/agrpo",
        "printf",
    ],
    "docs/data.md": ["agrpo preferences --convert hh"],
    "docs/ablation.md": ["agrpo ablate configs/ablations/seed.yaml --plan"],
}
# What does not, by how it begins: why, and what is done instead (the parser, the configuration).
NOT_RUN = {
    "bash scripts/quickstart.sh": "minutes; tests/test_packaging.py and tests/test_stages.py run its stages small",
    "bash scripts/setup.sh": "installs; tests/test_scripts.py runs it against a pip that takes notes",
    "bash scripts/test.sh": "is what runs this",
    "bash scripts/pipeline.sh": "hours, and models of the Hub",
    "bash stages/": "minutes to days",
    "python -m agrpo.launch": "minutes to days",
    "python scripts/": "minutes to hours",
    "taskset": "minutes, and vLLM",
    "pip install": "a network",
    "apt-get install": "a network, and root",
    "python -c": "compiles for minutes",
    "pip wheel": "tests/test_packaging.py builds one and installs it",
    ". .venv/bin/activate": "belongs to the reader's shell",
    "head": "cuts published data that are not here",
    "export": "belongs to the reader's shell",
    "agrpo quickstart": "minutes; tests/test_packaging.py runs it small",
    "agrpo pipeline": "minutes; the stages of mine/ run small here",
    "agrpo sft": "minutes to days",
    "agrpo train": "minutes to days",
    "agrpo preferences": "a model and its minutes, or data to download; tests/data/test_convert.py converts",
    "agrpo eval": "a model of the Hub, a benchmark or lm-eval; tests/evaluation runs it",
    "agrpo compare": "a judge, or models to ask; tests/evaluation runs both",
    "agrpo chat": "waits for a person; tests/chat talks to it, and so does a pipe here",
    "agrpo report": "--serve waits for a browser; tests/reporting opens it in one",
    "agrpo doctor": "tests/doctor runs it",
    "agrpo smoke": "tests/test_recipes.py runs it for every recipe",
    "agrpo ablate": "half an hour; tests/ablation runs a small grid",
    "agrpo benchmark": "minutes; tests/test_benchmark.py runs it small",
    "agrpo serve-rollout": "serves until it is stopped; tests/engine talks to one",
}
VARIABLE = re.compile(r"[A-Z_]+=\S*$")


@dataclass(frozen=True)
class Command:
    page: str
    text: str  # without comment, in one line

    @property
    def words(self):
        """As the shell reads it, without the variables before it and what stands around it."""
        words = shlex.split(self.text.removesuffix("&").strip().strip("()"))
        while words and VARIABLE.match(words[0]):
            words.pop(0)
        return words

    def begins(self, start):
        """Does it begin so, whatever variables stand before it? A start that ends in ` #` is the whole command."""
        if start.endswith(" #"):
            return self.text == start.removesuffix(" #")
        return self.text.startswith(start) or shlex.join(self.words).startswith(start)


def commands_of(page):
    """The commands of a page's bash blocks: lines, joined where they go on."""
    name = str(page.relative_to(ROOT))
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        lines = re.sub(r"(?:\\|(?<=\|))\n\s*", " ", block).splitlines()
        for line in lines:
            text = re.sub(r"(?:^|\s+)#(?!\d).*$", "", line).strip()
            if text:
                yield Command(name, text)


COMMANDS = [command for page in PAGES for command in commands_of(page)]


def runs(command):
    return any(command.begins(start) for start in RUN.get(command.page, ()))


def test_every_command_is_run_or_has_its_reason():
    assert len(COMMANDS) > 60
    for command in COMMANDS:
        told = any(command.begins(start) for start in NOT_RUN)
        assert runs(command) or told, f"{command.page}: {command.text}"
    for page, starts in RUN.items():
        here = [command for command in COMMANDS if command.page == page]
        for start in starts:
            assert any(command.begins(start) for command in here), f"{page} has no {start}"
    for start in NOT_RUN:
        assert any(command.begins(start) for command in COMMANDS if not runs(command)), f"no page has {start}"


# A reader's folder, with the small runs that the commands name.


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """The folder of a reader who has followed docs/preferences.md up to its first run, and has files of their own."""
    here = tmp_path_factory.mktemp("reader")
    for name in ("stages", "scripts", "configs"):
        (here / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "docs" / "examples" / "preferences.csv", here)
    text = (ROOT / "docs" / "preferences.md").read_text(encoding="utf-8")
    (here / "mine").mkdir()
    for name, values in re.findall(r'^```yaml title="(.*?)"\n(.*?)^```', text, re.MULTILINE | re.DOTALL):
        (here / name).write_text(values)
    split = [command.text for command in COMMANDS if command.page == "docs/preferences.md" and "head" in command.text]
    subprocess.run(["bash", "-euc", "\n".join(split)], cwd=here, check=True)
    (here / "mine.jsonl").write_text('{"question": "3+4=", "answer": "7"}\n{"question": "9-1=", "answer": "8"}\n')
    (here / "harmless-base").mkdir()
    turns = "\n\nHuman: What is {}?\n\nAssistant: It is {}."
    rows = [{"chosen": turns.format(i, i), "rejected": turns.format(i, "nothing")} for i in range(30)]
    (here / "harmless-base" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    subprocess.run(["gzip", str(here / "harmless-base" / "train.jsonl")], check=True)
    (here / "bin").mkdir()
    program = here / "bin" / "agrpo"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m agrpo.cli "$@"\n')
    program.chmod(0o755)
    policy = (ROOT / "configs" / "quickstart" / "agrpo.yaml").read_text(encoding="utf-8")
    (here / "my.yaml").write_text(f"{policy}\nmodel: {{name_or_path: elsewhere/model}}\n")
    shutil.copy(ROOT / "configs" / "quickstart" / "sft.yaml", here / "my-sft.yaml")
    return here


@pytest.fixture(scope="module")
def folder(reader):
    """The same after the last stage, and after the quickstart, cut down to seconds."""
    here = reader
    small = ["model.dtype=float32", "model.trainable_layers=null", "engine.zero_stage=0"]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = {"model_type": "qwen2", **sizes, "num_key_value_heads": 2, "max_position_embeddings": 512}
    own = {
        "sft": ["model.gguf=null", f"model.config={json.dumps(model)}", "model.tokenizer.kind=characters"],
        "reward": [],
        "agrpo": ["sampling.max_completion_length=8", "sampling.prompts_per_step=4"],
    }
    cut = ["training.max_steps=2", "logging.report_every_s=0"]
    stages = [[stage, ["--config", f"mine/{stage}.yaml", *small, *more, *cut]] for stage, more in own.items()]
    seed0 = ["run.dir=runs", "run.name=quickstart-seed0", "logging.report_every_s=0"]
    stages += [[stage, [*seed0, *TINY[stage], "training.max_steps=2"]] for stage in ("sft", "reward", "agrpo")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "several_runs.py"), json.dumps(stages)],
        cwd=here, env=environment(), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    for run in ("mine", "quickstart-seed0"):
        for stage in own:
            assert (here / "runs" / run / stage / "result.json").exists(), done.stdout[-2000:] + done.stderr[-4000:]
    for name in ("quickstart", "a-seed0", "a-seed1", "b-seed0"):
        shutil.copytree(here / "runs" / "quickstart-seed0", here / "runs" / name)
    return here


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if runs(c)], ids=lambda command: f"{command.page}: {command.text[:60]}"
)
def test_a_command_runs_as_it_stands(command, request):
    done = as_typed(command.text, request.getfixturevalue("folder" if "runs/" in command.text else "reader"))
    shown = output_of(command)
    if shown is not None and command.text.startswith("agrpo theory"):
        assert done.stdout.strip() == shown.strip()


def as_typed(text, folder):
    """The finished shell that ran a line, with `agrpo` on its path."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=folder,
        env={**environment(), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def output_of(command):
    """The block that stands behind a command's own, where that holds nothing else."""
    text = (ROOT / command.page).read_text(encoding="utf-8")
    found = re.search(rf"^```bash\n{re.escape(command.text)}\n```\n\n```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return found and found.group(1)


def test_the_chat_of_the_preference_guide_answers(folder):
    """It waits for a person, so a pipe stands in for one."""
    (chat,) = [c.text for c in COMMANDS if c.page == "docs/preferences.md" and c.text.startswith("agrpo chat")]
    assert "reward" in as_typed(f"printf 'What is honey?\\n' | {chat} --max-tokens 8", folder).stdout


# Commands that are not run: read by the parser that would read them.


class Parsed(Exception):
    pass


@pytest.fixture
def parsing(monkeypatch, reader):
    """Each program ends once its arguments are read."""
    monkeypatch.chdir(reader)
    for name in ("parse_args", "parse_intermixed_args"):
        real = getattr(argparse.ArgumentParser, name)

        def parse(self, args=None, namespace=None, real=real):
            raise Parsed(real(self, args, namespace))

        monkeypatch.setattr(argparse.ArgumentParser, name, parse)


def parsed(program, *arguments):
    """What a program reads in its arguments; it fails where they are wrong."""
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            program(*arguments)
    except Parsed as read:
        return read.args[0]
    except SystemExit as end:
        pytest.fail(f"ended with {end.code}: {said.getvalue()}")
    pytest.fail(f"has no parser: {said.getvalue()}")


SHOWN = "[--config FILE] [key.path=value …] [--print-config]"


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if not runs(c)], ids=lambda command: f"{command.page}: {command.text[:60]}"
)
def test_a_command_that_is_not_run_is_read(command, parsing, monkeypatch):
    if command.text.endswith(SHOWN):
        command = Command(command.page, command.text.removesuffix(SHOWN))
    variables = re.match(r"((?:[A-Z_]+=\S+ )*)", command.text).group(1)
    for name, value in (one.split("=", 1) for one in variables.split()):
        monkeypatch.setenv(name, value)
    read_words(command.words, monkeypatch)


def test_stages_that_stand_within_a_line_resolve(parsing, monkeypatch):
    """`agrpo train --config configs/…` in tables and sentences, and the scripts there."""
    spans = {span for page in PAGES for span in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))}
    found = {
        span
        for span in spans
        if re.match(r"(?:[A-Z_]+=\S+ )*(?:agrpo (?:sft|reward|train|pipeline) .*|bash scripts/)", span)
    }
    whole = {span for span in found if not re.search(r"[A-Z]{4,}$|…| FILE|CONFIG", span.replace("MASTER_ADDR=…", ""))}
    assert len(whole) > 15
    for span in whole:
        read_words(Command("a line", span).words, monkeypatch)


def read_words(words, monkeypatch):
    match words:
        case ["agrpo", "quickstart", *overrides]:
            check(stages_of(Path("configs/quickstart"), overrides))
        case ["agrpo", "pipeline", configs, *overrides] | ["bash", "scripts/pipeline.sh", configs, *overrides]:
            with_vllm(monkeypatch)
            check(stages_of(Path(configs), overrides))
        case ["bash", "scripts/quickstart.sh", *overrides]:
            check(stages_of(Path("configs/quickstart"), overrides))
        case ["bash", script, *arguments] if script.startswith("stages/"):
            folder = Path(script).parent.name
            stage = folder.split("_", 1)[-1]
            resolve_stage(stage, arguments, monkeypatch)
        case ["python", "-m", "agrpo.launch", script, *arguments]:
            resolve_stage(stage_of_script(Path(script)), arguments, monkeypatch)
        case ["agrpo", ("sft" | "reward" | "train" | "preferences") as name, *arguments] if (
            "--convert" not in arguments
        ):
            resolve_stage({"train": "agrpo"}.get(name, name), arguments, monkeypatch)
        case ["bash", script, *arguments]:
            text = (ROOT / script).read_text(encoding="utf-8")
            assert all(
                argument.startswith("tests") or argument in text for argument in arguments if argument[0] == "-"
            ), words
        case ["python", "-c", code]:
            compile(code, "-c", "exec")
        case ["python", script, *arguments]:
            monkeypatch.setattr(sys, "argv", [script, *arguments])
            parsed(runpy.run_path, str(ROOT / script), None, "__main__")
        case ["taskset", "-c", _, *rest]:
            read_words(rest, monkeypatch)
        case ["pip", "install", *arguments]:
            named = [argument.replace("$(ls dist/agrpo-*.whl)", "agrpo") for argument in arguments]
            installs([one for one in named if one != "--no-deps"])
        case ["agrpo", *arguments]:
            options = read_agrpo(arguments, monkeypatch)
            if (
                options is not None
                and getattr(options, "config", None) is not None
                and arguments[0] in ("doctor", "smoke")
            ):
                with_vllm(monkeypatch)
                load_config(stage_of(options.config), options.config, getattr(options, "overrides", []))
        case ["export" | "." | "head" | "apt-get", *_] | ["pip", "wheel", *_]:
            pass
        case _:
            pytest.fail(f"nobody reads {words}")


def with_vllm(monkeypatch):
    """A configuration that samples by vLLM resolves where it is installed."""
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: sys if name == "vllm" else real(name, *rest))


def resolve_stage(stage, arguments, monkeypatch):
    """Its configuration, as the command gives it; models that a stage before would have left need not be there."""
    from agrpo.config import loading

    with_vllm(monkeypatch)
    real = loading.resolve
    monkeypatch.setattr(loading, "resolve", lambda *given, **named: real(*given, **{**named, "models_exist": False}))
    with pytest.raises(Parsed) as read:
        loading.parse_command_line(stage, arguments)
    options = read.value.args[0]
    loading.load_config(stage, options.config, options.overrides)


def read_agrpo(arguments, monkeypatch):
    mains = {"eval": "evaluate", "compare": "compare", "chat": "chat"}
    if arguments[0] in mains:
        script = ROOT / "stages" / "evaluation" / f"{mains[arguments[0]]}.py"
        parser = runpy.run_path(str(script))["parser"]()
        return parsed(parser.parse_args, arguments[1:])
    monkeypatch.setattr(sys, "argv", ["agrpo", *arguments])
    return parsed(cli.main)


def installs(wanted):
    """Requirements that a reader installs: extras that setup.cfg has, versions as in scripts/setup.sh."""
    declared = (ROOT / "setup.cfg").read_text(encoding="utf-8").partition("[options.extras_require]")[2]
    script = (ROOT / "scripts" / "setup.sh").read_text(encoding="utf-8")
    known = [Requirement(text) for text in re.findall(r'"([\w-]+(?:>=|==)[\d.,<]+)"', script)]
    for requirement in map(Requirement, wanted):
        if requirement.name == "agrpo":
            assert all(re.search(rf"^{extra} ?=", declared, re.MULTILINE) for extra in requirement.extras), requirement
        else:
            assert requirement in known, requirement


def test_the_preference_guide_shows_three_files_and_splits_the_table(reader):
    assert {path.name for path in (reader / "mine").iterdir()} == {
        "sft.yaml",
        "reward.yaml",
        "agrpo.yaml",
        "train.csv",
        "test.csv",
    }
    assert len((reader / "mine" / "train.csv").read_text().splitlines()) == 41
    assert len((reader / "mine" / "test.csv").read_text().splitlines()) == 11
