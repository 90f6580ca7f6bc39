"""The `agrpo` command: thin. Each stage is the script that `stages/*/run.sh` runs, with the same arguments."""

from __future__ import annotations

import importlib
import sys

from agrpo.places import own_folder

_STAGES = {
    "sft": "stage1_sft/main.py",
    "preferences": "stage2_reward/preferences.py",
    "reward": "stage2_reward/main.py",
    "train": "stage3_agrpo/main.py",
}
_TOOLS = {
    "merge": "agrpo.merge",
    "push": "agrpo.reporting.hub",
    "export": "agrpo.export",
    "smoke": "agrpo.smoke.command",
    "pipeline": "agrpo.pipeline",
    "ablate": "agrpo.ablation.command",
}
_MEASURES = {"eval": "evaluation/evaluate.py", "compare": "evaluation/compare.py"}
_USAGE = """usage: agrpo COMMAND …

  quickstart   the three stages, on a CPU           [key.path=value …]
  pipeline     the stages of a folder, in sequence  CONFIGS [key.path=value …]
  sft          stage 1: supervised fine-tuning      [--config FILE] [key.path=value …] [--print-config]
  preferences  groups for stage 2, sampled          the same
               or from published data               --convert gsm8k|hh IN OUT [--held-out SHARE] [--json]
  reward       stage 2: a reward model              the same
  train        stage 3: policy optimisation         the same
  ablate       a grid of settings, seeds, methods   GRID [key.path=value …] [--jobs N] [--plan] [--json]
  eval         pass@1, pass@k, maj@k of a model     --model RUN|DIR|ID --benchmark NAME | --data FILE [--help]
  compare      which of two models is better        A B --data FILE --reward TARGET [--help]
  chat         talk to a model                      RUN|DIR|ID [--compare OTHER] [--samples N] [--reward TARGET]
  merge        a whole model of LoRA's adapters     RUN|ADAPTER OUT
  push         a model to the Hub, private          RUN|DIR OWNER/NAME [--public]
  export       a model for llama.cpp                --gguf RUN|DIR OUT.gguf
  summary      what a run measured                  DIR [--json]
  plot         a run's curves, several runs' too    DIR… [--dynamics] [--out PNG]
  report       one HTML file of a run, or several   DIR… [--out HTML] [--serve [--port N]]
  serve-reward rewards for runs elsewhere           --config FILE [--host H] [--port N]
  serve-rollout  sampling for runs elsewhere        --model DIR [--backend native|vllm] [--host H] [--port N]
  doctor       what works on this machine           [--config FILE] [key.path=value …] [--stage STAGE] [--json]
  benchmark    what a step costs here               step|parts|growth [--json FILE] …
  smoke        a configuration in seconds           --config FILE [key.path=value …] [--out DIR] [--steps N]
  theory       how far training can move a prompt   --beta B --group-size G|inf [--pass-rate Q] [--plot FILE] [--json]
"""


def main() -> int:
    command, *arguments = sys.argv[1:] or ["--help"]
    if command == "quickstart":
        command, arguments = "pipeline", ["configs/quickstart", *arguments]
    if command == "preferences" and any(argument.startswith("--convert") for argument in arguments):
        from agrpo.data.convert import main as convert
        from agrpo.reporting.files import replace

        return convert(arguments, write=replace)
    if command in _STAGES:
        from agrpo.launch import main as launch

        return launch([str(own_folder("stages") / _STAGES[command]), *arguments])
    if command in _MEASURES:
        from agrpo.launch import main as launch

        return launch([str(own_folder("stages") / _MEASURES[command]), *arguments], check=lambda arguments: None)
    if command in _TOOLS:
        return importlib.import_module(_TOOLS[command]).main(arguments)
    if command == "summary":
        from agrpo.reporting.summary import main as summary

        return summary(arguments)
    if command == "plot":
        from agrpo.reporting.plots import main as plot

        return plot(arguments)
    if command == "report":
        from agrpo.reporting.report.command import main as report

        return report(arguments)
    if command == "serve-reward":
        import runpy

        sys.argv = ["agrpo serve-reward", *arguments]
        runpy.run_module("reward_models.server", run_name="__main__", alter_sys=True)  # exits; rewards stand above us
    if command == "serve-rollout":
        from agrpo.types import InputError

        try:
            from agrpo.rollout_server import main as serve_rollout
        except InputError as error:  # an extra that is not installed
            print(f"error: {error}", file=sys.stderr)
            return 2
        return serve_rollout(arguments)
    if command == "chat":
        import runpy

        sys.argv = ["agrpo chat", *arguments]
        runpy.run_path(str(own_folder("stages") / "evaluation" / "chat.py"), run_name="__main__")  # exits
    if command == "doctor":
        from agrpo.doctor.command import main as doctor

        return doctor(arguments)
    if command == "benchmark":
        from agrpo.benchmark.command import main as benchmark

        return benchmark(arguments)
    if command == "theory":
        from agrpo.theory import main as theory

        return theory(arguments)
    print(_USAGE, end="", file=sys.stdout if command in ("-h", "--help") else sys.stderr)
    return 0 if command in ("-h", "--help") else 2


if __name__ == "__main__":
    raise SystemExit(main())
