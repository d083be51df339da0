"""Builds the native module `pgolf_kernels._native` with one ninja file for C++ and CUDA sources.

setuptools cannot drive nvcc, so `build_ext` writes `build.ninja` itself. CUDA is optional: `PGOLF_CUDA=auto` (default)
compiles the .cu files when nvcc is found and falls back to a CPU build, loudly, when they fail to compile; `1` demands
CUDA; `0` leaves it out. `PGOLF_CUDA_ARCHS` (default `80,90a,80+PTX`) lists the architectures.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import ExecError

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
DEFAULT_ARCHS = "80,90a,80+PTX"


def find_nvcc() -> Path | None:
    """nvcc from CUDA_HOME, the PATH, or NVIDIA's compiler wheels, in that order."""
    candidates = []
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            candidates.append(Path(os.environ[variable]) / "bin" / "nvcc")
    on_path = shutil.which("nvcc")
    if on_path:
        candidates.append(Path(on_path))
    for site in {*sys.path, sysconfig.get_path("purelib"), os.environ.get("PGOLF_SITE_PACKAGES", "")}:
        if site:
            candidates.append(Path(site) / "nvidia" / "cu13" / "bin" / "nvcc")
    return next((path for path in candidates if path.is_file()), None)


def cuda_root(nvcc: Path) -> Path:
    """The toolkit folder that nvcc itself names (wrappers on the PATH do not lie in it)."""
    dryrun = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True)
    for line in dryrun.stderr.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=").strip()).resolve()
    return nvcc.resolve().parent.parent


def gencode_flags(archs: str) -> list[str]:
    flags = []
    for entry in archs.replace(" ", "").split(","):
        number, _, suffix = entry.partition("+")
        if not number[:-1].isdigit() or suffix not in ("", "PTX"):
            raise ExecError(f"PGOLF_CUDA_ARCHS: got {entry!r}, wanted entries such as '90a' or '80+PTX'")
        kind = "compute" if suffix else "sm"
        flags.append(f"-gencode=arch=compute_{number},code={kind}_{number}")
    return flags


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        mode = os.environ.get("PGOLF_CUDA", "auto").lower()
        if mode not in ("auto", "0", "1"):
            raise ExecError(f"PGOLF_CUDA: got {mode!r}, wanted 'auto', '0' or '1'")
        nvcc = find_nvcc() if mode != "0" else None
        if mode == "1" and nvcc is None:
            raise ExecError("PGOLF_CUDA=1, but no nvcc in CUDA_HOME, on the PATH or among installed packages")
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self._ninja(output, nvcc)
        except subprocess.CalledProcessError as error:
            if mode == "1" or nvcc is None:
                raise ExecError(f"the native build failed (exit {error.returncode}); see the compiler's lines above") from error
            print("\n*** pgolf_kernels: nvcc failed, building WITHOUT CUDA. PGOLF_CUDA=1 makes this an error. ***\n", file=sys.stderr)
            self._ninja(output, None)

    def _ninja(self, output: Path, nvcc: Path | None) -> None:
        build = Path(self.build_temp).resolve() / ("cuda" if nvcc else "cpu")
        build.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        cxx = os.environ.get("CXX", "c++")
        includes = f"-I{CSRC} -I{pybind11.get_include()} -I{sysconfig.get_path('include')}"
        defines = "-DPGOLF_CUDA" if nvcc else ""
        extra = os.environ.get("PGOLF_CXXFLAGS", "")
        openmp = "-fopenmp" if self._has_openmp(cxx, build) else ""
        cxxflags = f"-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -ffp-contract=off {openmp} {defines} {includes} {extra}"
        ldflags = f"-shared {openmp} {extra}"
        if nvcc:
            root = cuda_root(nvcc)
            includes += f" -I{root / 'include'}"
            cxxflags += f" -I{root / 'include'}"
            library = next((root / d for d in ("lib64", "lib", "targets/x86_64-linux/lib") if (root / d / "libcudart_static.a").is_file()), None)
            if library is None:
                raise ExecError(f"no libcudart_static.a under {root}; install NVIDIA's cuda-cudart development files")
            ldflags += f" -L{library} -lcudart_static -ldl -lrt -lpthread"
        archs = " ".join(gencode_flags(os.environ.get("PGOLF_CUDA_ARCHS", DEFAULT_ARCHS)))
        lines = [
            "rule cxx",
            f"  command = {cxx} -MMD -MF $out.d {cxxflags} -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = c++ $in",
            "rule nvcc",
            f"  command = {nvcc} -MD -MF $out.d -std=c++17 -O3 {archs} -Xptxas -v --threads 0 -Xcompiler -fPIC,-fvisibility=hidden "
            f"--expt-relaxed-constexpr {defines} {includes} -c $in -o $out > $out.log 2>&1 || (cat $out.log; exit 1)",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = nvcc $in",
            "rule link",
            f"  command = {cxx} $in {ldflags} -o $out",
            "  description = link $out",
        ]
        sources = sorted(CSRC.rglob("*.cpp")) + (sorted(CSRC.rglob("*.cu")) if nvcc else [])
        objects = []
        for source in sources:
            target = build / (str(source.relative_to(CSRC)).replace(os.sep, "_") + ".o")
            lines.append(f"build {target}: {'nvcc' if source.suffix == '.cu' else 'cxx'} {source}")
            objects.append(str(target))
        lines += [f"build {output}: link {' '.join(objects)}", f"default {output}", ""]
        (build / "build.ninja").write_text("\n".join(lines))
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(build)], check=True)

    @staticmethod
    def _has_openmp(cxx: str, build: Path) -> bool:
        probe = build / "openmp_probe.cpp"
        probe.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        command = [*cxx.split(), "-fopenmp", str(probe), "-o", str(probe.with_suffix(""))]
        return subprocess.run(command, capture_output=True).returncode == 0


setup(ext_modules=[Extension("pgolf_kernels._native", sources=[])], cmdclass={"build_ext": NinjaBuild})
