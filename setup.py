"""The wheel carries the folders `stages` and `configs` inside the package; all else is in setup.cfg."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithFolders(build_py):
    def run(self) -> None:
        if self.editable_mode:
            return super().run()  # a checkout has them beside the package
        shutil.rmtree(self.build_lib, ignore_errors=True)  # what an earlier build left, deleted since
        super().run()
        for name in ("stages", "configs"):
            shutil.copytree(
                name, Path(self.build_lib, "agrpo", name), ignore=shutil.ignore_patterns("__pycache__", "*.sh", "*.md")
            )


setup(cmdclass={"build_py": WithFolders})
