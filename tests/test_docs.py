"""What the documentation says, held against the code: links, commands, flags, files, variables and figures."""

import ast
import importlib
import inspect
import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest

import pgolf_kernels
from model import cli
from model.environment import known_variables

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
# Options of other people's commands that the pages name.
FOREIGN = frozenset(
    {"--standalone", "--nproc_per_node", "--max-restarts", "--no-deps", "--find-links", "--inplace", "--all-files"}
    | {"--benchmark-storage", "--benchmark-compare", "--benchmark-compare-fail"}
)


def code_of(page: Path) -> list[str]:
    """Lines of indented and fenced blocks, and inline code; a line that ends in a backslash goes on in the next."""
    text = page.read_text().replace("\\\n", " ")
    fenced = [
        line for block in re.findall(r"^```(?:sh|text)?\n(.*?)^```", text, re.M | re.S) for line in block.split("\n")
    ]
    plain = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    indented = re.findall(r"^ {4}(\S.*)$", plain, re.M)
    return fenced + indented + re.findall(r"(?<!`)`([^`\n]+)`(?!`)", plain)


def command_of(words: list[str]) -> tuple[click.Command, list[str]] | None:
    """The click command that a line calls, and its arguments."""
    if "-m" in words and words[words.index("-m") + 1] == "model.train":
        return resolved(cli.cli.commands["train"]), words[words.index("-m") + 2 :]
    if not words or words[0].rpartition("/")[2] != "pgolf":
        return None
    command, rest = cli.cli, words[1:]
    while isinstance(command, click.Group) and rest and re.fullmatch("[a-z]+", rest[0]):
        assert rest[0] in command.commands, f"pgolf has no command {rest[0]}"
        command, rest = resolved(command.commands[rest[0]]), rest[1:]
    return command, rest


def resolved(command: click.Command) -> click.Command:
    if isinstance(command, cli.Deferred):
        return getattr(importlib.import_module(command._module), command._attribute)
    return command


def options_of(command: click.Command) -> set[str]:
    found = {name for p in command.params if isinstance(p, click.Option) for name in (*p.opts, *p.secondary_opts)}
    return found | {"--help", "--debug", "--version"}


def all_options(command: click.Command = cli.cli) -> set[str]:
    if isinstance(command, click.Group):
        return options_of(command).union(*(all_options(resolved(inner)) for inner in command.commands.values()))
    return options_of(command)


def words_of(line: str) -> list[str]:
    line = line.replace("...", "").partition(" # ")[0]
    try:
        words = shlex.split(line)
    except ValueError:
        return line.split()
    while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
        words = words[1:]
    return words


@EVERY_PAGE
def test_commands_have_the_options_that_they_are_shown_with(page):
    for line in code_of(page):
        found = command_of(words_of(line))
        if found is None:
            continue
        command, arguments = found
        named = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        assert named <= options_of(command), f"{page.name}: {line}: no {', '.join(sorted(named - options_of(command)))}"


@EVERY_PAGE
def test_variables_of_commands_are_understood(page):
    for line in code_of(page):
        if "model.train" in line:
            given = set(re.findall(r"(?:^|\s)([A-Z][A-Z_0-9]+)=", line))
            assert given <= known_variables(), f"{page.name}: {given - known_variables()}"


@EVERY_PAGE
def test_flags_exist_somewhere(page):
    bench = set(re.findall(r'"(--[a-z-]+)"', "".join(path.read_text() for path in ROOT.glob("bench/*.py"))))
    known = all_options() | bench | FOREIGN
    for line in code_of(page):
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*\b(?!-)", line):
            assert flag in known, f"{page.name}: {flag}"


@EVERY_PAGE
def test_make_targets_and_extras_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for line in code_of(page):
        if match := re.match(r"make ([a-z-]+)", line):
            assert match[1] in targets, f"{page.name}: {line}"
        for names in re.findall(r"pip install '?(?:\.|pgolf_kernels)\[([a-z,]+)\]", line):
            assert set(names.split(",")) <= set(extras), f"{page.name}: {line}"


@EVERY_PAGE
def test_files_and_modules_that_are_named_exist(page):
    for code in code_of(page):
        for name in re.findall(
            r"(?<![\w/.$-])((?:model|pgolf_kernels|csrc|bench|tests|scripts|examples|docs)/[\w./*-]*)", code
        ):
            if re.search(
                r"/_?X[_./]|/X$|scale_shift|_X\b", name
            ):  # a name that stands for any kernel, or the example's
                continue
            assert list(ROOT.glob(name.rstrip("./"))), f"{page.name}: {name}"
        for name in re.findall(r"python -m ((?:bench|model)[\w.]*)", code):
            assert importlib.util.find_spec(name), f"{page.name}: {name}"


@EVERY_PAGE
def test_variables_are_read_somewhere(page):
    sources = [
        p for folder in ("model", "pgolf_kernels", "bench", "scripts", "csrc") for p in ROOT.glob(f"{folder}/**/*.*")
    ]
    sources += [ROOT / "setup.py", ROOT / "Makefile", *ROOT.glob("tests/*.py")]
    code = "".join(path.read_text() for path in sources if path.suffix in {".py", ".sh", ".cpp", ".h", ".cu", ""})
    for name in re.findall(r"\bPGOLF_[A-Z_]+\b", page.read_text()):
        assert name in code, f"{page.name}: {name}"


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@EVERY_PAGE
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(path), f"{page.name}: {target}"


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\(([\w./-]+\.md)\)", (ROOT / "README.md").read_text()))
    pages = {str(page.relative_to(ROOT)) for page in PAGES} - {"README.md"}
    assert pages <= linked, f"not linked: {', '.join(sorted(pages - linked))}"


MEASURED = re.compile(r"\d[\d.,]*\s?(?:s|ms|µs|us|[GT]B/s|TFLOP/s|M?\s?tokens/s)\b|\|\s*ms\b|\bms\s*\|")
CONSTANTS = frozenset({"989 TFLOP/s", "600 s", "90 s"})  # a GPU's nominal rate, the challenge's budget, a limit


@EVERY_PAGE
def test_measured_figures_come_from_records(page):
    """Times and rates stand between the markers that bench.render fills, and nowhere else."""
    text = re.sub(r"<!-- (?:results|run):.*?<!-- /(?:results|run) -->", "", page.read_text(), flags=re.S)
    assert set(MEASURED.findall(text)) <= CONSTANTS, page.name


def test_the_picture_names_the_functions_that_the_model_calls():
    """docs/flow.svg has every exported function that model/ imports, and no other; files of others apart."""
    functions = {name for name in pgolf_kernels.__all__ if inspect.isfunction(getattr(pgolf_kernels, name))}
    imported = set()
    for path in ROOT.glob("model/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pgolf_kernels"):
                imported |= {alias.name for alias in node.names}
    picture = set(re.findall(r"\w+", (ROOT / "docs/flow.svg").read_text()))
    apart = {"byte_unshuffle", "attention_backend_info"}  # reads public files; asked by `pgolf doctor`
    assert picture & functions == imported & functions - apart


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md"])
def test_every_command_is_named(name):
    text = (ROOT / name).read_text()
    assert [
        command for command in cli.cli.commands if f"pgolf {command}" not in text and f"`{command}`" not in text
    ] == []
