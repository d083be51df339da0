"""The report: one self-contained HTML page about one run or several, see `write_report`."""

from model.report.page import write_report

__all__ = ["write_report"]
