"""The lines of `pgolf verify`: one check each, and what they say together."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

PASS, FAIL, IMPLIED, SKIPPED = "pass", "fail", "implied", "skipped"


@dataclass(frozen=True)
class Check:
    """One line of the report: `figure` says what was measured."""

    name: str
    status: str
    figure: str


@dataclass
class Report:
    """The checks in order of `scorer`, a mode or "module:function". `seed` drew the places; `other_files`: bytes of
    what a scorer reads beside the artifact."""

    checks: list[Check] = field(default_factory=list)
    scorer: str = ""
    seed: int = 0
    other_files: dict[str, int] = field(default_factory=dict)

    @property
    def legal(self) -> bool:
        """Whether nothing that was checked failed; `skipped` names what was not checked."""
        return not any(check.status in (FAIL, IMPLIED) for check in self.checks)

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed of themselves."""
        return [check.name for check in self.checks if check.status == FAIL]

    @property
    def skipped(self) -> list[str]:
        """Names of the checks that could not be made."""
        return [check.name for check in self.checks if check.status == SKIPPED]

    @property
    def verdict(self) -> str:
        """What the checks say in a few words: a skipped one is no proof."""
        if not self.legal:
            return "NOT legal"
        if not self.skipped:
            return "legal"
        return f"legal as far as checked; {len(self.skipped)} skipped: {', '.join(self.skipped)}"

    def add(self, check: Check) -> None:
        """Appends a check whose failure is implied where another one has failed before."""
        if check.status == FAIL and self.failed:
            check = Check(check.name, IMPLIED, check.figure)
        self.checks.append(check)

    def lines(self) -> list[str]:
        return [f"{check.status:8s} {check.name:20s} {check.figure}" for check in self.checks]

    def to_json(self) -> str:
        found = {
            "legal": self.legal,
            "verdict": self.verdict,
            "skipped": self.skipped,
            "seed": self.seed,
            "checks": [asdict(check) for check in self.checks],
        }
        return json.dumps(found, indent=2)
