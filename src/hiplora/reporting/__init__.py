"""Reports: a results dictionary as a terminal table, as one self-contained HTML page, and as figure files.

The room reads results and draws; it measures nothing and knows no model. matplotlib, jinja2 and rich are
loaded when something is rendered, not when the room is imported.
"""

from hiplora.reporting.merge_page import render_merge_html, save_merge_html
from hiplora.reporting.merge_summary import conflict_table
from hiplora.reporting.page import render_html, render_inspection_html, save_figures, save_report
from hiplora.reporting.terminal import print_summary

__all__ = [
    "conflict_table",
    "print_summary",
    "render_html",
    "render_inspection_html",
    "render_merge_html",
    "save_figures",
    "save_merge_html",
    "save_report",
]
