"""The report: one HTML file with everything in it, made from the local record alone."""

from lightning_slt.publish.html.page import report_html, write_report

__all__ = ["report_html", "write_report"]
