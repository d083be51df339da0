"""Builds the native module `pgolf_kernels._native` with one ninja file for C++ and CUDA sources.

setuptools cannot drive nvcc, so `build_ext` writes `build.ninja` itself. The environment decides what is built:

- `PGOLF_CUDA`: `auto` (default) compiles the .cu files when nvcc is found, and falls back to a CPU build, loudly, when
  that fails; `1` demands CUDA; `0` leaves it out.
- `PGOLF_CUDA_ARCHS` (default `80,90a,80+PTX`): machine code for each number, PTX where `+PTX` follows.
- `CXX`, `CUDA_HOME`: the compilers. `PGOLF_CXXFLAGS`: more flags for the C++ compiler and the linker.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import ExecError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
DEFAULT_ARCHS = "80,90a,80+PTX"
RULES = """\
rule cxx
  command = {cxx} -MMD -MF $out.d {cxxflags} -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = c++ $in
rule nvcc
  command = {nvcc} -MD -MF $out.d {nvccflags} -c $in -o $out > $out.log 2>&1 || (cat $out.log; exit 1)
  depfile = $out.d
  deps = gcc
  description = nvcc $in
rule link
  command = {cxx} $in {ldflags} -o $out
  description = link $out
"""


def find_nvcc() -> Path | None:
    """nvcc from CUDA_HOME, the PATH, NVIDIA's compiler packages or /usr/local/cuda, in that order."""
    candidates = [Path(os.environ[name], "bin", "nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    sites = dict.fromkeys([*sys.path, sysconfig.get_path("purelib")])
    candidates += [Path(site, "nvidia", "cu13", "bin", "nvcc") for site in sites if site]
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((path.absolute() for path in candidates if path.is_file() and os.access(path, os.X_OK)), None)


def cuda_paths(nvcc: Path) -> tuple[Path, Path]:
    """(include folder, folder of libcudart_static.a) of the toolkit that nvcc itself names: nvcc may be a wrapper."""
    dryrun = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True)
    tops = [line.removeprefix("#$ TOP=") for line in dryrun.stderr.splitlines() if line.startswith("#$ TOP=")]
    root = Path(tops[0].strip() if tops else nvcc.resolve().parent.parent).resolve()
    folders = [root / "lib64", root / "lib", *root.glob("targets/*-linux/lib")]
    library = next((folder for folder in folders if (folder / "libcudart_static.a").is_file()), None)
    if library is None:
        raise ExecError(f"{nvcc} is there, but no libcudart_static.a under {root}: install the CUDA runtime's library")
    return root / "include", library


def cuda_archs() -> str:
    return os.environ.get("PGOLF_CUDA_ARCHS", DEFAULT_ARCHS)


def gencode_flags(archs: str) -> list[str]:
    """nvcc's flags for a list such as `80,90a,80+PTX`."""
    flags = []
    for entry in archs.replace(" ", "").split(","):
        number, _, suffix = entry.partition("+")
        if not number.rstrip("af").isdigit() or entry not in (number, f"{number}+PTX"):
            raise ExecError(f"PGOLF_CUDA_ARCHS: got {entry!r} in {archs!r}, wanted entries such as '90a' or '80+PTX'")
        kind = "compute" if suffix else "sm"
        flags.append(f"-gencode=arch=compute_{number},code={kind}_{number}")
    return flags


def has_openmp(cxx: str, build: Path) -> bool:
    probe = build / "openmp_probe.cpp"
    probe.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
    command = [*shlex.split(cxx), "-fopenmp", str(probe), "-o", str(probe.with_suffix(""))]
    return subprocess.run(command, capture_output=True).returncode == 0


def ninja_file(output: Path, build: Path, nvcc: Path | None) -> str:
    """The text of build.ninja: every source of csrc (the .cu files with nvcc only), linked into `output`."""

    def path(value: Path) -> str:
        return str(value).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def flags(*parts: str) -> str:
        return shlex.join(parts).replace("$", "$$")

    cxx = os.environ.get("CXX", "c++")
    extra = shlex.split(os.environ.get("PGOLF_CXXFLAGS", ""))
    openmp = ["-fopenmp"] if has_openmp(cxx, build) else []
    common = ["-std=c++17", "-O3"]
    includes = [f"-I{CSRC}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    links: list[str] = []
    archs: list[str] = []
    if nvcc:
        include, library = cuda_paths(nvcc)
        includes += [f"-I{include}", "-DPGOLF_CUDA"]
        links = [f"-L{library}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        archs = gencode_flags(cuda_archs())
        includes += ["-DPGOLF_SM90A"] if "90a" in cuda_archs() else []  # some kernels are written for this one alone
    host = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", *openmp]
    # Nothing is reassociated or contracted; but loops may be vectorised where C's traps and errno would forbid it.
    host += ["-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]
    device = ["-Xptxas", "-v", "--threads", "0", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    lines = [
        RULES.format(
            cxx=cxx,
            cxxflags=flags(*common, *host, *includes, *extra),
            nvcc=flags(str(nvcc)),
            nvccflags=flags(*common, *archs, *device, *includes),
            ldflags=flags("-shared", *openmp, *extra, *links),
        )
    ]
    objects = []
    for source in sorted(CSRC.rglob("*.cpp")) + (sorted(CSRC.rglob("*.cu")) if nvcc else []):
        target = path(build / f"{source.relative_to(CSRC).as_posix().replace('/', '_')}.o")
        lines.append(f"build {target}: {'nvcc' if source.suffix == '.cu' else 'cxx'} {path(source)}")
        objects.append(target)
    lines += [f"build {path(output)}: link {' '.join(objects)}", f"default {path(output)}", ""]
    return "\n".join(lines)


def _link_into_checkout(output: Path) -> None:
    """After `pip install .` the tests run in the checkout, where Python finds the packages' sources first: the module
    must be beside them. One that was built in place stays."""
    beside = ROOT / "pgolf_kernels" / output.name
    if beside.is_symlink() or not beside.exists():
        beside.unlink(missing_ok=True)
        beside.symlink_to(os.path.relpath(output, beside.parent))


class NinjaBuild(build_ext):
    """build_ext for the one native module."""

    def build_extension(self, ext: Extension) -> None:
        mode = os.environ.get("PGOLF_CUDA", "auto").lower()
        if mode not in ("auto", "0", "1"):
            raise ExecError(f"PGOLF_CUDA: got {mode!r}, wanted 'auto', '0' or '1'")
        nvcc = find_nvcc() if mode != "0" else None
        if mode == "1" and nvcc is None:
            raise ExecError("PGOLF_CUDA=1, but there is no nvcc in CUDA_HOME, on the PATH or among Python's packages")
        if nvcc is not None:
            gencode_flags(cuda_archs())  # a mistake in the list is no reason to build without CUDA
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self._ninja(output, nvcc)
        except ExecError as error:
            if mode == "1" or nvcc is None:
                raise
            print(
                f"\n*** pgolf_kernels: {error}\n*** Building WITHOUT CUDA. PGOLF_CUDA=1 makes this an error.\n",
                file=sys.stderr,
            )
            self._ninja(output, None)
        if Path(self.build_lib).resolve().parent == ROOT / "build":
            _link_into_checkout(output)

    def _ninja(self, output: Path, nvcc: Path | None) -> None:
        build = Path(self.build_temp).resolve() / ("cuda" if nvcc else "cpu")
        build.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(ninja_file(output, build, nvcc))
        done = subprocess.run([sys.executable, "-m", "ninja", "-C", str(build)])
        if done.returncode:
            kind = f"CUDA ({nvcc})" if nvcc else "CPU"
            raise ExecError(f"the {kind} build failed with exit code {done.returncode}; the compiler's lines are above")


if __name__ == "__main__":
    setup(ext_modules=[Extension("pgolf_kernels._native", sources=[])], cmdclass={"build_ext": NinjaBuild})
