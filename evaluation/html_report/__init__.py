"""The evaluation as one self-contained HTML file."""

from evaluation.html_report.page import write_html_report
from evaluation.html_report.provenance import run_provenance

__all__ = ["run_provenance", "write_html_report"]
