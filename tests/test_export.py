"""GGUF by llama.cpp's own converter; without it, what to install."""

import json
import os
from pathlib import Path

import pytest
from stage_runs import tiny_policy

from agrpo.export import converter, main
from agrpo.types import InputError


def test_without_the_converter_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["--gguf", str(tmp_path), str(tmp_path / "out.gguf")]) == 2
    assert "llama.cpp" in capsys.readouterr().err
    with pytest.raises(InputError, match="--converter"):
        converter(tmp_path / "nowhere.py")


def test_the_converter_is_given_the_model_and_its_exit_code_is_kept(tmp_path, monkeypatch):
    model = tiny_policy(tmp_path / "model")
    (tmp_path / "llama.cpp").mkdir()
    script = tmp_path / "llama.cpp" / "convert_hf_to_gguf.py"
    script.write_text(
        f"import json, sys\njson.dump(sys.argv[1:], open({str(tmp_path / 'asked')!r}, 'w'))\nsys.exit(3)\n"
    )
    monkeypatch.setenv("LLAMA_CPP", str(script.parent))
    assert main(["--gguf", str(model), str(tmp_path / "out.gguf"), "--type", "q8_0"]) == 3
    asked = json.loads((tmp_path / "asked").read_text())
    assert asked == [str(model), "--outfile", str(tmp_path / "out.gguf"), "--outtype", "q8_0"]


@pytest.mark.skipif(not Path(os.environ.get("LLAMA_CPP", "/nowhere")).is_dir(), reason="LLAMA_CPP names no llama.cpp")
def test_llama_cpps_own_converter_writes_a_gguf(tmp_path):
    assert main(["--gguf", str(tiny_policy(tmp_path / "model")), str(tmp_path / "out.gguf")]) == 0
    assert (tmp_path / "out.gguf").read_bytes()[:4] == b"GGUF"
