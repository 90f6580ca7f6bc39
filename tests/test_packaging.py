"""The wheel, built from the source distribution and installed elsewhere: it is whole, and runs from any folder."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
import yaml
from stage_runs import ROOT, TINY, environment

NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv", "runs", "site", "build", "models", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
)


def call(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(the unpacked source distribution, the wheel that was built from it)."""
    folder = tmp_path_factory.mktemp("packaging")
    shutil.copytree(ROOT, folder / "tree", ignore=NOT_SOURCE, symlinks=True)
    make = "from setuptools.build_meta import build_sdist; build_sdist('../out')"
    (folder / "out").mkdir()
    call(sys.executable, "-c", make, cwd=folder / "tree")
    (archive,) = (folder / "out").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    (source / "build" / "lib" / "agrpo").mkdir(parents=True)
    (source / "build" / "lib" / "agrpo" / "stale.py").touch()  # of an earlier build
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    call(*pip, "--wheel-dir", str(folder / "out"), str(source))
    (wheel,) = (folder / "out").glob("*.whl")
    return source, wheel


def files(folder, *patterns):
    return {str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / folder).rglob(pattern)}


def test_the_source_distribution_has_what_a_checkout_has(built):
    source, _ = built
    wanted = files("agrpo", "*.py") | files("stages", "*") | files("configs", "*.yaml") | files("scripts", "*")
    wanted |= (
        files("docs", "*.md", "*.csv") | files("tests", "*.py") | {"mkdocs.yml", "ruff.toml", ".ci/run", "LICENSE"}
    )
    missing = {name for name in wanted if "__pycache__" not in name and not (source / name).exists()}
    assert not missing


def test_the_wheel_has_stages_and_configurations_inside_the_package(built):
    names = set(zipfile.ZipFile(built[1]).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"agrpo", "reward_models"}
    modules = files("agrpo", "*.py") | files("reward_models", "*.py")
    pages = files("agrpo", "*.html", "*.css", "*.js")
    beside = {f"agrpo/{name}" for name in files("stages", "*.py") | files("configs", "*.yaml")}
    assert modules and pages and len(beside) > 50
    assert not (modules | pages | beside) - names
    assert not [name for name in names if name.endswith((".pyc", ".sh", "/stale.py")) or "/tests/" in name]


@pytest.fixture(scope="module")
def elsewhere(built, tmp_path_factory):
    """Runs the installed `agrpo` in a folder that has nothing of the checkout."""
    folder = tmp_path_factory.mktemp("elsewhere")
    site = folder / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    call(*pip, str(built[1]))
    (folder / "work").mkdir()

    def run(*arguments):
        return call(
            *(sys.executable, str(site / "bin" / "agrpo"), *arguments),
            cwd=folder / "work",
            env={**environment(), "PYTHONPATH": str(site)},
        )

    run.site, run.folder = site, folder / "work"
    return run


def test_a_configuration_of_ours_is_found_by_its_name_and_told_of(elsewhere):
    done = elsewhere("train", "--config", "configs/qwen2.5-0.5b-gsm8k/agrpo-cpu.yaml", "--print-config")
    assert yaml.safe_load(done.stdout)["run"]["name"].startswith("qwen2.5-0.5b-gsm8k")
    own = elsewhere.site / "agrpo" / "configs" / "qwen2.5-0.5b-gsm8k" / "agrpo-cpu.yaml"
    assert f"configs/qwen2.5-0.5b-gsm8k/agrpo-cpu.yaml is not here; reading agrpo's own: {own}" in done.stderr


def test_a_stage_of_the_quickstart_runs_from_there(elsewhere):
    elsewhere("sft", "run.name=wheel", *TINY["sft"], "training.max_steps=1")
    run = elsewhere.folder / "runs" / "wheel"
    assert (run / "sft" / "model" / "model.safetensors").exists()
    assert os.listdir(elsewhere.folder) == ["runs"]
    assert "sft" in elsewhere("summary", str(run), "--json").stdout
