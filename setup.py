"""The wheel carries the folders `stages` and `configs` inside the package; all else is in setup.cfg."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithFolders(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return  # a checkout has them beside the package
        for name in ("stages", "configs"):
            to = Path(self.build_lib, "agrpo", name)
            shutil.rmtree(to, ignore_errors=True)
            shutil.copytree(name, to, ignore=shutil.ignore_patterns("__pycache__", "*.sh", "*.md"))


setup(cmdclass={"build_py": WithFolders})
