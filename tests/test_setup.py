"""scripts/setup.sh: what it asks for when a tool is missing, one at a time, and what it leaves alone.

Each test runs the script with a PATH of one folder that holds links to the tools it may use and nothing else.
"""

import os
import shutil
import subprocess
import sys
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


def test_second_run_installs_nothing(tmp_path):
    """A finished environment whose stamps fit is left alone: its pip and its setup.py are never called."""
    checkout = tmp_path / "checkout"
    for name in ("pyproject.toml", "constraints.txt", "setup.py"):
        checkout.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    shutil.copytree(ROOT / "csrc", checkout / "csrc")
    (checkout / "scripts").mkdir()
    for name in ("setup.sh", "cpu_index.py"):
        shutil.copy(ROOT / "scripts" / name, checkout / "scripts" / name)
    log = tmp_path / "log"
    binaries = fake_path(tmp_path)
    python = binaries / "python3"
    # `python3 -m venv` makes an environment whose python writes down how it is called.
    recorder = f'#!/bin/sh\necho "$*" >>{log}\n'
    write_script(
        python,
        f'if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin"; printf %s {shell_quote(recorder)} >"$3/bin/python";'
        f' chmod +x "$3/bin/python"; else exec {sys.executable} "$@"; fi',
    )
    for tool in ("mkdir", "chmod"):
        (binaries / tool).symlink_to(shutil.which(tool))

    def setup(**environment: str) -> list[str]:
        log.unlink(missing_ok=True)
        variables = {"PATH": str(binaries), "HOME": str(tmp_path), **environment}
        command = [shutil.which("sh"), str(checkout / "scripts" / "setup.sh")]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        calls = log.read_text().splitlines() if log.exists() else []
        return [call for call in calls if call != "-c import pip"]

    first = setup()
    assert [call for call in first if "pip install" in call][-1].endswith("-c constraints.txt -e .[test]")
    assert setup() == []
    assert any("-e .[test,dev]" in call for call in setup(PGOLF_EXTRAS="test,dev"))
    assert setup() == []
    (checkout / "csrc" / "common" / "system.cpp").write_text("// changed\n")
    assert setup() == ["setup.py -q build_ext --inplace"]
    assert setup() == []
    (checkout / "constraints.txt").write_text("torch==2.13.0\n")
    assert any("pip install" in call for call in setup())


def shell_quote(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def test_pre_commit_has_the_pinned_versions():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for tool in ("ruff", "clang-format"):
        assert f"rev: v{pins[tool]}\n" in hooks
