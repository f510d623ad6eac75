"""Compiles the kernels for couplings, where there is a compiler; pyproject.toml has all else."""

import platform
import sys
import zlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path("skaipo/flows/_frozen")
SOURCES = [HERE / "_couplings.cpp", HERE / "_couplings.h"]
# The library says which sources it is of: see skaipo/flows/_frozen/_native.py.
CHECKSUM = zlib.crc32(b"".join(path.read_bytes() for path in SOURCES))

# Not a Python module: it is loaded by ctypes, needs no header of Python's, and one of these serves
# every processor. Without it everything works, more slowly.
couplings = Extension(
    "skaipo.flows._frozen._couplings",
    [str(SOURCES[0])],
    depends=[str(SOURCES[1])],
    define_macros=[("SKAIPO_CHECKSUM", f"{CHECKSUM}u")],
    extra_compile_args=[
        "-std=c++17",
        "-O3",
        "-g0",
        "-fopenmp",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fno-fast-math",
        "-Wno-psabi",
        # Or, for some processors, blocks of one shape would round twice and others once.
        *(["--param=avoid-fma-max-bits=0"] if platform.machine() == "x86_64" else []),
    ],
    extra_link_args=["-fopenmp"],
    language="c++",
    optional=True,
)


class BuildLibrary(build_ext):
    """Under a name that Python does not take for a module's."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + ".native.so"


setup(
    ext_modules=[couplings] if sys.platform == "linux" else [],
    cmdclass={"build_ext": BuildLibrary},
)
