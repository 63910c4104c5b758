"""Builds the extension ``expedite_d2._C``: CPU kernels, and CUDA kernels where nvcc is found.

Everything else about the package stands in pyproject.toml. Environment variables:

    FORCE_CUDA            1: build the CUDA kernels or fail; 0: build the CPU kernels alone
    TORCH_CUDA_ARCH_LIST  architectures, e.g. "8.0;9.0+PTX"; default: see DEFAULT_ARCHS
    NVCC_FLAGS            appended to nvcc's arguments
    DEBUG                 1: no optimisation, debug symbols on host and device
    SANITIZE              1: the CPU kernels alone, with AddressSanitizer and UBSan (make sanitize)
    CXX                   the C++ compiler, a command such as "ccache g++"; default: c++
    MAX_JOBS              number of parallel compilations
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import setuptools
from setuptools.command.build_py import build_py as _build_py

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    sys.exit(
        f"expedite_d2 needs torch to build its extension ({error}). Run\n"
        "    pip install torch torchvision\n"
        "    pip install --no-build-isolation -e .\n"
        "(without --no-build-isolation pip hides the installed torch from the build)"
    )
if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(
        f"expedite_d2 needs setuptools 77 or newer, got {setuptools.__version__}. Run\n"
        "    pip install --upgrade setuptools"
    )

ROOT = Path(__file__).resolve().parent

# sm_80 also runs on sm_86 and sm_89. No binary here runs on sm_100, so PTX of sm_90 is kept for
# it: the driver translates that once. PTX of the newest serves what comes after it.
DEFAULT_ARCHS = ("80", "90+PTX")


def flag(name: str) -> bool | None:
    """Reads a 0/1 environment variable; None where it is unset or empty."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        sys.exit(f"expected the environment variable {name} to be 0 or 1, got {value!r}")
    return None if value == "" else value == "1"


def cxx_version() -> str | None:
    """Returns the first line of the C++ compiler's --version, None where it does not run."""
    # As setuptools and torch run it: a command, which may begin with a launcher and hold flags.
    try:
        command = [*shlex.split(os.environ.get("CXX", "c++")), "--version"]
        result = subprocess.run(command, capture_output=True, text=True)
    except (OSError, ValueError):  # no such program, no closing quotation mark
        return None
    return None if result.returncode else next(iter(result.stdout.splitlines()), command[0])


def require_compiler() -> None:
    """Ends with one sentence where there is no C++ compiler."""
    if cxx_version() is None:
        sys.exit(
            "expedite_d2 needs a C++ compiler to build its extension, and "
            f"{os.environ.get('CXX', 'c++')!r} does not run: install g++, or set CXX to one"
        )


def make_cxx_one_word(folder: Path) -> None:
    """Puts a script into the folder, and into CXX, where that is a command of several words.

    torch takes it for the name of one program. The folder stays the same, so that ninja finds
    what it has built before.
    """
    words = shlex.split(os.environ.get("CXX", "c++"))
    if len(words) > 1:
        folder.mkdir(parents=True, exist_ok=True)
        script = folder.resolve() / "cxx"
        script.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        script.chmod(0o755)
        # The launcher is the user's choice: torch would put ccache before it, where there is one.
        os.environ.update(CXX=str(script), TORCH_NO_COMPILER_WRAPPER="1")


def find_nvcc() -> tuple[str, str] | None:
    """Returns nvcc's path and version, or None where there is no working nvcc."""
    path = os.path.join(CUDA_HOME, "bin", "nvcc") if CUDA_HOME else None
    if path is None or not os.path.exists(path):
        return None
    text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+\.\d+)", text)
    return (path, release.group(1)) if release else None


def why_no_cuda(nvcc: tuple[str, str] | None) -> str | None:
    """Returns the reason why the CUDA kernels cannot be built here, None where they can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    if nvcc is None:
        return (
            f"no nvcc found (CUDA_HOME={CUDA_HOME}); install the CUDA {torch.version.cuda} toolkit"
        )
    # A minor difference is compatible and only draws a warning from torch.
    if nvcc[1].split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {nvcc[1]}, torch {torch.__version__} of CUDA {torch.version.cuda}"
    return None


def gencode_flags(nvcc: str) -> list[str]:
    """Returns nvcc's flags for the default architectures and the newest one that nvcc knows."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    newest = max(re.findall(r"compute_(\d+)", known), key=int, default="90")
    flags = []
    for arch in dict.fromkeys((*DEFAULT_ARCHS, f"{newest}+PTX")):
        number = arch.removesuffix("+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def toolkit_dirs(nvcc: str) -> tuple[list[str], list[str]]:
    """Returns the toolkit's folders of headers and libraries, as nvcc itself uses them.

    torch derives them from where nvcc lies, and misses them if that is a wrapper of the real one.
    """
    plan = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    flags = shlex.split(" ".join(re.findall(r"^#\$ (?:INCLUDES|LIBRARIES)=(.*)$", plan, re.M)))
    headers = [os.path.realpath(flag[2:]) for flag in flags if flag.startswith("-I")]
    libraries = [os.path.realpath(flag[2:]) for flag in flags if flag.startswith("-L")]
    return headers, libraries


def make_extension() -> setuptools.Extension:
    """Describes ``expedite_d2._C`` for this machine, and prints what was found and decided."""
    nvcc = find_nvcc()
    reason = why_no_cuda(nvcc)
    sanitize = flag("SANITIZE") or False
    if sanitize:
        reason = "SANITIZE=1 builds the CPU kernels alone"
    forced = flag("FORCE_CUDA")
    if forced and reason is not None:
        sys.exit(f"FORCE_CUDA=1 was set, but the CUDA kernels cannot be built: {reason}")
    if forced is False:
        reason = "FORCE_CUDA=0"
    with_cuda = reason is None
    debug = flag("DEBUG") or False

    # Relative paths, sorted: the same object order, hence the same binary, on every file system.
    sources = ["csrc/bindings.cpp", *sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp"))]
    cxx = ["-O0", "-g"] if debug else ["-O3", "-g0"]
    link: list[str] = []
    if sanitize:
        # vptr would look for the type information of torch's classes, which is not instrumented.
        link = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
        cxx = ["-O1", "-g", "-fno-omit-frame-pointer", "-D_GLIBCXX_ASSERTIONS", *link]
    cxx += ["-std=c++20", "-Wall", "-Wno-unknown-pragmas"]
    if sys.platform != "darwin":
        # For at::parallel_for. Compiled, not linked: torch has already loaded its own OpenMP.
        cxx += ["-fopenmp"]
    if platform.machine().lower() in ("x86_64", "amd64"):
        # x86-64-v3, never -march=native: a binary made here must run on other machines. The
        # define gives at::vec its AVX2 forms; other machines have theirs without flags.
        cxx += ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY_AVX2"]

    archs: list[str] = []
    headers: list[str] = []
    libraries: list[str] = []
    compile_args = {"cxx": cxx}
    macros = []
    if with_cuda and nvcc:
        for pattern in ("*.cpp", "*.cu"):
            sources += sorted(str(p) for p in Path("csrc/cuda").glob(pattern))
        headers, libraries = toolkit_dirs(nvcc[0])
        macros.append(("EXPEDITE_D2_WITH_CUDA", None))
        # -lineinfo maps profiles to source lines at no cost in speed. Uncompressed device code
        # lets tests/test_build.py read each kernel's use of registers and memory.
        args = ["-O0", "-g", "-G"] if debug else ["-O3", "-lineinfo"]
        args += ["-std=c++20", "-Xfatbin=-compress=false", "-Xptxas=--warn-on-spills"]
        if os.environ.get("TORCH_CUDA_ARCH_LIST"):
            archs = [os.environ["TORCH_CUDA_ARCH_LIST"]]
        else:
            archs = gencode_flags(nvcc[0])
            args += archs
        compile_args["nvcc"] = args + shlex.split(os.environ.get("NVCC_FLAGS", ""))

    print("expedite_d2: building the extension expedite_d2._C")
    for name, value in {
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda})",
        "nvcc": f"{nvcc[1]} ({nvcc[0]})" if nvcc else "not found",
        "compiler": cxx_version() or "not found",
        "CUDA kernels": "yes" if with_cuda else f"no: {reason}",
        "architectures": " ".join(a.removeprefix("-gencode=") for a in archs) or "none",
        "flags": " ".join(cxx),
        "sources": " ".join(sources),
    }.items():
        print(f"  {name + ':':<15}{value}", flush=True)

    make = CUDAExtension if with_cuda else CppExtension
    return make(
        "expedite_d2._C",
        sources,
        # Absolute, because ninja compiles from the build directory.
        include_dirs=[str(ROOT / "csrc"), *headers],
        library_dirs=libraries,
        define_macros=macros,
        extra_compile_args=compile_args,
        extra_link_args=link,
    )


class build_ext(BuildExtension):
    """Looks for the compiler before any work; what compiles nothing needs none."""

    def run(self) -> None:
        require_compiler()
        make_cxx_one_word(Path(self.build_temp))
        super().run()

    def build_extensions(self) -> None:
        # An operator's host entry and its kernels share one stem: token_match.cpp becomes
        # token_match.o, and token_match.cu, which would too, token_match.cu.o.
        name_objects = self.compiler.object_filenames

        def object_filenames(sources: list[str], *args: Any, **keywords: Any) -> list[str]:
            objects = name_objects(sources, *args, **keywords)
            return [
                f"{Path(to).with_suffix('')}.cu.o" if source.endswith(".cu") else to
                for source, to in zip(sources, objects, strict=True)
            ]

        self.compiler.object_filenames = object_filenames
        super().build_extensions()


class build_py(_build_py):
    """Puts configs/ into the wheel as expedite_d2/d2/configs, where ``find_config`` looks."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "expedite_d2" / "d2" / "configs"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / "configs", target)


if not os.environ.get("CXX"):
    # Empty is unset, which setuptools and torch take for a command without words.
    os.environ.pop("CXX", None)
setuptools.setup(
    ext_modules=[make_extension()],
    cmdclass={"build_ext": build_ext, "build_py": build_py},
)
