"""Puts what the package reads of the project into its wheel, so that an installed package works without a clone."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PARTS = ("profiles", "book/claims.yaml", "book/paper_tables.yaml")


class WithProject(build_py):
    def run(self):
        super().run()
        if self.editable_mode:  # a clone has them beside the package
            return
        shutil.rmtree(Path(self.build_lib, "lorapar_utils", "project"), ignore_errors=True)
        for part in map(Path, PARTS):
            target = Path(self.build_lib, "lorapar_utils", "project", part)
            target.parent.mkdir(parents=True, exist_ok=True)
            if part.is_dir():
                shutil.copytree(part, target)
            else:
                shutil.copy(part, target)


setup(cmdclass={"build_py": WithProject})
