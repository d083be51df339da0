"""Sizes before and after packing, and a submission that runs without this repository."""

import ast
import builtins
import dis
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import CodeType

import numpy as np
import pytest
import torch
from rich.console import Console

from model import packed_native, packed_ngram
from model.artifact import decode_artifact, encode_artifact, read_artifact
from model.data.tokenizer import ByteTables
from model.errors import ArtifactError, ConfigError, PgolfError
from model.evaluate.ngram_tilt import make_tilt
from model.pack import (
    ARTIFACT,
    ROOT_MODULES,
    SCRIPT,
    Submission,
    entry_script,
    latin1_literal,
    pack_submission,
    packed_files,
    reachable_modules,
)
from model.pipeline import run_pipeline
from model.presets import get_preset
from model.run import RunDir
from model.size import SizeReport, SizeRow, code_size, print_table, size_report
from pgolf_kernels import ngram_hints
from tests.artifacts import same
from tests.tiny import tiny_config, tiny_data
from tests.triton_aot import needs_triton


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("pack")
    config = tiny_config(tiny_data(folder), folder / "runs", run_id="tiny", eval_mode="plain")
    run_pipeline(config)
    return RunDir(folder / "runs" / "tiny", writes=False)


def test_the_sizes_of_an_artifact_are_its_bytes(run: RunDir) -> None:
    report = size_report(run.path, code=False)
    assert not report.predicted
    assert report.artifact_bytes == run.artifact_path.stat().st_size == report.total
    assert sum(row.bytes for row in report.rows) == pytest.approx(report.artifact_bytes)
    assert sum(row.bytes for row in report.classes()) == pytest.approx(report.artifact_bytes)
    names = {row.name for row in report.rows}
    assert {"tok_emb", "blocks.0.attn.q", "resid_mix", "header"} <= names
    for budget, last in ((report.total - 1, ["over", "1"]), (report.total + 20, ["left", "20"])):
        console = Console(width=120, record=True)
        console.print(print_table(report, budget=budget))
        assert console.export_text().splitlines()[-1].split() == last


def test_the_sizes_of_a_full_model_fit_a_narrow_terminal() -> None:
    shapes = {"tok_emb": (8192, 512), "blocks.10.attn.q": (512, 512), "blocks.10.mlp.down": (512, 2048)}
    rows = [SizeRow(name, "embed", shape, 6, 3.211, 1_234_567.0) for name, shape in shapes.items()]
    rows.append(SizeRow("a_name_of_more_characters_than_fit", "other", (), 32, 32.0, 4.0))
    console = Console(width=80, record=True)
    console.print(print_table(SizeReport(tuple(rows), False, 15_662_323, 98_403)))
    lines = [line.split() for line in console.export_text().splitlines()]
    for name, shape in shapes.items():
        assert [name, "embed", *" x ".join(map(str, shape)).split()] in [line[:5] for line in lines]
    assert ["a_name_of_more_character"] in [line[:1] for line in lines] and ["s_than_fit"] in lines
    assert ["total", "15,760,726"] in lines


def test_the_predicted_size_is_near_the_real_one(run: RunDir) -> None:
    artifact = read_artifact(run.artifact_path)
    static, _ = encode_artifact(artifact.quantized, artifact.config.replace(codec="static"), artifact.header.provenance)
    predicted = size_report(run.model_path, code=False)
    assert predicted.predicted
    assert abs(predicted.artifact_bytes - len(static)) < 0.03 * len(static)
    by_name = {row.name: row for row in predicted.rows}
    for row in size_report(run.path, code=False).rows:
        assert abs(by_name[row.name].entropy - row.entropy) < 0.15, row.name


def test_sizes_of_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config"):
        size_report(tmp_path, code=False)
    (tmp_path / "x").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="preamble"):
        size_report(tmp_path / "x", code=False)


def test_the_packed_modules_are_complete_and_need_nothing_else() -> None:
    modules = reachable_modules(ROOT_MODULES)
    assert {"model.packed_entry", "model.gpt", "model.evaluate.lora_ttt", "model.train"} <= set(modules)
    assert not {"model.report", "model.demo", "model.doctor", "pgolf_kernels._native"} & set(modules)
    assert code_size(get_preset("pr1727")) == len(entry_script())
    assert code_size(get_preset("pr1514")) == len(entry_script(ngram=True))
    assert len(entry_script()) <= 100_000 and len(entry_script(ngram=True)) <= 110_000  # docs/artifact.md


def test_any_bytes_as_a_literal() -> None:
    data = bytes(range(256)) * 3 + b'\\x00\\\n"\r\n0' + b"\0" + b"7"
    for end in (b"", b'"', b'""', b'"""', b'\\"""""', b"\\", b"\\\\", b"\0", b"\r", b"\r\n", b'\0"9'):
        for content in (data + end, end + data, data + end + data):
            source = b'# coding: latin-1\nvalue = """%s""".encode("latin-1")\n' % latin1_literal(content)
            assert ast.literal_eval(ast.parse(source).body[0].value.func.value).encode("latin-1") == content
    assert len(latin1_literal(data)) < 1.02 * len(data)


def _bound_and_read(code: CodeType) -> tuple[set[str], set[str]]:
    """Names that a module's code, with the functions in it, binds and reads as globals."""
    bound, read = set(), set()
    waiting = [code]
    while waiting:
        part = waiting.pop()
        waiting += [constant for constant in part.co_consts if isinstance(constant, CodeType)]
        for step in dis.get_instructions(part):
            if step.opname == "STORE_GLOBAL" or (step.opname == "STORE_NAME" and part is code):
                bound.add(step.argval)
            elif step.opname == "LOAD_GLOBAL" or (step.opname == "LOAD_NAME" and part is code):
                read.add(step.argval)
    return bound, read


def test_packed_modules_have_every_name_that_they_read() -> None:
    modules = {}
    for path, source in packed_files(ngram=False).items():
        name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        modules[name] = ast.parse(source), *_bound_and_read(compile(source, path, "exec"))
    for name, (tree, bound, read) in modules.items():
        assert read <= bound | set(dir(builtins)) | {"__file__", "__name__"}, name
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in modules:
                for alias in node.names:
                    assert alias.name in modules[node.module][1] or f"{node.module}.{alias.name}" in modules, (
                        f"{name} imports {alias.name} from {node.module}"
                    )


@pytest.mark.long
@pytest.mark.timeout(900)  # some 100 compilations, which take minutes where two cores are all there is
@needs_triton
def test_packed_kernels_compile_for_hopper(tmp_path: Path) -> None:
    for path, source in packed_files(ngram=False).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(source)
    shutil.copytree(Path(__file__).parent, tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests" / "test_place.py").write_text(
        "import pgolf_kernels\nfrom tests.test_triton_kernels import LAUNCHES, _modules\n"
        f"def test_place():\n    assert pgolf_kernels.__file__.startswith({str(tmp_path)!r})\n"
        "    assert set(LAUNCHES) - _modules() == {'fp8_mlp'}\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_triton_kernels.py", "tests/test_place.py"]
    command += ["-k", "not fp8_mlp and not every_module"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout


def test_a_submission_without_hints_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.evaluate.ngram_tilt._native", packed_native)
    tables = ByteTables(np.ones(4, np.int16), *np.zeros((2, 4), bool))
    with pytest.raises(PgolfError, match="packed from a run that does not use them"):
        make_tilt(np.zeros(9, np.uint16), get_preset("pr1514").eval, tables, torch.device("cpu"))
    names = {name: {path for path in packed_files(ngram=name) if "ngram" in path} for name in (False, True)}
    assert "pgolf_kernels/ngram.py" not in names[False] and "pgolf_kernels/ngram.py" in names[True]


@pytest.mark.long
def test_hints_compiled_from_the_sources_that_a_submission_carries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(3)
    passage = torch.randint(0, 400, (300,), generator=draw)
    tokens = torch.cat([passage, torch.randint(0, 400, (500,), generator=draw), passage[50:], passage])
    flags = {name: torch.rand(400, generator=draw) < 0.3 for name in ("has_leading_space", "is_boundary")}
    settings = {"table_bits": 12, "within_beta": 0.5, "word_beta": 0.25, **flags}
    wanted = [ngram_hints(tokens, hash=form, **settings) for form in ("compatible", "full")]
    monkeypatch.setattr(packed_ngram, "_SOURCES", tmp_path / "csrc")
    monkeypatch.setattr("pgolf_kernels.ngram._native", packed_ngram)
    packed_ngram._ngram_library.cache_clear()
    files = packed_files(ngram=True)
    for name in (name for name in files if name.startswith("csrc/")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(files[name])
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        with pytest.raises(PgolfError, match=r"no C\+\+ compiler"):
            ngram_hints(tokens)
    for form, (hints, betas) in zip(("compatible", "full"), wanted, strict=True):
        assert (hints >= 0).sum() > 300
        got = ngram_hints(tokens, hash=form, **settings)
        assert torch.equal(got[0], hints) and torch.equal(got[1], betas)


def test_pack_submission(run: RunDir, tmp_path: Path) -> None:
    submission = pack_submission(run.path, tmp_path / "out", author="somebody")
    files = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert files == submission.sizes and submission.fits
    facts = json.loads((tmp_path / "out" / "submission.json").read_text())
    assert facts["bytes_total"] == submission.total == sum(files.values())
    assert facts["author"] == "somebody" and facts["bytes_model"] == files[ARTIFACT]
    packed, original = read_artifact(tmp_path / "out" / ARTIFACT), read_artifact(run.artifact_path)
    assert packed.header.sections[0].codec == "static"
    assert same(packed.state_dict, original.state_dict)
    with pytest.raises(PgolfError, match="not empty"):
        pack_submission(run.path, tmp_path / "out")
    assert not pack_submission(run.path, tmp_path / "small", budget=1000).fits


def test_a_packed_script_has_no_fp8_and_says_so(tmp_path: Path) -> None:
    files = packed_files(ngram=False)
    assert not [path for path in files if "fp8" in path] and "fp8_mlp(" not in files["model/gpt.py"]
    assert "fp8_mlp and True:raise" in files["model/train.py"]
    config = tiny_config(tiny_data(tmp_path), tmp_path / "runs", eval_mode="plain", fp8_mlp=True)
    run_pipeline(config)
    pack_submission(tmp_path / "runs" / "tiny", tmp_path / "out")
    assert "training steps multiplied in FP8" in (tmp_path / "out" / "README.md").read_text()


def test_pack_replaces_a_submission_and_nothing_else(run: RunDir, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(run.path, out / "run")
    with pytest.raises(PgolfError, match=r"out: the folder has no submission\.json, wanted one to replace"):
        pack_submission(run.path, out, replace=True)
    (out / "submission.json").write_text("{}")
    with pytest.raises(PgolfError, match=r"run: is in .*out, which is replaced"):
        pack_submission(out / "run", out, replace=True)
    assert (out / "run" / "model.pgolf").is_file()
    submission = pack_submission(run.path, out, replace=True)
    assert sorted(path.name for path in out.iterdir()) == sorted(submission.sizes)


@pytest.mark.long
def test_a_submission_with_hints_gives_its_own_modes_bpb(tmp_path: Path) -> None:
    config = tiny_config(
        tiny_data(tmp_path), tmp_path / "runs", eval_mode="sgd-ttt+ngram-tilt", sgd_ttt_chunk_tokens=256,
        sgd_ttt_batch_seqs=4, ngram_table_bits=12,
    )  # fmt: skip
    run_pipeline(config)
    run = RunDir(tmp_path / "runs" / "tiny", writes=False)
    submission = pack_submission(run.path, tmp_path / "out")
    bpb = scores_of(submission, "--data", config.data.data_dir, "--device", "cpu")
    assert bpb == {name: pytest.approx(run.result()["bpb"][name], abs=2e-6) for name in ["sgd_ttt_ngram_tilt"]}
    assert sorted(path.name for path in submission.path.iterdir()) == sorted(submission.sizes)


@pytest.mark.long
def test_a_submission_trains(tmp_path: Path) -> None:
    data = tiny_data(tmp_path)
    (tmp_path / "clean").mkdir()
    (tmp_path / "clean" / SCRIPT).write_bytes(entry_script())
    flags = (
        f"--preset demo --data-dir {data} --run-dir {tmp_path / 'runs'} --run-id x --vocab-size 512 --iterations 2 "
        "--warmup-steps 1 --train-batch-tokens 512 --micro-batches 2 --train-seq-len 64 --calibration-tokens 256 "
        "--calibration-batches 1 --eval-mode plain --eval-seq-len 64"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, SCRIPT, "train", *flags.split()]
    done = subprocess.run(command, cwd=tmp_path / "clean", env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    run = RunDir(tmp_path / "runs" / "x", writes=False)
    assert read_artifact(run.artifact_path).config.preset == "demo" and "plain" in run.result()["bpb"]


def scores_of(submission: Submission, *arguments: str) -> dict[str, float]:
    """Runs the script in its folder, without this repository on the path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, SCRIPT, *arguments]
    done = subprocess.run(command, cwd=submission.path, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])["bpb"]
    return result


@pytest.mark.long
def test_a_submission_runs_without_this_repository_and_gives_the_same_bpb(run: RunDir, tmp_path: Path) -> None:
    submission = pack_submission(run.path, tmp_path / "out")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    data = run.config().data.data_dir
    bpb = scores_of(submission, "--data", data, "--mode", "plain", "--mode", "lora-ttt", "--device", "cpu")
    assert bpb["plain"] == pytest.approx(run.result()["bpb"]["plain"], abs=2e-6)
    assert sorted(path.name for path in submission.path.iterdir()) == sorted(submission.sizes)
    broken = subprocess.run(
        [sys.executable, SCRIPT, "--data", str(tmp_path)],
        cwd=submission.path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert broken.returncode == 1 and broken.stderr.startswith("train_gpt.py: ") and broken.stderr.count("\n") == 1


def test_an_artifact_survives_being_coded_anew(run: RunDir) -> None:
    artifact = read_artifact(run.artifact_path)
    header = artifact.header
    data, _ = encode_artifact(
        artifact.quantized, artifact.config, header.provenance, tokenizer_sha256=header.tokenizer_sha256
    )
    assert data == run.artifact_path.read_bytes()
    assert same(decode_artifact(data).state_dict, artifact.state_dict)
