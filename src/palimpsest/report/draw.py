"""The report in its place: drawn from a run folder's audit and recorded in its ledger."""

from pathlib import Path

from palimpsest.audit.evidence import RunFolder
from palimpsest.report import write_report


def draw(run: RunFolder) -> Path:
    """Draw a run's report, as a page and as Markdown, from its audit, and record both; returns the page's path."""
    page = write_report(run.read_audit(), run.path)
    for file in (page, page.with_suffix(".md")):
        run.add_file(file, "report written")
    return page
