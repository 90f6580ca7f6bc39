"""Faults of one process and of several: a short fault campaign, memory that runs out, a disk that is full, secrets."""

import re
import subprocess
import sys

import pytest
from stage_runs import LENGTH_REWARD, ROOT, environment, tiny, tiny_policy

NO_TESTS = ["evaluation.data=null", "evaluation.test=null"]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return tiny_policy(tmp_path_factory.mktemp("start") / "model")


def python(*arguments, **more):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**environment(), **more},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_a_short_fault_campaign(tmp_path):
    table = tmp_path / "table.md"
    parts = ["exact", "exact_alone", "kills", "flips", "poisons", "full_disk", "memory"]
    done = python("tests/chaos.py", "--short", "--table", table, "--only", *parts)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    counts = re.findall(r"\| (\d+)/(\d+) \|", table.read_text(encoding="utf-8"))
    assert len(counts) == 8 and all(passed == of for passed, of in counts)


def test_a_signal_to_run_sh_while_two_ranks_work_saves_and_the_resumed_run_is_the_same():
    done = python("tests/chaos.py", "--short", "--only", "terms")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


SECRET, HIDDEN = "sk-correct-horse-battery", "hf-staple-of-the-environment"


def test_no_artefact_and_no_output_holds_a_secret(policy, tmp_path):
    reward = f"{{target: secretive_reward.by_length, api_key: {SECRET}, url: 'https://me:{SECRET}@example.org/v1'}}"
    own = [f"model.name_or_path={policy}", *NO_TESTS, f"rewards=[{reward}]", "training.max_steps=2"]
    arguments = [*tiny("agrpo", tmp_path / "run", *own), "checkpoint.every=1"]
    done = subprocess.run(
        [sys.executable, "-m", "agrpo.launch", "stages/stage3_agrpo/main.py", *arguments],
        cwd=ROOT,
        env={**environment(), "HF_TOKEN": HIDDEN, "OPENAI_API_KEY": HIDDEN},
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"config.yaml", "state.json", "log.txt", "metrics.jsonl"} <= {path.name for path in files}
    held = [path.read_bytes() for path in files] + [done.stdout, done.stderr]
    for secret in (SECRET, HIDDEN):
        assert not any(secret.encode() in content for content in held)
    assert any("…redacted…".encode() in content for content in held)


def test_a_full_disk_at_the_end_is_one_message(policy, tmp_path):
    """A limit on the size of files stands for the disk: the model does not fit."""
    own = [f"model.name_or_path={policy}", *NO_TESTS, LENGTH_REWARD, "training.max_steps=1"]
    limited = "import resource, runpy, signal, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000));"
    limited += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); sys.argv = ['launch', *sys.argv[1:]];"
    limited += "runpy.run_module('agrpo.launch', run_name='__main__', alter_sys=True)"
    done = python("-c", limited, "stages/stage3_agrpo/main.py", *tiny("agrpo", tmp_path / "run", *own))
    assert done.returncode == 1
    assert "the disk is full" in done.stderr and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert not (tmp_path / "run" / "agrpo" / "model").exists()


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", "..", ".", "", "-rf", ".hidden"])
def test_run_names_stay_inside_their_directory(name, tmp_path):
    from agrpo.config import load_config
    from agrpo.yaml_input import ConfigError

    with pytest.raises(ConfigError, match=r"run\.name"):
        load_config("sft", overrides=[f"run.name={name!r}"])


def test_a_yaml_file_cannot_make_objects(tmp_path):
    from agrpo.yaml_input import ConfigError, read_yaml

    (tmp_path / "c.yaml").write_text("run: !!python/object/apply:os.system ['touch ran']\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="not YAML"):
        read_yaml(tmp_path / "c.yaml")
