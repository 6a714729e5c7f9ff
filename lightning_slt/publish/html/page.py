"""A run as one HTML file that needs no network: sentences, charts, samples.

Texts that come from the run (names of groups, samples, reasons, settings) are escaped here, or handed over as JSON that
the page shows as text; the page's own policy forbids every request and every script from elsewhere.
"""

from __future__ import annotations

import html
import json
import os
import shlex
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Optional, Union

from lightning_slt.durable import write_whole
from lightning_slt.publish.html.data import page_data
from lightning_slt.publish.html.markup import Section
from lightning_slt.publish.html.sections import sections
from lightning_slt.publish.run import Run, load_run
from lightning_slt.publish.specs.parts import DARK, LIGHT

VENDORED = ("vega", "vega-lite", "vega-embed")


def write_report(
    folder: Union[str, os.PathLike[str]],
    output: Optional[Union[str, os.PathLike[str]]] = None,
    title: Optional[str] = None,
) -> Path:
    """Write the report of a run.

    Args:
        folder: of the run or of its record; see :func:`~lightning_slt.publish.run.load_run`.
        output: the file; None for ``report.html`` in the folder of the run's first monitor.
        title: heading; None for the names of the run's folders.

    Returns:
        The file.

    Raises:
        FileNotFoundError: where there is no record.
        IsADirectoryError: where ``output`` is a folder.
        OSError: where the file cannot be written.
    """
    if output is not None and Path(output).is_dir():
        raise IsADirectoryError(
            f"output={os.fspath(output)!r} (-o): is a folder. Name the file, such as {Path(output) / 'report.html'}."
        )
    run = load_run(folder)
    path = Path(output) if output is not None else run.main.folder / "report.html"
    html = report_html(run, title)
    try:
        write_whole(path, lambda temporary: temporary.write_text(html, encoding="utf-8", errors="replace"))
    except OSError as error:  # that of the system names a temporary file
        said = error.strerror or type(error).__name__
        # whoever calls this, in a program, at the end of a run or by the command, can give that one
        elsewhere = f"such as here: lightning-slt report {shlex.quote(os.fspath(folder))} -o report.html"
        raise OSError(f"{path}: cannot be written: {said}. Have it written to another file, {elsewhere}") from error
    return path


def report_html(run: Run, title: Optional[str] = None) -> str:
    """The page as text."""
    title = title if title is not None else run.title
    data = page_data(run)
    shown = sections(run, title, data)
    parts = {
        "title": html.escape(title),
        "css": _asset("page.css"),
        "contents": _contents(shown),
        "body": "\n".join(section.markup for section in shown),
        "footer": (
            "Written by lightning_slt from the run's local record. This file holds everything it shows and asks for "
            "nothing from the network. Charts: Vega, Vega-Lite and Vega-Embed (BSD 3-clause; notices in the source)."
        ),
        "data": as_script_text({**data, "palettes": {"light": LIGHT, "dark": DARK}}),
        "vendor": "\n".join(_vendored(name) for name in VENDORED),
        "script": _asset("page.js"),
    }
    pieces = _asset("page.html").split("{{")
    text = [pieces[0]]
    for piece in pieces[1:]:
        # in one pass: what is filled in is never looked at again, so no text of a run can name a part
        name, rest = piece.split("}}", 1)
        text += [parts[name], rest]
    return "".join(text)


def as_script_text(value: Any) -> str:
    """JSON that may stand inside ``<script>``: no ``<`` is left that could end or open an element.

    Example:
        >>> as_script_text({"a": "</script>"})
        '{"a":"\\\\u003c/script>"}'
    """
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _contents(shown: Sequence[Section]) -> str:
    links = "".join(f'<li><a href="#{section.id}">{html.escape(section.short)}</a></li>' for section in shown)
    return f"<ol>{links}</ol>"


def _asset(name: str) -> str:
    return files("lightning_slt.publish.html").joinpath(name).read_text(encoding="utf-8")


def _vendored(name: str) -> str:
    notice = _asset(f"vendor/{name}.LICENSE").replace("--", "- -")
    return f"<!--\n{name}\n{notice}\n-->\n<script>{_asset(f'vendor/{name}.min.js')}</script>"


__all__ = ["as_script_text", "report_html", "write_report"]
