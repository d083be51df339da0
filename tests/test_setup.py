"""scripts/setup.sh: what it asks for when a tool is missing, one at a time, and what it leaves alone.

Each test runs the script with a PATH of one folder that holds links to the tools it may use and nothing else.
"""

import functools
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHELL_TOOLS = ("sh", "dirname", "basename", "mktemp", "rm", "cat", "cksum", "find", "sort", "id", "tr", "env", "grep")
BROKEN = {  # module: its source, found before the real one
    "ensurepip": "raise ImportError('No module named ensurepip')",
    "sitecustomize": "import os\nreal = os.path.isfile\n"
    "os.path.isfile = lambda path: not str(path).endswith('Python.h') and real(path)",
}


def fake_path(folder: Path, *, python: bool = True, compilers: tuple[str, ...] = ("c++",), without: str = "") -> Path:
    """A PATH folder: shell tools, python3 (with the module `without` of BROKEN), and compilers."""
    binaries = folder / "bin"
    binaries.mkdir()
    for tool in SHELL_TOOLS:
        (binaries / tool).symlink_to(shutil.which(tool))
    for compiler in compilers:
        # A wrapper: g++ finds cc1plus, as and ld through the PATH or through its own place, so it gets the real ones.
        write_script(binaries / compiler, f'PATH={os.environ["PATH"]} exec {shutil.which("c++")} "$@"')
    if python:
        write_script(binaries / "python3", f'PYTHONPATH={folder / "broken"} exec {sys.executable} "$@"')
    (folder / "broken").mkdir()
    if without:
        (folder / "broken" / f"{without}.py").write_text(BROKEN[without])
    return binaries


def write_script(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def run_setup(path: Path, **environment: str) -> subprocess.CompletedProcess:
    """Looks for what the install needs, and stops there."""
    variables = {"PATH": str(path), "HOME": os.environ.get("HOME", "/"), "PGOLF_SETUP_CHECK": "1", **environment}
    command = [shutil.which("sh"), str(ROOT / "scripts" / "setup.sh")]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)


def apt_line(done: subprocess.CompletedProcess) -> list[str]:
    """The packages of the one apt-get line."""
    lines = [line for line in done.stderr.splitlines() if "apt-get install" in line]
    assert len(lines) == 1, done.stderr
    return lines[0].split("install -y ")[1].split()


def test_everything_there(tmp_path):
    done = run_setup(fake_path(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "all there" in done.stdout


@pytest.mark.parametrize(
    ("absent", "packages"),
    [
        ({"python": False}, ["python3", "python3-dev", "python3-venv"]),
        ({"without": "sitecustomize"}, ["python3-dev"]),
        ({"without": "ensurepip"}, ["python3-venv"]),
        ({"compilers": ()}, ["g++"]),
        ({"python": False, "compilers": ()}, ["python3", "python3-dev", "python3-venv", "g++"]),
    ],
)
def test_names_exactly_what_is_missing(tmp_path, absent, packages):
    done = run_setup(fake_path(tmp_path, **absent))
    assert done.returncode == 1
    assert apt_line(done) == packages
    assert done.stdout == ""


@pytest.mark.parametrize("tool", ["make", "git", "ninja", "nvcc", "nvidia-smi", "curl", "wget"])
def test_needs_no_other_tool(tmp_path, tool):
    """None of these is in the fake PATH: the first test passes without them. This one guards that list."""
    binaries = fake_path(tmp_path)
    assert not (binaries / tool).exists()
    assert run_setup(binaries).returncode == 0


def test_old_python_is_named(tmp_path):
    binaries = fake_path(tmp_path, python=False)
    write_script(binaries / "python3", 'case "$1" in -V) echo Python 3.9.2 ;; *) exit 1 ;; esac')
    done = run_setup(binaries)
    assert done.returncode == 1
    assert "Python 3.11 or newer (found: Python 3.9.2)" in done.stderr


def test_newer_python_beside_an_old_one_is_taken(tmp_path):
    binaries = fake_path(tmp_path)
    (binaries / "python3").rename(binaries / "python3.12")
    write_script(binaries / "python3", "exit 1")
    done = run_setup(binaries)
    assert done.returncode == 0, done.stderr
    assert "python3.12" in done.stdout


def test_versioned_python_names_its_own_packages(tmp_path):
    binaries = fake_path(tmp_path, without="ensurepip")
    (binaries / "python3").rename(binaries / "python3.12")
    assert apt_line(run_setup(binaries)) == ["python3.12-venv"]


def test_compiler_that_is_not_called_cxx(tmp_path):
    done = run_setup(fake_path(tmp_path, compilers=("g++",)))
    assert done.returncode == 0, done.stderr
    assert "compiler g++" in done.stdout


def test_compiler_without_cxx17_is_missing(tmp_path):
    binaries = fake_path(tmp_path, compilers=())
    write_script(binaries / "c++", "echo 'unrecognized option -std=c++17' >&2; exit 1")
    assert apt_line(run_setup(binaries)) == ["g++"]


@pytest.mark.parametrize("script", ["scripts/setup.sh", "scripts/check.sh"])
def test_scripts_are_posix_shell(script):
    """dash where there is one, else whatever sh is: parsed, not run."""
    shell = shutil.which("dash") or shutil.which("sh")
    done = subprocess.run([shell, "-n", str(ROOT / script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Checkout:
    """A copy of what setup.sh reads, with a PATH in which `python3 -m venv` makes an environment whose python writes
    down how it is called, and does nothing."""

    def __init__(self, folder: Path) -> None:
        self.root, self.log, self.cuda = folder / "checkout", folder / "log", folder / "cuda"
        for name in ("pyproject.toml", "constraints.txt", "setup.py", "scripts/setup.sh", "scripts/cpu_index.py"):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        shutil.copytree(ROOT / "csrc", self.root / "csrc")
        self.native = self.root / "pgolf_kernels" / "_native.so"
        self.native.parent.mkdir()
        self.native.touch()
        self.binaries = fake_path(folder)
        for tool in ("mkdir", "chmod"):
            (self.binaries / tool).symlink_to(shutil.which(tool))
        has_cuda = 'case "$*" in *has_cuda*) [ -z "$NVCC_FAILS" ] || exit 1 ;; esac'
        recorder = f'#!/bin/sh\necho "${{PGOLF_CUDA:-auto}} $*" >>{self.log}\n{has_cuda}\n'
        write_script(
            self.binaries / "python3",
            f'if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin"; printf %s {shell_quote(recorder)} >"$3/bin/python";'
            f' chmod +x "$3/bin/python"; else exec {sys.executable} "$@"; fi',
        )

    def setup(self, **environment: str) -> tuple[list[str], str]:
        """(calls of the environment's python with PGOLF_CUDA before each, what was printed)."""
        self.log.unlink(missing_ok=True)
        variables = {"PATH": str(self.binaries), "HOME": "/", "CUDA_HOME": str(self.cuda), **environment}
        command = [shutil.which("sh"), str(self.root / "scripts" / "setup.sh")]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        calls = self.log.read_text().splitlines() if self.log.exists() else []
        return [call for call in calls if not call.endswith("-c import pip")], done.stdout + done.stderr

    def add_gpu(self) -> None:
        write_script(self.binaries / "nvidia-smi", "echo 'GPU 0: NVIDIA H200 (UUID: GPU-0)'")

    def add_nvcc(self) -> None:
        (self.cuda / "bin").mkdir(parents=True)
        write_script(self.cuda / "bin" / "nvcc", "exit 0")


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


BUILD = "setup.py -q build_ext --inplace"


def test_second_run_installs_nothing(checkout):
    """A finished environment whose stamps fit is left alone: its pip and its setup.py are never called."""
    calls, output = checkout.setup()
    assert calls[-1] == "0 -m pip install --quiet -c constraints.txt -e .[test]"
    assert "downloads about 0.6 GB" in output
    assert checkout.setup() == ([], "")
    assert any("-e .[test,dev]" in call for call in checkout.setup(PGOLF_EXTRAS="test,dev")[0])
    assert checkout.setup() == ([], "")
    (checkout.root / "csrc" / "common" / "system.cpp").write_text("// changed\n")
    assert checkout.setup()[0] == [f"0 {BUILD}"]
    assert checkout.setup() == ([], "")
    checkout.native.unlink()  # `make clean`
    assert checkout.setup()[0] == [f"0 {BUILD}"]
    checkout.native.touch()
    assert checkout.setup() == ([], "")
    (checkout.root / "constraints.txt").write_text("torch==2.13.0\n")
    assert any("pip install" in call for call in checkout.setup()[0])


def test_index_of_cpu_wheels_is_used_without_a_gpu_alone(checkout):
    """cpu_index.py's answer goes to pip as it is."""
    index = checkout.root / "scripts" / "cpu_index.py"
    calls, _ = checkout.setup()
    assert any(call.endswith(f"scripts/{index.name}") for call in calls)
    checkout.add_gpu()
    calls, _ = checkout.setup()
    assert not any(index.name in call for call in calls)


def test_gpu_without_nvcc_takes_nvidias_compiler(checkout):
    """Before the package itself is built, with versions of one CUDA from constraints.txt; on a second run nothing."""
    checkout.add_gpu()
    calls, output = checkout.setup()
    compiler, package = [call for call in calls if "pip install" in call and "--upgrade" not in call]
    names = compiler.split("constraints.txt ")[1].split()
    assert names == ["nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-cuda-runtime", "nvidia-cuda-cccl", "nvidia-nvvm"]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert {pins[name].rsplit(".", 1)[0] for name in names} == {"13.0"}
    assert package == "auto -m pip install --quiet -c constraints.txt -e .[test]"
    assert "downloads about 3 GB" in output
    assert checkout.setup() == ([], "")


def test_compiler_is_installed_when_cuda_is_wanted_later(checkout):
    checkout.add_gpu()
    assert not any("nvidia-cuda-nvcc" in call for call in checkout.setup(PGOLF_CUDA="0")[0])
    assert any("nvidia-cuda-nvcc" in call for call in checkout.setup()[0])


@pytest.mark.parametrize("gpu", [True, False])
def test_nvcc_that_is_there_is_used(checkout, gpu):
    checkout.add_nvcc()
    if gpu:
        checkout.add_gpu()
    calls, output = checkout.setup()
    assert not any("nvidia-cuda-nvcc" in call for call in calls)
    assert any(call.startswith("auto -m pip install") and call.endswith("-e .[test]") for call in calls)
    assert "WITHOUT CUDA" not in output


def test_nvcc_that_fails_is_a_loud_line(checkout):
    """pip hides what a build prints."""
    checkout.add_nvcc()
    _, output = checkout.setup(NVCC_FAILS="1")
    assert "*** built WITHOUT CUDA, because nvcc failed" in output


@pytest.fixture
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def cpu_index(url: str) -> subprocess.CompletedProcess:
    """What scripts/cpu_index.py makes of an index."""
    command = [sys.executable, str(ROOT / "scripts" / "cpu_index.py")]
    environment = {**os.environ, "PGOLF_CPU_INDEX": url}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_index_of_cpu_wheels_that_answers(tmp_path, no_proxy):
    (tmp_path / "torch").mkdir()
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}"
        found, missing = cpu_index(url), cpu_index(f"{url}/elsewhere")
        server.shutdown()
    assert (found.returncode, found.stdout) == (0, f"--extra-index-url {url}\n")
    assert (missing.returncode, missing.stdout, missing.stderr) == (0, "", "")


def test_index_of_cpu_wheels_that_does_not_answer(no_proxy):
    """Nothing listens, and a server that takes the connection and says nothing: the install goes on without it."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        started = time.monotonic()
        done = cpu_index(f"http://127.0.0.1:{port}")
        assert time.monotonic() - started < 30
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = cpu_index(f"http://127.0.0.1:{port}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def shell_quote(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def test_pre_commit_runs_the_pinned_tools():
    """Hooks from elsewhere would have versions of their own."""
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    pins = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert re.findall(r"repo: (.*)", hooks) == ["local"]
    entries = re.findall(r"entry: \.venv/bin/(?:python -m )?([\w-]+)", hooks)
    assert len(entries) == hooks.count("entry:") and {"ruff", "clang-format", "mypy"} == set(entries) <= pins
