# SPDX-License-Identifier: Apache-2.0
"""Numbers as pictures: figures and a page, from the files that others have written."""

from vsraq.report.figures import write_figures
from vsraq.report.page import REPORT_FILE, write_report

__all__ = ["REPORT_FILE", "write_figures", "write_report"]
