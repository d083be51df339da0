"""setup.py: which compiler it takes, what PGOLF_CUDA means, and what a wheel holds."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from setuptools import Distribution, Extension
from setuptools.errors import ExecError

ROOT = Path(__file__).parent.parent
MODULE = """#include <pybind11/pybind11.h>
PYBIND11_MODULE(_native, m) {
#ifdef PGOLF_CUDA
  m.attr("cuda") = true;
#else
  m.attr("cuda") = false;
#endif
}
"""


@pytest.fixture
def build(tmp_path, monkeypatch):
    """setup.py as a module, with a tiny csrc in a folder whose name has a space, and no variables of the user's."""
    spec = importlib.util.spec_from_file_location("pgolf_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    csrc = tmp_path / "a folder" / "csrc"
    (csrc / "kernel").mkdir(parents=True)
    (csrc / "bindings.cpp").write_text(MODULE)
    (csrc / "kernel" / "kernel.cu").write_text("")
    monkeypatch.setattr(module, "CSRC", csrc)
    for name in ("PGOLF_CUDA", "PGOLF_CUDA_ARCHS", "PGOLF_CXXFLAGS", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PGOLF_CXXFLAGS", "-O0")  # quick to compile
    monkeypatch.chdir(tmp_path)
    return module


def run_build(module, folder: Path) -> Path:
    """Runs build_ext and returns the native module's file."""
    extension = Extension("pgolf_kernels._native", sources=[])
    command = module.NinjaBuild(Distribution({"name": "x", "ext_modules": [extension]}))
    command.build_lib, command.build_temp = str(folder / "lib"), str(folder / "a folder" / "temp")
    command.ensure_finalized()
    command.run()
    return Path(command.get_ext_fullpath(extension.name))


def built_with_cuda(path: Path) -> str:
    script = "import sys; sys.path.insert(0, sys.argv[1]); import _native; print(_native.cuda)"
    done = subprocess.run([sys.executable, "-c", script, str(path.parent)], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def fake_toolkit(folder: Path, *, compiles: bool) -> Path:
    """A CUDA_HOME whose nvcc is a script: it names its folder, and compiles with c++ or fails."""
    (folder / "bin").mkdir(parents=True)
    (folder / "lib").mkdir()
    (folder / "include").mkdir()
    # An empty archive that the linker accepts.
    (folder / "lib" / "libcudart_static.a").write_bytes(b"!<arch>\n")
    compile_line = (
        f'{shutil.which("c++")} -x c++ -fPIC -c "$in" -o "$out"' if compiles else "echo 'nvcc: no licence'; exit 2"
    )
    script = f"""#!/bin/sh
if [ "$1" = --dryrun ]; then echo '#$ TOP={folder}/bin/..' >&2; exit 0; fi
while [ $# -gt 0 ]; do case "$1" in -c) in=$2 ;; -o) out=$2 ;; esac; shift; done
{compile_line}
"""
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(script)
    nvcc.chmod(0o755)
    return folder


def test_cpu_build_in_a_folder_with_a_space(build, tmp_path, monkeypatch):
    monkeypatch.setenv("PGOLF_CUDA", "0")
    monkeypatch.setattr(build, "find_nvcc", lambda: pytest.fail("PGOLF_CUDA=0 looked for nvcc"))
    assert built_with_cuda(run_build(build, tmp_path)) == "False"


def test_checkout_finds_the_module_after_an_ordinary_install(build, tmp_path, monkeypatch):
    """`pip install .` builds under build/lib*; the tests import the checkout's packages. Other folders are left alone,
    and so is a module that was built in place."""
    monkeypatch.setenv("PGOLF_CUDA", "0")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    beside = tmp_path / "pgolf_kernels"
    beside.mkdir()
    run_build(build, tmp_path / "elsewhere")
    assert list(beside.iterdir()) == []
    for _ in range(2):
        output = run_build(build, tmp_path / "build")
        (link,) = beside.iterdir()
        assert link.is_symlink() and link.resolve() == output.resolve()
    link.unlink()
    link.write_bytes(b"built in place")
    run_build(build, tmp_path / "build")
    assert link.read_bytes() == b"built in place"


def test_auto_compiles_cuda_with_the_nvcc_of_cuda_home(build, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "cuda", compiles=True)))
    assert built_with_cuda(run_build(build, tmp_path)) == "True"


def test_auto_falls_back_loudly(build, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "cuda", compiles=False)))
    assert built_with_cuda(run_build(build, tmp_path)) == "False"
    output, errors = capfd.readouterr()
    assert "nvcc: no licence" in output
    assert "Building WITHOUT CUDA" in errors


@pytest.mark.parametrize("archs", ["sm_90", ""])
def test_a_mistaken_list_of_architectures_builds_nothing_with_cuda(build, tmp_path, monkeypatch, archs):
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "cuda", compiles=True)))
    monkeypatch.setenv("PGOLF_CUDA_ARCHS", archs)
    with pytest.raises(ExecError, match="PGOLF_CUDA_ARCHS: got"):
        run_build(build, tmp_path)
    monkeypatch.setenv("PGOLF_CUDA", "0")
    assert built_with_cuda(run_build(build, tmp_path)) == "False"


def test_an_nvcc_that_may_not_be_run_is_none(build, tmp_path, monkeypatch):
    toolkit = fake_toolkit(tmp_path / "cuda", compiles=True)
    (toolkit / "bin" / "nvcc").chmod(0o644)
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    assert build.find_nvcc() != toolkit / "bin" / "nvcc"


def test_demanded_cuda_that_does_not_compile_is_an_error(build, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "cuda", compiles=False)))
    monkeypatch.setenv("PGOLF_CUDA", "1")
    with pytest.raises(ExecError, match=r"the CUDA \(.*nvcc\) build failed"):
        run_build(build, tmp_path)


def test_demanded_cuda_without_nvcc_is_an_error(build, tmp_path, monkeypatch):
    monkeypatch.setenv("PGOLF_CUDA", "1")
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    with pytest.raises(ExecError, match="PGOLF_CUDA=1, but there is no nvcc"):
        run_build(build, tmp_path)


def test_unknown_mode_is_an_error(build, tmp_path, monkeypatch):
    monkeypatch.setenv("PGOLF_CUDA", "yes")
    with pytest.raises(ExecError, match="PGOLF_CUDA: got 'yes', wanted 'auto', '0' or '1'"):
        run_build(build, tmp_path)


def test_toolkit_without_the_static_runtime_is_named(build, tmp_path, monkeypatch):
    toolkit = fake_toolkit(tmp_path / "cuda", compiles=True)
    (toolkit / "lib" / "libcudart_static.a").unlink()
    with pytest.raises(ExecError, match=r"no libcudart_static\.a"):
        build.cuda_paths(toolkit / "bin" / "nvcc")


def test_nvcc_of_nvidias_packages_is_found(build, tmp_path, monkeypatch):
    """Their layout: site-packages/nvidia/cu13/bin/nvcc. The environment's own folder counts in an isolated build."""
    nvcc = tmp_path / "site" / "nvidia" / "cu13" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path / "site"))
    monkeypatch.setattr(build.sys, "path", [""])
    assert build.find_nvcc() == nvcc


@pytest.mark.parametrize(
    ("archs", "flags"),
    [
        ("90a", ["-gencode=arch=compute_90a,code=sm_90a"]),
        ("80, 80+PTX", ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_80,code=compute_80"]),
        ("100f", ["-gencode=arch=compute_100f,code=sm_100f"]),
    ],
)
def test_architectures(build, archs, flags):
    assert build.gencode_flags(archs) == flags


@pytest.mark.parametrize("archs", ["", "sm_90", "90a+SASS", "80,,90", "90a+", "8.0"])
def test_bad_architectures_are_named(build, archs):
    with pytest.raises(ExecError, match="PGOLF_CUDA_ARCHS: got"):
        build.gencode_flags(archs)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_cuda_sources_compile_without_spills(tmp_path):
    """Every .cu file, for each architecture that gets machine code. A spill costs a kernel its speed: it fails here."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on the PATH")
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        tmp_path / "lib",
        "--build-temp",
        tmp_path / "temp",
    ]
    environment = {**os.environ, "PGOLF_CUDA": "1", "PGOLF_CUDA_ARCHS": "80,90a"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    logs = sorted((tmp_path / "temp").rglob("*.cu.o.log"))
    assert len(logs) == len(list((ROOT / "csrc").rglob("*.cu")))
    reports = [(log.name, line) for log in logs for line in log.read_text().splitlines() if "spill stores" in line]
    clean = r"\b0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    spills = [report for report in reports if not re.search(clean, report[1])]
    assert reports, "ptxas reported no kernel"
    assert spills == []


@pytest.mark.long
@pytest.mark.timeout(600)
def test_wheel_holds_both_packages_and_nothing_else(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        ".",
    ]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PGOLF_CUDA": "0"}, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"pgolf_kernels", "model"}
    assert any(re.fullmatch(r"pgolf_kernels/_native\..*\.so", name) for name in names)
    assert any(name.startswith("model/data/sample/") for name in names)
    modules = {str(path.relative_to(ROOT)) for top in ("pgolf_kernels", "model") for path in (ROOT / top).rglob("*.py")}
    assert modules <= set(names)
