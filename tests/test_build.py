"""What setup.py builds, and what it says where it cannot."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch
from setuptools import dist
from setuptools._distutils import ccompiler
from torch.utils import cpp_extension

from expedite_d2 import _ext

ROOT = Path(__file__).resolve().parents[1]
OPERATORS = [
    "token_spread",
    "token_cluster",
    "token_match",
    "token_reduce",
    "token_reconstruct",
    "token_merge",
    "token_pool",
    "ms_deform_attn",
    "_ms_deform_attn_backward",
]
# What a block may have without asking the driver; the kernels ask for more only at run time.
STATIC_SHARED_MEMORY = 48 * 1024


def run_setup(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *args],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def nvcc() -> str:
    """nvcc's path, where the extension must have CUDA kernels."""
    if torch.version.cuda is None:
        pytest.skip("torch is not a CUDA build")
    home = cpp_extension.CUDA_HOME
    path = os.path.join(home, "bin", "nvcc") if home else None
    if path is None or not os.path.exists(path):
        pytest.skip("no nvcc")
    version = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)", version)
    if release is None or release.group(1) != torch.version.cuda.split(".")[0]:
        pytest.skip("nvcc and torch are of different CUDA versions")
    if os.environ.get("FORCE_CUDA") == "0":
        pytest.skip("FORCE_CUDA=0")
    return path


def built_with_cuda() -> None:
    if _ext.build_info()["cuda"] is None:
        pytest.skip("the extension was built without CUDA")


def test_extension_loads():
    assert _ext.has_ext(), _ext.ext_error()


@pytest.mark.parametrize("operator", OPERATORS)
def test_dispatcher_holds_kernels_for_all_built_devices(operator):
    keys = ["CPU"] if _ext.build_info()["cuda"] is None else ["CPU", "CUDA"]
    for key in keys:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"expedite_d2::{operator}", key)


def test_cuda_is_built_for_the_default_architectures():
    path = nvcc()
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        pytest.skip("TORCH_CUDA_ARCH_LIST is set")
    info = _ext.build_info()
    assert info["cuda"] is not None, "nvcc and a CUDA torch are here: build the extension again"
    known = subprocess.run([path, "--list-gpu-arch"], capture_output=True, text=True).stdout
    newest = max(re.findall(r"compute_(\d+)", known), key=int)
    assert {"sm_80", "sm_90", f"sm_{newest}"} <= set(info["archs"])


class Cubin:
    """The device code for one architecture: an ELF file of machine 190 inside the module."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        (table,) = struct.unpack_from("<Q", data, 40)
        size, count, names = struct.unpack_from("<HHH", data, 58)
        headers = [struct.unpack_from("<IIQQQQIIQQ", data, table + i * size) for i in range(count)]
        # Section -> (offset, size in memory, type).
        start = headers[names][4]
        self.sections = {self.text(start + h[0]): (h[4], h[5], h[1]) for h in headers}

    def text(self, at: int) -> str:
        return self.data[at : self.data.index(b"\0", at)].decode()

    def frames(self) -> Iterator[tuple[str, int]]:
        """Bytes of stack that each function has: what was spilled, and arrays in local memory."""
        if ".nv.info" not in self.sections:  # a file without kernels
            return
        symbols, strings = self.sections[".symtab"][0], self.sections[".strtab"][0]
        at, size, _ = self.sections[".nv.info"]
        end = at + size
        while at < end:
            form, attribute, length = struct.unpack_from("<BBH", self.data, at)
            at += 4
            if form == 4:  # the value follows; in the other forms it is `length` itself
                if attribute == 0x11:  # EIATTR_FRAME_SIZE
                    symbol, frame = struct.unpack_from("<II", self.data, at)
                    (name,) = struct.unpack_from("<I", self.data, symbols + 24 * symbol)
                    yield self.text(strings + name), frame
                at += length


def cubins() -> list[Cubin]:
    assert _ext._module is not None and _ext._module.__file__ is not None
    module = Path(_ext._module.__file__).read_bytes()
    starts = [m.start() for m in re.finditer(b"\x7fELF", module)]
    return [Cubin(module[i:]) for i in starts if struct.unpack_from("<H", module, i + 18)[0] == 190]


def test_kernels_spill_no_registers():
    built_with_cuda()
    images = cubins()
    frames = [frame for image in images for frame in image.frames()]
    assert any("kernel" in name for name, _ in frames), "no kernels found in the binary"
    # One image a source file and architecture.
    assert len(images) % len(_ext.build_info()["archs"]) == 0
    assert [frame for frame in frames if frame[1] != 0] == []


def test_kernels_fit_into_the_shared_memory_of_every_card():
    built_with_cuda()
    sizes = {
        name: size
        for image in cubins()
        for name, (_, size, _) in image.sections.items()
        if name.startswith(".nv.shared.") and "reserved" not in name
    }
    assert sizes
    assert {name: size for name, size in sizes.items() if size > STATIC_SHARED_MEMORY} == {}


def test_setup_without_torch_names_the_commands():
    code = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path('setup.py')"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "pip install torch torchvision\n" in result.stderr
    assert "pip install --no-build-isolation -e ." in result.stderr
    assert "Traceback" not in result.stderr


def test_setup_without_nvcc_builds_the_cpu_part_and_says_what_is_missing():
    result = run_setup("--version", CUDA_HOME="/nonexistent", FORCE_CUDA="")
    assert result.returncode == 0
    assert re.search(
        r"CUDA kernels: +no: (no nvcc found|torch .* is not a CUDA build)", result.stdout
    )
    assert "csrc/cuda" not in result.stdout


def test_forced_cuda_without_nvcc_is_one_sentence():
    result = run_setup("--version", CUDA_HOME="/nonexistent", FORCE_CUDA="1")
    assert result.returncode == 1
    assert "FORCE_CUDA=1 was set, but the CUDA kernels cannot be built: " in result.stderr
    assert "Traceback" not in result.stderr


def test_wrong_switch_is_one_sentence():
    result = run_setup("--version", FORCE_CUDA="yes")
    assert result.returncode == 1
    expected = "expected the environment variable FORCE_CUDA to be 0 or 1, got 'yes'"
    assert expected in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def setup_script() -> Iterator[dict[str, Any]]:
    """What setup.py defines, without its building anything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("FORCE_CUDA", "0")
        patch.setattr(setuptools, "setup", lambda **keywords: None)
        yield runpy.run_path("setup.py")


def test_host_entry_and_kernels_of_one_stem_become_two_objects(setup_script, monkeypatch):
    monkeypatch.setattr(cpp_extension.BuildExtension, "build_extensions", lambda self: None)
    command = setup_script["build_ext"](dist.Distribution())
    command.compiler = ccompiler.new_compiler()
    command.compiler.src_extensions += [".cu"]  # as torch does
    command.build_extensions()
    sources = sorted(str(p) for p in Path("csrc").rglob("*.c*") if p.suffix in (".cpp", ".cu"))
    objects = command.compiler.object_filenames(sources, output_dir="build")
    assert len(set(objects)) == len(sources)
    assert "build/csrc/cuda/token_match.o" in objects
    assert "build/csrc/cuda/token_match.cu.o" in objects


@pytest.mark.parametrize("cxx", ["g++", "g++ -m64", "env g++", "env -u NOTHING g++ -m64", "'g++'"])
def test_compiler_may_be_a_command_of_several_words(cxx, setup_script, monkeypatch):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    monkeypatch.setenv("CXX", cxx)
    assert re.search(r"\d+\.\d+", setup_script["cxx_version"]())


@pytest.mark.parametrize("cxx", ["g++ -m64", "env g++", "env -u NOTHING g++ -DNAME='a b'"])
def test_compiler_of_several_words_becomes_one_program(cxx, setup_script, tmp_path, monkeypatch):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    monkeypatch.setenv("CXX", cxx)
    monkeypatch.delenv("TORCH_NO_COMPILER_WRAPPER", raising=False)
    expected = setup_script["cxx_version"]()
    setup_script["make_cxx_one_word"](tmp_path / "temp")
    program = cpp_extension.get_cxx_compiler()
    assert Path(program).is_file() and setup_script["cxx_version"]() == expected
    assert cpp_extension.check_compiler_ok_for_platform(program)
    source = tmp_path / "empty.cpp"
    source.write_text("int main() {}")
    subprocess.run([program, "-c", str(source), "-o", str(tmp_path / "empty.o")], check=True)


@pytest.mark.parametrize("cxx", ["/nowhere/g++", "env /nowhere/g++", "false", "'g++", "g++\\"])
def test_build_without_a_compiler_is_one_sentence(cxx, setup_script, monkeypatch):
    monkeypatch.setenv("CXX", cxx)
    assert setup_script["cxx_version"]() is None
    with pytest.raises(SystemExit, match=re.escape(f"{cxx!r} does not run: install g++, or set")):
        setup_script["require_compiler"]()


def test_build_with_an_empty_cxx_looks_for_the_default(tmp_path):
    nothing = {"CXX": "", "PATH": str(tmp_path), "FORCE_CUDA": "0"}
    result = run_setup("build_ext", "--build-lib", str(tmp_path), **nothing)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("expedite_d2 needs a C++ compiler")
    assert "'c++' does not run" in result.stderr and "Traceback" not in result.stderr


def test_what_compiles_nothing_needs_no_compiler():
    result = run_setup("--version", CXX="/nowhere/g++", FORCE_CUDA="0")
    assert (result.returncode, result.stdout.splitlines()[-1]) == (0, "0.1.0"), result.stderr
    assert re.search(r"compiler: +not found", result.stdout)


def files_below(folder: Path, *suffixes: str) -> set[str]:
    found = (p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {str(p.relative_to(folder)) for p in found if not suffixes or p.suffix in suffixes}


def test_wheel_holds_configs_weights_and_data(tmp_path):
    # The Python part of a wheel, without compiling.
    result = run_setup("build_py", "--build-lib", str(tmp_path), FORCE_CUDA="0")
    assert result.returncode == 0, result.stderr
    package = tmp_path / "expedite_d2"
    assert files_below(ROOT / "configs") == files_below(package / "d2/configs")
    kinds = (".py", ".html", ".pth", ".safetensors", ".json", ".txt")
    expected = files_below(ROOT / "expedite_d2", *kinds)
    assert expected <= files_below(package)
    assert not files_below(package, ".so", ".pyc")


@pytest.mark.slow
def test_source_distribution_holds_what_the_build_needs(tmp_path):
    result = run_setup(
        *("egg_info", "--egg-base", str(tmp_path)),
        *("sdist", "--dist-dir", str(tmp_path)),
        FORCE_CUDA="0",
    )
    assert result.returncode == 0, result.stderr
    shutil.unpack_archive(next(tmp_path.glob("*.tar.gz")), tmp_path / "unpacked")
    (source,) = (tmp_path / "unpacked").iterdir()
    assert files_below(ROOT / "csrc") == files_below(source / "csrc")
    assert files_below(ROOT / "configs") == files_below(source / "configs")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "train_net.py"):
        assert (source / name).is_file()
