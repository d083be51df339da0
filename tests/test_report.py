"""The report: what it says is what the run's files say, it is safe to open, and a browser shows all of it."""

import base64
import hashlib
import json
import math
import re
import shutil
import xml.etree.ElementTree
import zipfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from browser import Browser, find_chromium
from hypothesis import given
from hypothesis import strategies as st

from bench import real_runs
from model import run as run_module
from model.checks import FAIL, PASS, SKIPPED, Check, Report
from model.data.build import build_dataset
from model.data.dataset import open_dataset
from model.data.text import SAMPLE, read_documents
from model.errors import ArtifactError, ConfigError, LegalityError, PgolfError
from model.pipeline import run_pipeline
from model.presets import get_preset
from model.report import sections, write_report
from model.report.compare import compare_runs
from model.report.load import load_run
from model.report.stats import RECORD_NATS, summarize, t_tail, welch
from model.run import RunDir

AWKWARD_NAME = 'a <b>&"run"'
SPECIAL = "if (a < b && c > d) { return \"<script>alert('x')</script>\"; }\n日本語 😀 é\n"


CODE = 98_765


@pytest.fixture(scope="module", autouse=True)
def packed_script():
    """A packed script of CODE bytes: making the real one takes seconds (tests/test_pack.py does)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sections, "code_size", lambda config: CODE)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A real run of a tiny network through the pipeline, its validation text full of what HTML treats specially."""
    folder = tmp_path_factory.mktemp("report")
    texts = sorted((document.text for document in read_documents([SAMPLE])), key=len)[:40]
    valid = [SPECIAL * 3, SPECIAL + texts[0], texts[1][:300], "x"]
    for name, documents in (("train", texts[2:]), ("valid", valid)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
        (folder / f"{name}.jsonl").write_text(lines)
    build_dataset(
        [folder / "train.jsonl"], folder / "data", vocab_size=400, valid_inputs=[folder / "valid.jsonl"], quiet=True
    )
    config = get_preset("demo").replace(
        vocab_size=400, num_layers=3, model_dim=32, num_heads=2, num_kv_heads=1, rope_dims=8, xsa_last_n=3,
        loop_start=1, loop_end=1, parallel_start=2, train_seq_len=64, train_batch_tokens=256, iterations=8,
        calibration_batches=2, calibration_tokens=256, eval_seq_len=64, ttt_eval_seq_len=64,
        ttt_chunk_size=64, ttt_lora_rank=2,
        data_dir=str(folder / "data"), run_dir=str(folder / "runs"), run_id=AWKWARD_NAME, val_loss_every=4,
    )  # fmt: skip
    run_pipeline(config)
    return folder / "runs" / AWKWARD_NAME


def copy_run(run, target, *, seed=None, shift=0.0, **settings):
    """A copy with another seed or other settings and with every score moved by `shift` bits per byte."""
    shutil.copytree(run, target, ignore=shutil.ignore_patterns("report.html"))
    config = json.loads((run / "config.json").read_text())
    if seed is not None:
        config["train"]["seed"] = seed
    for section, name in ((s, n) for s in config if isinstance(config[s], dict) for n in settings if n in config[s]):
        config[section][name] = settings[name]
    (target / "config.json").write_text(json.dumps(config))
    result = json.loads((run / "result.json").read_text())
    for mode in result["bpb"]:
        ratio = result["evaluation"][mode]["val_loss"] / result["evaluation"][mode]["bpb"]
        result["bpb"][mode] += shift
        result["evaluation"][mode]["val_loss"] += shift * ratio
    (target / "result.json").write_text(json.dumps(result))
    return target


class Page(HTMLParser):
    """The words, links, pictures and styles of a page."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.references, self.images, self.text = [], [], [], ""
        self.source = source
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attributes = dict(attrs)
        self.references += [attributes[key] for key in ("src", "href", "srcset", "action", "data") if key in attributes]
        if tag == "img":
            self.images.append(attributes)

    def handle_data(self, data):
        self.text += data


def report(*runs, out=None):
    return Page(write_report(runs, out).read_text(encoding="utf-8"))


def comparison(*runs):
    """The comparison without the runs' own sections."""
    return Page("".join(compare_runs([load_run(path) for path in runs])))


@pytest.fixture(scope="module")
def page(run):
    return report(run)


def test_the_page_is_in_the_runs_folder_and_says_what_the_run_says(run, page):
    result = json.loads((run / "result.json").read_text())
    assert (run / "report.html").is_file()
    for mode, bpb in result["bpb"].items():
        assert f"{bpb:.5f}" in page.text and mode in page.text
        assert f"{result['evaluation'][mode]['val_loss']:.5f}" in page.text
    assert f"{(run / 'model.pgolf').stat().st_size:,} bytes in all" in page.text
    assert json.loads((run / "provenance.json").read_text())["data_sha256"] in page.text
    for title in ("Budgets", "Training", "Score", "An example text", "Artifact", "Legality", "Where it comes from"):
        assert title in page.text
    seconds = result["seconds"]["train"] + result["seconds"]["calibrate"]
    words = [image["alt"] for image in page.images]
    assert f"Budgets: training {seconds:,.1f} of 600 s; evaluation" in words[0]
    size = (run / "model.pgolf").stat().st_size + CODE
    assert f"; artifact and code {size / 1e6:.2f} of 16 MB" in words[0]
    assert not any("calibrate" in text for text in words)  # it is a part of "quantize"
    gain = result["bpb"]["lora_ttt"] - result["bpb"]["plain"]
    assert f"{gain:+.5f}" in page.text
    assert page.text.count("legal") >= 2 and "not a legal score" not in page.text


def test_code_that_cannot_be_packed_is_not_counted_and_said_so(run, tmp_path, monkeypatch):
    def no_sources(config):
        raise PgolfError("csrc/ngram: not there")

    monkeypatch.setattr(sections, "code_size", no_sources)
    page = report(run, out=tmp_path / "report.html")
    assert f"; artifact {(run / 'model.pgolf').stat().st_size / 1e6:.2f} of 16 MB" in page.images[0]["alt"]
    assert "not counted here (csrc/ngram: not there)" in page.text


def test_parts_of_the_artifact_add_up(run):
    facts = load_run(run).artifact
    assert facts.size == (run / "model.pgolf").stat().st_size
    assert sum(facts.code_bytes.values()) == pytest.approx(facts.parts["codes"])
    assert {c.name: c.bits for c in facts.classes} == {"attention": 6, "MLP": 6, "embedding": 8}
    assert all(0 < c.entropy <= c.bits for c in facts.classes)


def test_nothing_is_loaded_from_elsewhere(page):
    assert page.references
    assert all(reference.startswith(("data:", "#")) for reference in page.references)
    assert not {"script", "link", "iframe", "object", "embed", "form"} & (set(page.tags) - {"link"})
    assert "default-src 'none'" in page.source
    assert not re.search(r"url\(|@import|https?://", re.sub(r'src="data:[^"]*"', "", page.source))


def test_pictures_are_whole_and_described(page):
    assert len(page.images) >= 7
    for image in page.images:
        kind, _, data = image["src"].partition(",")
        assert kind == "data:image/svg+xml;base64" and len(image["alt"]) > 20
        root = xml.etree.ElementTree.fromstring(base64.b64decode(data))
        assert root.tag.endswith("svg")
        assert not [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href") and not v.startswith("#")]


def test_everything_from_outside_is_escaped(run, page):
    assert f"Run {AWKWARD_NAME}" in page.text
    assert "<script" not in page.source and AWKWARD_NAME not in page.source
    assert "alert" in page.text  # the validation text is there, as text


def test_the_example_text_is_the_validation_text(run, page):
    loaded = load_run(run)
    shown = re.search(r'<div class="text">(.*?)</div>', page.source, re.S)[1]
    words = Page(shown)
    source = loaded.by_token
    texts = source.tokenizer.decode_batch([source.tokens[start : start + length] for start, length in source.documents])
    assert any(text.startswith(words.text.lstrip(" ")[:200]) for text in texts)
    bits = [float(b) for b in re.findall(r"lora_ttt: ([\d.]+) bits", shown)]
    assert bits and all(b >= 0 for b in bits)


def test_the_same_run_gives_the_same_page(run, page, tmp_path):
    assert write_report([run], tmp_path / "again.html").read_text() == page.source


def test_per_document_scores_add_up_to_the_mode(run):
    loaded = load_run(run)
    for mode in ("plain", "lora_ttt"):
        rows = loaded.by_token.per_document(mode)
        bpb = rows[:, 0].sum() / math.log(2) / rows[:, 1].sum()
        assert bpb == pytest.approx(loaded.bpb[mode], rel=1e-9)


def test_runs_that_differ_by_seed_are_one_group(run, tmp_path):
    shifts = {1: 0.0, 2: 0.02, 3: 0.01}
    a = [copy_run(run, tmp_path / f"a{seed}", seed=seed, shift=shift) for seed, shift in shifts.items()]
    b = [copy_run(run, tmp_path / f"b{seed}", seed=seed, shift=s - 0.3, matrix_lr=0.5) for seed, s in shifts.items()]
    page = comparison(*a, *b)
    assert "6 runs in 2 groups" in page.text and "demo A" in page.text and "demo B" in page.text
    loaded = load_run(run)
    base = loaded.bpb["lora_ttt"]
    ratio = loaded.nats["lora_ttt"] / base
    assert f"{base + 0.01:.5f} ± 0.01000" in page.text and f"{base - 0.29:.5f} ± 0.01000" in page.text
    assert "-0.30000" in page.text and f"{-0.3 * ratio:+.5f}" in page.text
    assert "matrix_lr" in page.text
    expected = welch([base + s - 0.3 for s in shifts.values()], [base + s for s in shifts.values()])
    assert f"{expected.t:.2f}" in page.text and f"{expected.df:.1f}" in page.text
    assert "demo B is better than demo A by at least 0.005 nats" in page.text
    assert all(reference.startswith(("data:", "#")) for reference in page.references)


def test_a_run_is_kept_as_a_record_without_paths(run, tmp_path):
    real_runs.main([str(run), "tiny", "--note", "a remark"], tmp_path)
    text = (tmp_path / "tiny.json").read_text()
    record = json.loads(text)
    assert record["note"] == "a remark" and record["command"]
    assert str(run.parent) not in text and not {"run_dir", "data_dir", "run_id"} & set(record["changed"])
    loaded = load_run(run)
    assert record["bpb"] == {mode: round(value, 5) for mode, value in loaded.bpb.items()}
    assert record["changed"]["vocab_size"] == 400 and record["artifact"]["bytes"] == loaded.artifact.size
    page = real_runs.rendered("a\n<!-- run:tiny,tiny -->\nold\n<!-- /run -->\nb\n", tmp_path)
    assert page.startswith("a\n<!-- run:tiny,tiny -->\n") and page.endswith("<!-- /run -->\nb\n") and "old" not in page
    assert f"`{record['command']}`; " in page and "; a remark." in page
    assert "| bits per byte, lora_ttt | {0} | {0} |".format(f"{loaded.bpb['lora_ttt']:.5f}") in page
    assert "| time waiting for data | {0:.2%} | {0:.2%} |".format(record["data_wait"]) in page


def test_a_record_has_the_losses_of_the_steps_of_another(run, tmp_path):
    (tmp_path / "other.json").write_text(json.dumps({"loss": {"2": 9.0, "3": 8.5, "100000": 0.1}}))
    real_runs.main([str(run), "tiny", "--like", "other"], tmp_path)
    losses = {str(r["step"]): round(r["loss"], 4) for r in RunDir(run, writes=False).metrics() if "loss" in r}
    assert json.loads((tmp_path / "tiny.json").read_text())["loss"] == {step: losses[step] for step in ("2", "3")}


def test_losses_of_runs_that_logged_other_steps_stand_in_the_order_of_steps():
    records = [{"loss": {"1": 9.0, "55": 4.9, "600": 2.5}}, {"loss": {"5": 9.6, "100": 4.4, "600": 2.6}}]
    steps = [
        line.title.removeprefix("train loss, step ") for line in real_runs.lines_of(records) if "loss" in line.title
    ]
    assert steps == ["1", "5", "55", "100", "600"]


def test_records_that_differ_by_their_seeds_have_a_mean(tmp_path):
    base = {"machine": "A GPU", "versions": {}, "preset": "demo", "commit": "c" * 40, "tokens": 1000}
    records = [
        {**base, "changed": {"seed": seed}, "bpb": {"plain": bpb}} for seed, bpb in ((1, 1.25), (2, 1.5), (3, 2))
    ]
    lines = real_runs.table("abc", records)
    assert "|  | a | b | c | mean ± standard deviation |" in lines
    assert "| bits per byte, plain | 1.25000 | 1.50000 | 2.00000 | 1.58333 ± 0.38188 |" in lines
    assert "| tokens | 1,000 | 1,000 | 1,000 |  |" in lines
    others = [{**records[0], "changed": {"seed": 4, "iterations": 5}}, {**records[0], "commit": "d" * 40}, records[0]]
    for other in others:
        assert not real_runs.differ_by_seed([*records, other])


@pytest.mark.parametrize(
    ("changes", "machine"),
    [({}, "A GPU"), ({"world_size": 2}, "2 x A GPU"), ({"gpus": []}, "A CPU, 2 threads")],
)
def test_a_record_says_what_ran_and_on_how_much(run, tmp_path, changes, machine):
    copied = copy_run(run, tmp_path / "copy")
    data = RunDir(copied).config().data.data_dir
    words = ["pgolf", "train", "pr1530", "--data-dir", data, "--run-dir", "/home/somebody/here", "seed=1"]
    origin = {"command": words, "gpus": ["A GPU", "A GPU"], "world_size": 1, "cpu": "A CPU", "threads": 2, **changes}
    file = copied / "provenance.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | origin))
    record = real_runs.record_of(RunDir(copied, writes=False))
    assert record["machine"] == machine
    assert record["command"] == "pgolf train pr1530 --data-dir $CORPUS --run-dir here seed=1"


def test_a_later_stage_leaves_where_the_run_began(run, tmp_path, monkeypatch):
    copied = copy_run(run, tmp_path / "copy")
    first = json.loads((copied / "provenance.json").read_text())
    directory = RunDir(copied)
    directory.start(directory.config(), first["data_sha256"])
    monkeypatch.setattr(run_module, "_source_archive", lambda: b"other sources")
    directory.start(directory.config(), first["data_sha256"])
    origin = json.loads((copied / "provenance.json").read_text())
    later = origin.pop("later")
    assert origin == first and len(later) == 2
    assert {path.name for path in copied.glob("source*.zip")} == {
        "source.zip",
        f"source-{hashlib.sha256(b'other sources').hexdigest()[:12]}.zip",
    }
    text = report(copied).text
    assert first["source_sha256"] in text and text.count("with other sources") == 1


def test_the_snapshot_has_every_source(run):
    with zipfile.ZipFile(run / "source.zip") as archive:
        kept = set(archive.namelist())
    root = Path(real_runs.__file__).parent.parent
    sources = [p for folder in ("model", "pgolf_kernels", "csrc") for p in (root / folder).rglob("*.*") if p.is_file()]
    named = {
        str(p.relative_to(root)) for p in sources if p.suffix not in {".pyc", ".so", ".pyi", ".md", ".zst", ".tmp"}
    }
    assert named == kept


def test_runs_of_other_code_are_another_group(run, tmp_path):
    other = copy_run(run, tmp_path / "other", seed=5)
    provenance = json.loads((other / "provenance.json").read_text())
    (other / "provenance.json").write_text(json.dumps(provenance | {"source_sha256": "f" * 64}))
    page = comparison(run, other)
    assert "2 runs in 2 groups" in page.text and "source code (hash)" in page.text and "f" * 12 in page.text


def test_a_gain_below_the_threshold_is_no_record(run, tmp_path):
    shifts = {1: 0.0, 2: 0.002, 3: 0.001}
    ratio = load_run(run).nats["lora_ttt"] / load_run(run).bpb["lora_ttt"]
    small = 0.9 * RECORD_NATS / ratio
    a = [copy_run(run, tmp_path / f"a{seed}", seed=seed, shift=shift) for seed, shift in shifts.items()]
    b = [copy_run(run, tmp_path / f"b{seed}", seed=seed, shift=s - small, scalar_lr=0.1) for seed, s in shifts.items()]
    page = comparison(*a, *b)
    assert "demo B is not shown to be better than demo A by at least 0.005 nats" in page.text


def test_scores_that_are_not_legal_are_marked_and_make_no_record(run, tmp_path):
    shifts = {1: 0.0, 2: 0.02, 3: 0.01}
    a = [copy_run(run, tmp_path / f"a{seed}", seed=seed, shift=shift) for seed, shift in shifts.items()]
    b = [copy_run(run, tmp_path / f"b{seed}", seed=seed, shift=s - 0.3, matrix_lr=0.5) for seed, s in shifts.items()]
    clean = comparison(*a, *b)
    assert "not legal" not in clean.text and "is better than demo A" in clean.text
    result = json.loads((b[1] / "result.json").read_text())
    result["evaluation"]["lora_ttt"]["legal"] = False
    (b[1] / "result.json").write_text(json.dumps(result))
    page = comparison(*a, *b)
    assert "1 of 3 not legal" in page.text and "not legal: lora_ttt (the evaluation says so)" in page.text
    (lora,) = (part for part in page.text.split("Score: ") if part.startswith("lora_ttt"))
    (plain,) = (part for part in page.text.split("Score: ") if part.startswith("plain"))
    assert "better than demo A by" not in lora and "better than demo A by" in plain
    assert "is not said: not every score is legal (b2: the evaluation says so)" in lora
    assert "bits per byte, lora_ttt, not a legal score" in report(b[1]).text
    assert "not a legal score" not in report(b[0]).text


@pytest.mark.parametrize("label", ["own", "lora-ttt"])
def test_what_the_verifier_fails_is_not_legal(run, tmp_path, label):
    copied = copy_run(run, tmp_path / "copy", seed=5)
    assert load_run(copied).objections("lora_ttt") == []
    checks = [Check("causality", FAIL, "1 of 9 scores changed"), Check("normalisation", PASS, "")]
    (copied / f"verify_{label}.json").write_text(Report(checks).to_json())
    assert load_run(copied).objections("lora_ttt") == ["pgolf verify: causality"]
    assert load_run(copied).objections("plain") == []
    assert "not legal: lora_ttt (pgolf verify: causality)" in comparison(run, copied).text


def test_single_runs_are_compared_without_a_test(run, tmp_path):
    other = copy_run(run, tmp_path / "other", shift=-0.1, matrix_lr=0.5)
    page = report(run, other, out=tmp_path / "report.html")
    assert "that needs two runs in each" in page.text and "-0.10000" in page.text
    assert page.source.count("Where it comes from") == 2 and "2 runs compared" in page.text
    assert all(reference.startswith(("data:", "#")) for reference in page.references)


def test_what_a_run_lacks_is_said(run, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(run / "config.json", bare)
    page = report(bare)
    assert "There is no artifact" in page.text and "No ledger was kept" in page.text
    assert not page.images and "There is no provenance.json" in page.text
    without_data = copy_run(run, tmp_path / "moved", data_dir=str(tmp_path / "nowhere"))
    page = report(without_data)
    assert "The data set was not found" in page.text and "An example text" not in page.text
    assert len(page.images) >= 6


def test_another_data_set_in_the_place_of_the_runs_own_is_not_used(run, tmp_path):
    copied = copy_run(run, tmp_path / "copy")
    provenance = json.loads((copied / "provenance.json").read_text())
    (copied / "provenance.json").write_text(json.dumps(provenance | {"data_sha256": "0" * 64}))
    assert "is not the data set of this run" in report(copied).text


def test_what_the_verifier_found(run, tmp_path):
    copied = copy_run(run, tmp_path / "copy")
    checks = [Check("causality", PASS, "0 of 9 scores changed"), Check("normalisation", FAIL, "sums to 1.02 <at most>")]
    (copied / "verify_plain.json").write_text(Report(checks).to_json())
    page = report(copied)
    assert "Verified independently (plain): NOT legal." in page.text
    assert all(text in page.text for check in checks for text in (check.name, check.status, check.figure))
    checks[1] = Check("train time", SKIPPED, "no record")
    (copied / "verify_plain.json").write_text(Report(checks).to_json())
    assert "(plain): legal as far as checked; 1 skipped: train time." in report(copied).text
    (copied / "verify_plain.json").write_text('{"checks": [1]}')
    with pytest.raises(ConfigError, match="not what `pgolf verify` writes"):
        report(copied)


@pytest.mark.parametrize("damage, word", [("cut off", "unfinished"), ("defects", "not a legal score")])
def test_an_evaluation_that_is_not_a_legal_score(run, tmp_path, damage, word):
    copied = copy_run(run, tmp_path / "copy")
    with np.load(copied / "ledger_plain.npz") as file:
        arrays = dict(file)
    if damage == "cut off":
        arrays["nll"][-5:], arrays["scored"][-5:] = np.nan, False
        for side in ("start", "end"):
            arrays[side] = np.minimum(arrays[side], len(arrays["nll"]) - 5)
    else:
        header = json.loads(arrays["header"].tobytes()) | {"defects": ["scores tokens twice"]}
        arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    np.savez(copied / "ledger_plain.npz", **arrays)
    assert word in report(copied).text
    reason = "its ledger is unfinished" if damage == "cut off" else "scores tokens twice"
    assert load_run(copied).objections("plain") == [reason]


@pytest.mark.parametrize(
    "name, error, message",
    [
        ("config.json", ConfigError, r"config\.json: not JSON"),
        ("result.json", ConfigError, r"result\.json: not JSON"),
        ("provenance.json", ConfigError, r"provenance\.json: not a JSON object"),
        ("ledger_plain.npz", LegalityError, "not a ledger"),
        ("model.pgolf", ArtifactError, r"model\.pgolf: preamble: got 20 bytes"),
    ],
)
def test_damaged_parts_are_named(run, tmp_path, name, error, message):
    copied = copy_run(run, tmp_path / "copy")
    (copied / name).write_bytes((copied / name).read_bytes()[:20])
    with pytest.raises(error, match=message):
        write_report([copied])
    assert (
        not (copied / "report.html").exists()
        or (copied / "report.html").read_text() == (run / "report.html").read_text()
    )


def test_folders_that_hold_no_run(tmp_path, run):
    with pytest.raises(ConfigError, match=r"no config\.json, wanted the folder of a run"):
        write_report([tmp_path])
    with pytest.raises(ConfigError, match="no run named"):
        write_report([])
    with pytest.raises(PgolfError, match="cannot be written"):
        write_report([run], tmp_path / "no" / "report.html")


@pytest.mark.skipif(find_chromium() is None, reason="needs Chromium")
def test_a_browser_shows_it_all(run, page, tmp_path):
    both = write_report([run, copy_run(run, tmp_path / "other", seed=5, shift=0.01)], tmp_path / "both.html")
    # Processes of the browser that outlive its first still write into the profile: no folder to be removed at once.
    with Browser(tmp_path / "profile") as browser:
        for path in (run / "report.html", both):
            for width in (1100, 390):
                browser.open(path, width, 900)
                browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
                sizes = browser.evaluate(
                    "Promise.all([...document.images].map(i => i.decode().then(() => [i.naturalWidth, i.clientWidth])))"
                )
                assert len(sizes) >= 7 and all(natural > 100 and shown > 100 for natural, shown in sizes)
                assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
                # An artifact of the full size has this many characters, the tiny run's has fewer.
                assert browser.evaluate(
                    "[...document.querySelectorAll('.tile b')].every("
                    "b => (b.textContent = '15,662,323', b.scrollWidth <= b.clientWidth))"
                )
                assert browser.complaints == []
                outside = [url for url in browser.requests if not url.startswith("data:")]
                assert [unquote(url) for url in outside] == [f"file://{path}"]


class TestStatistics:
    @given(st.floats(2, 300), st.floats(-12, 12))
    def test_the_tail_is_the_integral_of_the_density(self, df, t):
        # Substituting t = s / (1 - s) makes [t, inf) a finite range; Gauss-Legendre over 40 pieces.
        nodes, weights = np.polynomial.legendre.leggauss(20)
        edges = np.linspace(abs(t) / (1 + abs(t)), 1, 41)
        s = (edges[:-1, None] + edges[1:, None] + (edges[1:, None] - edges[:-1, None]) * nodes) / 2
        x = s / (1 - s)
        log_norm = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
        density = np.exp(log_norm - (df + 1) / 2 * np.log1p(x * x / df)) / (1 - s) ** 2
        tail = float((density * weights * (edges[1:, None] - edges[:-1, None]) / 2).sum())
        assert t_tail(t, df) == pytest.approx(tail if t >= 0 else 1 - tail, rel=2e-4, abs=1e-12)

    @pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 4.0, 50.0])
    def test_closed_forms(self, t):
        assert t_tail(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, rel=1e-10, abs=1e-15)
        assert t_tail(t, 2) == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)), rel=1e-9, abs=1e-15)
        assert t_tail(-t, 3) == pytest.approx(1 - t_tail(t, 3))
        assert t_tail(t, 1e7) == pytest.approx(0.5 * math.erfc(t / math.sqrt(2)), rel=1e-4, abs=1e-12)

    def test_table_values(self):
        """Critical values as printed in tables of the distribution (two-sided 5 %, one-sided 1 %)."""
        assert 2 * t_tail(2.776, 4) == pytest.approx(0.05, abs=5e-5)
        assert t_tail(6.965, 2) == pytest.approx(0.01, abs=5e-5)
        assert t_tail(2.764, 10) == pytest.approx(0.01, abs=5e-5)

    def test_welch(self):
        a, b = [2.0, 4.0, 6.0], [1.0, 2.0, 3.0, 4.0]
        test = welch(a, b)
        va, vb = 4 / 3, (5 / 3) / 4
        assert test.difference == 1.5
        assert test.t == pytest.approx(1.5 / math.sqrt(va + vb))
        assert test.df == pytest.approx((va + vb) ** 2 / (va**2 / 2 + vb**2 / 3))
        assert test.p == pytest.approx(2 * t_tail(test.t, test.df))
        assert welch(b, a).p == pytest.approx(test.p)
        assert welch(a, b, 1.5).t == pytest.approx(0)

    def test_one_sided(self):
        a, b = [1.0, 1.1, 0.9], [2.0, 2.1, 1.9]
        assert welch(a, b, -0.5, one_sided=True).p < 0.01
        assert welch(a, b, -1.0, one_sided=True).p == pytest.approx(0.5)
        assert welch(b, a, -0.5, one_sided=True).p > 0.99

    def test_groups_that_say_nothing(self):
        assert welch([1.0], [1.0, 2.0]) is None
        assert welch([1.0, 1.0], [2.0, 2.0]) is None
        assert math.isnan(summarize([1.0]).sd)
        with pytest.raises(ValueError, match="wanted at least one"):
            summarize([])


def test_the_data_set_of_the_run_is_checked_by_its_fingerprint(run):
    loaded = load_run(run)
    assert loaded.dataset.fingerprint == loaded.provenance["data_sha256"]
    assert open_dataset(loaded.config.data.data_dir).fingerprint == loaded.dataset.fingerprint
