"""`pgolf doctor`: what it finds in this installation, and what it says about ones that lack something."""

import importlib
import io
import subprocess
import types

import pytest
import torch
from rich.console import Console

from model import doctor
from model.doctor import Finding, examine, print_findings


def find(findings, part):
    (finding,) = [finding for finding in findings if finding.part == part]
    return finding


def test_this_installation_is_whole():
    findings = examine()
    assert [finding for finding in findings if finding.status == "broken"] == []
    assert find(findings, "torch").text == torch.__version__
    assert "instruction set" in find(findings, "native module").text
    assert find(findings, "attention").text.split(":")[0] in ("cpu", "torch", "fa3")
    assert find(findings, "threads").text.startswith(str(torch.get_num_threads()))


def fake_native(*, cuda: bool):
    return types.SimpleNamespace(
        has_cuda=lambda: cuda, has_openmp=lambda: True, isa=lambda: "avx2", __file__="_native.so"
    )


@pytest.fixture
def native(monkeypatch):
    """Sets what importing the native module gives."""

    def install(result):
        def import_module(name):
            assert name == "pgolf_kernels._native"
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr(
            doctor, "importlib", types.SimpleNamespace(import_module=import_module, metadata=importlib.metadata)
        )

    return install


def test_native_module_that_does_not_import(native):
    native(ImportError("undefined symbol: x\nmore"))
    (finding,) = doctor._native(has_gpu=False)
    assert (finding.status, finding.text) == ("broken", "ImportError: undefined symbol: x")
    assert "pip install --force-reinstall --no-deps" in finding.fix


def test_native_module_that_computes_wrongly(native, monkeypatch):
    native(fake_native(cuda=False))
    monkeypatch.setattr("pgolf_kernels.softcap_ce.softcap_cross_entropy", lambda *args, **kwargs: torch.tensor(1.0))
    (finding,) = doctor._native(has_gpu=False)
    assert finding.status == "broken"
    assert "gave 1.000000" in finding.text


@pytest.mark.parametrize(
    ("error", "words"),
    [("no kernel image is available", "PGOLF_CUDA=1"), ("CUDA driver version is insufficient for it", "PGOLF_CUDA=0")],
)
def test_native_module_that_fails_on_the_gpu(native, monkeypatch, error, words):
    native(fake_native(cuda=True))
    monkeypatch.setattr(doctor, "_devices", lambda *, cuda: ["cpu", "cuda"] if cuda else ["cpu"])
    asked = []

    def check(device):
        asked.append(device)
        if device == "cuda":
            raise RuntimeError(f"softcap: {error}")

    monkeypatch.setattr(doctor, "_check_kernel", check)
    (finding,) = doctor._native(has_gpu=True)
    assert asked == ["cpu", "cuda"]
    assert finding.status == "broken"
    assert finding.text == f"_native.so on cuda: RuntimeError: softcap: {error}"
    assert words in finding.fix and ("580" in finding.fix) == ("driver" in error)


def test_the_check_runs_where_it_is_told_to(monkeypatch):
    seen = []

    def reference(logits, targets, softcap):
        seen.append((logits.device.type, targets.device.type))
        return torch.empty((), device=logits.device)

    monkeypatch.setattr("pgolf_kernels.softcap_ce.softcap_cross_entropy", reference)
    with pytest.raises(Exception, match="meta"):  # a device without values, in the place of a GPU
        doctor._check_kernel("meta")
    assert seen == [("meta", "meta")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (doctor._devices(cuda=True), doctor._devices(cuda=False)) == (["cpu", "cuda"], ["cpu"])


def test_gpu_without_native_cuda_names_the_build_command(native, monkeypatch):
    native(fake_native(cuda=False))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvcc")
    (finding,) = doctor._native(has_gpu=True)
    assert finding.status == "note"
    assert "PyTorch references" in finding.text
    assert "PGOLF_CUDA=1" in finding.fix
    assert "nvidia-cuda-nvcc" not in finding.fix


def test_gpu_without_nvcc_names_nvidias_packages(native, monkeypatch, tmp_path):
    native(fake_native(cuda=False))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (finding,) = doctor._native(has_gpu=True)
    for package in doctor.NVIDIA_COMPILER:
        assert f"{package}==13.0.*" in finding.fix


def test_native_cuda_without_a_gpu_is_fine(native, monkeypatch):
    native(fake_native(cuda=True))
    monkeypatch.setattr(doctor, "_devices", lambda *, cuda: ["cpu"])
    (finding,) = doctor._native(has_gpu=False)
    assert (finding.status, finding.fix) == ("ok", "")
    assert finding.text.startswith("CUDA and CPU, instruction set avx2")


def fake_torch(*, available: bool, cuda: str | None):
    properties = types.SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=141 * 2**30)
    cuda_module = types.SimpleNamespace(
        is_available=lambda: available, device_count=lambda: 2, get_device_properties=lambda index: properties
    )
    return types.SimpleNamespace(cuda=cuda_module, version=types.SimpleNamespace(cuda=cuda))


def test_gpus_that_work():
    findings = list(doctor._gpu(fake_torch(available=True, cuda="13.0"), ["NVIDIA H200"]))
    assert [(finding.part, finding.status) for finding in findings] == [("GPU 0", "ok"), ("GPU 1", "ok")]
    assert findings[0].text == "NVIDIA H200, sm_90, 141 GiB, CUDA 13.0"


@pytest.mark.parametrize(
    ("cuda", "status", "words"),
    [(None, "note", "built for the CPU alone"), ("13.0", "broken", "cannot use it")],
)
def test_gpu_that_pytorch_cannot_use(cuda, status, words):
    (finding,) = doctor._gpu(fake_torch(available=False, cuda=cuda), ["NVIDIA H200, driver 550.1"])
    assert finding.status == status
    assert words in finding.text
    assert finding.fix


@pytest.mark.parametrize(("left_out", "words"), [("", "does not import"), ("VARLEN", "was built without VARLEN")])
def test_hopper_without_flash_attention_3(monkeypatch, left_out, words):
    info = {"backend": "torch", "forced": "auto", "wheel": "pip install W", "source": "S", "left_out": left_out}
    monkeypatch.setattr("pgolf_kernels.attention.attention_backend_info", lambda: info)
    monkeypatch.setattr(doctor, "_is_hopper", lambda: True)
    (finding,) = doctor._attention()
    assert finding.status == "note"
    assert words in finding.text
    assert finding.fix.startswith("pip install W")


def test_hopper_with_a_small_build_of_flash_attention_3(monkeypatch):
    info = {"backend": "fa3", "forced": "auto", "left_out": "FP16, HDIM128"}
    monkeypatch.setattr("pgolf_kernels.attention.attention_backend_info", lambda: info)
    (finding,) = doctor._attention()
    assert finding.status == "ok"
    assert "built without FP16, HDIM128: there torch's runs" in finding.text


def test_driver_list(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    answer = subprocess.CompletedProcess([], 0, stdout="NVIDIA H200, 580.65\nNVIDIA H200, 580.65\n")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **kwargs: answer)
    assert doctor._driver_gpus() == ["NVIDIA H200, driver 580.65"] * 2


def test_driver_that_does_not_answer(monkeypatch):
    def run(*args, **kwargs):
        raise subprocess.TimeoutExpired("nvidia-smi", 20)

    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(doctor.subprocess, "run", run)
    assert doctor._driver_gpus() == []


def test_missing_optional_package(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: "" if name == "pyarrow" else "1.0")
    finding = find(list(doctor._optional()), "pyarrow")
    assert (finding.status, finding.fix) == ("note", f"{doctor.PIP} 'pyarrow>=17'")


def test_commands_are_printed_whole():
    """A command is never wrapped or read as markup, however narrow the terminal."""
    command = "cd /a/long/path && PGOLF_CUDA=1 python -m pip install --force-reinstall --no-deps -e '.[test]'"
    output = io.StringIO()
    print_findings([Finding("native module", "note", "CPU only [x]", command)], Console(file=output, width=40))
    assert command in output.getvalue()
    assert "CPU only [x]" in output.getvalue()
