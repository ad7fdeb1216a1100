"""An audit as a page that a person enjoys, and as Markdown."""

from pathlib import Path

from palimpsest.audit.results import Audit
from palimpsest.files import write_text
from palimpsest.report.html import render_html
from palimpsest.report.markdown import render_markdown

__all__ = ["render_html", "render_markdown", "write_report"]


def write_report(audit: Audit, folder: str | Path) -> Path:
    """Write `report.html` and `report.md` into a folder, each whole or not at all.

    Returns:
        The page's path.

    Raises:
        StorageError: the folder cannot be written.
    """
    page = Path(folder) / "report.html"
    write_text(page, render_html(audit))
    write_text(page.with_suffix(".md"), render_markdown(audit))
    return page
