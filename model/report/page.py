"""`pgolf report RUN...`: what came out of one run or several, as one HTML page that opens offline."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from model.errors import ConfigError
from model.files import atomic_write
from model.report.compare import compare_runs
from model.report.html import details, join, page, tag
from model.report.load import load_run
from model.report.sections import describe_run


def write_report(run_dirs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str] | None = None) -> Path:
    """Writes the report about these runs' folders and returns its path (default: report.html in the first folder).

    One run gets its whole story; several get a comparison, runs that differ by their seed alone as one group, and each
    run's story below it, folded up.
    Raises ConfigError for a folder that holds no run, what damaged parts of a run raise, and PgolfError when `out`
    cannot be written.
    """
    if not run_dirs:
        raise ConfigError("report: no run named, wanted the folder of one run or more")
    runs = [load_run(path) for path in run_dirs]
    target = Path(run_dirs[0]) / "report.html" if out is None else Path(out)
    if len(runs) == 1:
        title = f"Run {runs[0].name}"
        body = [tag("h1", title), *describe_run(runs[0])]
    else:
        title = f"{len(runs)} runs compared"
        links = join(tag("a", run.name, href=f"#run{i}") for i, run in enumerate(runs))
        body = [tag("h1", title), tag("nav", links), *compare_runs(runs)]
        for i, run in enumerate(runs):
            story = tag("div", join(describe_run(run, level="h3"), "\n"), id=f"run{i}")
            body.append(details(tag("h2", run.name), story, class_="run"))
    with atomic_write(target, "w") as file:
        file.write(page(title, body))
    return target
