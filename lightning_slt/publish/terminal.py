"""A run in a terminal: the words of the report, its numbers as a table, its curves as sparklines."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lightning_slt.influence_record import InfluenceEstimate
from lightning_slt.publish.diagnoses import diagnosis, diagnostics, diagnostics_sentence
from lightning_slt.publish.influence_tables import suspect_rows
from lightning_slt.publish.phrases import count_of, number, signed, with_error
from lightning_slt.publish.render import clean
from lightning_slt.publish.run import MonitorRecord, Run
from lightning_slt.publish.susceptibility_rows import WHOLE_SHIFT, cells, course, few
from lightning_slt.publish.words import (
    KIND_WORDS,
    SUSCEPTIBILITY,
    cost_of,
    headline,
    offline_only,
    susceptibility_verdict,
    transition_sentences,
)
from lightning_slt.record import Estimate

BLOCKS = "▁▂▃▄▅▆▇█"
GOOD, BAD, RULE, MUTED = "cyan", "yellow", "magenta", "bright_black"
WIDTH = 72
"""Columns of a curve, at the most."""
LEAST_WIDTH = 10
NARROW = 66
"""Columns of a terminal below which the table of estimates has its numbers and whether they are valid alone."""
SUSPECTS = 10
_GLUE = "\ue000"
"""For private use, so that no text has it."""
GROUPS = 10
"""Groups of data that each component has in the table of susceptibility."""


def story(run: Run, rows: int = 20) -> RenderableType:
    """The whole story, ready for ``rich.console.Console.print``.

    Args:
        run: what was read from the record.
        rows: estimates in the table, evenly taken where there are more.
    """
    monitor = run.main
    parts: list[RenderableType] = [
        Panel(Group(*map(_Prose, headline(run))), title=_plain(run.title), title_align="left")
    ]
    for each in run.monitors:
        curves = _Fitted(partial(_curves, each))
        parts.append(Group(_plain(each.name, style="bold"), curves) if len(run.monitors) > 1 else curves)
    parts.append(_Fitted(partial(_estimates, monitor.estimates, rows)))
    for found in (_transitions(monitor), _suspects(monitor)):
        parts += [found] if found is not None else []
    for each in run.monitors:
        if each.susceptibilities:
            parts.append(_Fitted(partial(_susceptibility, each, len(run.monitors) > 1)))
    parts.append(_diagnostics(run))
    cost = cost_of(run)
    parts += [Text(cost)] if cost else []
    spaced: list[RenderableType] = []
    for part in parts:
        spaced += [part, Text()]
    return Group(*spaced[:-1])


class _Fitted:
    """What is drawn for the width that there is.

    Args:
        draw: is given the columns of the terminal.
    """

    def __init__(self, draw: Callable[[int], RenderableType]) -> None:
        self._draw = draw

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._draw(options.max_width)


class _Prose:
    """Sentences whose lines do not end between a number and its error.

    Args:
        text: of the run, shown as it is.
        style: of all of it.
    """

    def __init__(self, text: str, style: str = "") -> None:
        # a library that wraps at every white space has no space that it would not break at
        self._text = Text(clean(text).replace(" ± ", f"{_GLUE}±{_GLUE}"), style=style)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self._text.wrap(console, options.max_width):
            yield Text(line.plain.replace(_GLUE, " "), style=self._text.style)


def _plain(text: str, style: str = "") -> Text:
    """A text of the run as it is: neither control characters nor markup act on the terminal."""
    return Text(clean(text), style=style)


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """Heights as blocks, the mean of neighbours where there are more than fit; a dot where nothing is known.

    Example:
        >>> sparkline([0.0, 1.0, 2.0, 7.0, float("nan")])
        '▁▂▃█·'
    """
    columns = _columns(values, width)
    known = [v for v in columns if math.isfinite(v)]
    if not known:
        return "·" * len(columns)
    low, high = min(known), max(known)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((v - low) * scale)] if math.isfinite(v) else "·" for v in columns)


def _columns(values: Sequence[float], width: int) -> list[float]:
    count = min(width, len(values))
    columns = []
    for k in range(count):
        part = values[k * len(values) // count : (k + 1) * len(values) // count]
        known = [v for v in part if math.isfinite(v)]
        columns.append(sum(known) / len(known) if known else math.nan)
    return columns


def _curves(monitor: MonitorRecord, width: int) -> Table:
    """LLC (valid estimates only) and loss over training, the whole of both in ``width`` columns."""
    estimates = monitor.estimates
    rows = []
    llc = [e.mean if e.valid else math.nan for e in estimates]
    for name, values, style, none in (
        ("LLC", llc, GOOD, "nothing valid"),
        ("loss", [e.init_loss for e in estimates], "", "not finite"),
    ):
        known = [v for v in values if math.isfinite(v)]
        rows.append((name, values, style, f"{number(min(known))} to {number(max(known))}" if known else none))
    beside = max(len(name) for name, *_ in rows) + max(len(ends) for *_, ends in rows) + 6
    columns = max(LEAST_WIDTH, min(WIDTH, width - beside, len(estimates)))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, values, style, ends in rows:
        table.add_row(Text(name, style="bold"), Text(sparkline(values, columns), style=style), Text(ends, style=MUTED))
    marks = _marks(monitor, columns)
    if marks.strip():
        table.add_row("", Text(marks, style=RULE), Text("transitions", style=MUTED))
    if not all(e.valid for e in estimates):
        table.add_row("", Text("· not valid: not drawn", style=BAD), "")
    return table


def _marks(monitor: MonitorRecord, columns: int) -> str:
    """The kind of each standing transition below the column it happened in."""
    estimates, log = monitor.estimates, monitor.transitions
    width = min(columns, len(estimates))
    marks = [" "] * width
    for t in log.standing if log is not None else ():
        later = sum((e.step or 0) < t.step for e in estimates)
        marks[min(later * width // max(len(estimates), 1), width - 1)] = t.kind
    return "".join(marks)


def _estimates(estimates: Sequence[Estimate], rows: int, width: int) -> Table:
    few = list(estimates)
    title = count_of(len(estimates), "estimate")
    if len(few) > rows:
        few = [few[round(k * (len(few) - 1) / max(rows - 1, 1))] for k in range(rows)] if rows > 1 else few[-1:]
        title += f", {rows} of them"
    whole = width >= NARROW
    table = Table(title=title, title_justify="left", title_style="bold", header_style=MUTED, pad_edge=False, box=None)
    for name in ("step", "LLC", "loss", *(("R-hat", "ESS", "seconds") if whole else ())):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    if whole:
        table.add_column("remarks", overflow="fold", ratio=1)
    above = ""
    for e in few:
        remarks = "; ".join(remark.text for remark in diagnosis(e))
        cells: list[RenderableType] = [
            f"{e.step:,}" if e.step is not None else "",
            Text(with_error(e.mean, e.se), style=GOOD if e.valid else BAD),
            number(e.init_loss),
        ]
        verdict = Text("valid", style=GOOD) if e.valid else Text("NOT VALID", style=f"bold {BAD}")
        if whole:
            said = "as above" if remarks and remarks == above else remarks
            table.add_row(*cells, number(e.rhat), number(e.ess), number(e.seconds), verdict, _plain(said))
        else:
            table.add_row(*cells, verdict)
        above = remarks
    return table


def _transitions(monitor: MonitorRecord) -> Group | None:
    log = monitor.transitions
    if log is None or not (log.reports or log.offline):
        return None
    lines: list[RenderableType] = [Text("Transitions", style="bold")]
    for report in log.reports:
        t = report.transition
        gone = t.state == "retracted"
        head = Text(f"  step {t.step:,.0f}  {KIND_WORDS[t.kind]} ", style=MUTED if gone else RULE)
        head.append(f"({t.state})", style=MUTED)
        lines.append(head)
        style = MUTED if gone else ""
        lines += [Padding(_Prose(said, style), (0, 0, 0, 4)) for said in transition_sentences(report)]
    for t in offline_only(log):
        text = f"  step {t.step:,.0f}  {KIND_WORDS[t.kind]} (found afterwards): LLC {signed(t.llc_change)}, loss "
        lines.append(Text(text + signed(t.loss_change), style=RULE))
    return Group(*lines)


def _suspects(monitor: MonitorRecord) -> Group | None:
    measured = [i for i in monitor.influences if len(i.train_index)]
    if not measured:
        return None
    last: InfluenceEstimate = measured[-1]
    # the numbers are those of the last firing, and need not fall from one row to the next
    by = " at" if last.suspicion is None else ", ranked over all firings up to"
    where = f"{by} step {last.step:,}" if last.step is not None else ""
    title = Text(f"Likely wrong labels and outliers{where}", style="bold")
    table = Table(header_style=MUTED, pad_edge=False, box=None)
    for name in ("", "sample", "label", "mean loss over\nthe posterior", "loss", "rank by\nloss", "how it looks"):
        words = name in ("label", "how it looks")
        table.add_column(name, justify="left" if words else "right", no_wrap=not words)
    for rank, index, group, mean, mean_se, plain, plain_rank, _, _, media in suspect_rows(last, SUSPECTS):
        path = monitor.folder / "samples" / media
        looks = ""
        if path.with_suffix(".txt").exists():
            looks = path.with_suffix(".txt").read_text(encoding="utf-8", errors="replace").strip()[:60]
        elif path.with_suffix(".png").exists():
            looks = f"samples/{media}.png"
        shown = "n/a" if mean is None else with_error(mean, math.nan if mean_se is None else mean_se)
        cells = (str(rank), str(index), str(group), shown, number(plain), str(plain_rank))
        table.add_row(*map(_plain, cells), _plain(looks))
    return Group(title, table)


def _susceptibility(monitor: MonitorRecord, named: bool, width: int) -> Group:
    """What it is, whether it may be read, and a line for each component and group with its course."""
    history = monitor.susceptibilities
    last = history[-1]
    rows = few(cells(last), GROUPS)
    title = "Susceptibility: which component answers to which data"
    heading = f"{monitor.name}: {title[0].lower()}{title[1:]}" if named else title
    lines: list[RenderableType] = [_plain(heading, style="bold"), Text(SUSCEPTIBILITY, style=MUTED)]
    lines += [_Prose(susceptibility_verdict(history), "" if last.valid else BAD)]
    lines += [_Prose(note, MUTED) for note in last.notes]
    if len(rows) <= len(last.groups):
        lines.append(Text(f"Of {len(last.groups):,} groups the {GROUPS} that stand out most:", style=MUTED))
    table = Table(header_style=MUTED, pad_edge=False, box=None)
    table.add_column("component", overflow="fold")
    table.add_column("data", overflow="fold")
    table.add_column("susceptibility", justify="right", no_wrap=True)
    table.add_column("in errors", justify="right", no_wrap=True)
    drawn = len(history) > 1 and width >= NARROW
    if drawn:
        table.add_column("over training", no_wrap=True)
    for place in range(len(last.components)):
        for cell in (row[place] for row in rows):
            look = BAD if not last.valid else GOOD if cell.clear else MUTED
            found = dict.fromkeys((found.step for found in history), math.nan)
            found |= {step: at.chi for step, at, valid in course(history, cell.component, cell.group) if valid}
            table.add_row(
                _plain(cell.component if cell.group is None else ""),
                _plain(WHOLE_SHIFT if cell.group is None else cell.group),
                Text(with_error(cell.chi, cell.se), style=look),
                Text(number(cell.stands_out, 2), style=look),
                *([Text(sparkline(list(found.values()), width // 3))] if drawn else []),
            )
    lines.append(table)
    lines.append(Text("In errors: the distance from zero in standard errors; below 3 it may be chance.", style=MUTED))
    return Group(*lines)


def _diagnostics(run: Run) -> Group:
    lines: list[RenderableType] = [Text("How far to trust it", style="bold")]
    for monitor in run.monitors:
        name = f"{monitor.name}: " if len(run.monitors) > 1 else ""
        lines.append(Padding(Text(f"{name}{diagnostics_sentence(monitor.estimates)}"), (0, 0, 0, 2)))
        for remark in diagnostics(monitor.estimates, monitor.step_given):
            style = BAD if remark.level == "bad" else MUTED
            item = Table.grid(padding=(0, 1, 0, 0))
            item.add_row(Text("  •", style=style), _plain(remark.text))
            lines.append(item)
    return Group(*lines)


__all__ = ["sparkline", "story"]
