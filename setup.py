"""Adds what is compiled, the CPU engine and loops of the converter; the rest of the build is in pyproject.toml."""

import importlib.util
import platform
import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

_PACKAGE = Path("vllm_puzzle", "kernels", "cpu")
_MERGING = Path("vllm_puzzle", "offline", "merging")
_CODING = Path("vllm_puzzle", "offline", "coding")


def _load_builder():
    # By path: importing the package would need torch, which an isolated build does not have.
    spec = importlib.util.spec_from_file_location("_puzzlemoe_build", _PACKAGE / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildCpuEngine(Command):
    """Compiles the libraries, into the source tree for an editable install and into the wheel otherwise."""

    user_options: ClassVar = []

    def initialize_options(self):
        self.build_lib = None
        self.editable_mode = False

    def finalize_options(self):
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self):
        if sys.platform != "linux" or platform.machine() != "x86_64":
            self.announce("The CPU engine is for Linux on x86-64 and is left out here.", level=3)
            return
        builder = _load_builder()
        root = Path() if self.editable_mode else Path(self.build_lib)
        try:
            builder.build_library(root / _PACKAGE / builder.LIBRARY_NAME)
            builder.build_packing(_MERGING / "packing.cpp", root / _MERGING / builder.PACKING_NAME)
            builder.build_coding(_CODING / "coding.cpp", root / _CODING / builder.CODING_NAME)
        except builder.BuildError as error:
            raise SystemExit(str(error)) from None

    def get_source_files(self):
        loops = (_MERGING / "packing.cpp", _CODING / "coding.cpp")
        return [*sorted(map(str, (_PACKAGE / "csrc").iterdir())), *map(str, loops)]

    def get_outputs(self):
        builder, root = _load_builder(), Path(self.build_lib)
        loops = (_MERGING / builder.PACKING_NAME, _CODING / builder.CODING_NAME)
        return [str(root / _PACKAGE / builder.LIBRARY_NAME), *(str(root / loop) for loop in loops)]

    def get_output_mapping(self):
        return {}


class BuildWithCpuEngine(build):
    sub_commands: ClassVar = [*build.sub_commands, ("build_cpu_engine", None)]


class PlatformDistribution(Distribution):
    def has_ext_modules(self):
        return True


class PlatformWheel(bdist_wheel):
    def get_tag(self):
        # Bound to the platform, but through ctypes: any Python will do.
        return "py3", "none", super().get_tag()[2]


setup(
    distclass=PlatformDistribution,
    cmdclass={"build": BuildWithCpuEngine, "build_cpu_engine": BuildCpuEngine, "bdist_wheel": PlatformWheel},
)
