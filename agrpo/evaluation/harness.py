"""lm-evaluation-harness on a model of ours, in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from agrpo.types import InputError


def run_harness(model: str, tasks: str, arguments: str, json_file: str | None) -> int:
    """Have lm_eval measure the model; its exit code.

    Args:
        tasks: names, separated by commas.
        arguments: further ones of lm_eval, such as "--include_path mine --limit 20".
        json_file: where its results go too, - for standard output.

    Raises:
        InputError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("--lm-eval: lm-evaluation-harness is not installed: pip install 'agrpo[eval]'")
    with tempfile.TemporaryDirectory() as folder:
        options = ["--model", "hf", "--model_args", f"pretrained={model}", "--tasks", tasks, "--output_path", folder]
        command = [sys.executable, "-m", "lm_eval", *options, *shlex.split(arguments)]
        code = subprocess.run(command, check=False).returncode
        if code == 0 and json_file is not None:
            text = json.dumps(_results(Path(folder)), indent=1) + "\n"
            sys.stdout.write(text) if json_file == "-" else Path(json_file).write_text(text, encoding="utf-8")
    return code


def _results(folder: Path) -> dict[str, Any]:
    (file,) = folder.rglob("results*.json")
    return json.loads(file.read_text(encoding="utf-8"))["results"]
