"""`agrpo export --gguf`: a model for llama.cpp, by llama.cpp's own converter."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from agrpo.evaluation.runs import find_model
from agrpo.types import InputError

_SCRIPT = "convert_hf_to_gguf.py"
_HOW = (
    "git clone https://github.com/ggml-org/llama.cpp, pip install gguf, and set LLAMA_CPP to that folder, or give"
    f" --converter .../{_SCRIPT}"
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="agrpo export", description=__doc__)
    parser.add_argument("model", help="a run or a folder of a model")
    parser.add_argument("out", type=Path, help="the file to write")
    parser.add_argument("--gguf", action="store_true", required=True, help="the format, so far the only one")
    parser.add_argument("--type", default="f16", help="of the numbers: f32, f16, bf16, q8_0 (default: %(default)s)")
    parser.add_argument(
        "--converter", type=Path, metavar="FILE", help=f"llama.cpp's {_SCRIPT} (default: in $LLAMA_CPP)"
    )
    options = parser.parse_args(arguments)
    try:
        script = converter(options.converter)
        model = find_model(options.model)
        if not Path(model).is_dir():
            raise InputError(f"{model}: llama.cpp converts a folder: download the model first")
        if options.out.exists():
            raise InputError(f"{options.out}: exists; name a file that is not there yet")
        return export(script, Path(model), options.out, options.type)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def converter(given: Path | None) -> Path:
    """llama.cpp's script: the one given, of the folder LLAMA_CPP, or on the PATH.

    Raises:
        InputError: there is none; says what to install.
    """
    if given is not None:
        if not given.is_file():
            raise InputError(f"--converter {given}: no such file; {_HOW}")
        return given
    folder, on_path = os.environ.get("LLAMA_CPP"), shutil.which(_SCRIPT)
    for found in (Path(folder) / _SCRIPT if folder else None, Path(on_path) if on_path else None):
        if found is not None and found.is_file():
            return found
    raise InputError(f"a GGUF file is written by llama.cpp's {_SCRIPT}, which is not here: {_HOW}")


def export(script: Path, model: Path, out: Path, kind: str) -> int:
    """Run the converter; its exit code."""
    command = [sys.executable, str(script), str(model), "--outfile", str(out), "--outtype", kind]
    return subprocess.run(command, check=False).returncode
