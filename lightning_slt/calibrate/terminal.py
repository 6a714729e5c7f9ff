"""What was found, in a terminal."""

from __future__ import annotations

import math

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lightning_slt.calibrate.result import MAX_OVERHEAD, Calibration
from lightning_slt.publish.diagnoses import diagnostics
from lightning_slt.publish.phrases import count_of, number, with_error
from lightning_slt.publish.render import clean
from lightning_slt.publish.terminal import BAD, GOOD, MUTED
from lightning_slt.publish.words import duration
from lightning_slt.record import Estimate

Rows = list[tuple[str, str]]


def told(found: Calibration) -> RenderableType:
    """All of it but the settings, ready for ``rich.console.Console.print``."""
    parts: list[RenderableType] = [
        _verdict(found),
        _table("What the chains do", _chains(found)),
        _table("How far to trust it", _diagnostics(found)),
        _table("What it costs here", _cost(found)),
    ]
    spaced: list[RenderableType] = []
    for part in parts:
        spaced += [part, Text()]
    return Group(*spaced[:-1])


def _verdict(found: Calibration) -> Group:
    estimate = found.estimate
    head = Text(f"LLC {with_error(estimate.mean, estimate.se)}  ", style=f"bold {GOOD if estimate.valid else BAD}")
    head.append("valid" if estimate.valid else "NOT VALID")
    head.append(f"  of {clean(found.of)}, loss {number(estimate.init_loss)}", style=MUTED)
    lines: list[RenderableType] = [head]
    for remark in diagnostics([estimate]):
        item = Table.grid(padding=(0, 1, 0, 0))
        item.add_row(Text("•", style=BAD if remark.level == "bad" else MUTED), Text(clean(remark.text)))
        lines.append(item)
    return Group(*lines)


def _table(title: str, rows: Rows) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, show_header=False, padding=(0, 2, 0, 0)
    )
    table.add_column(style=MUTED, no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(f"  {name}"), Text(clean(value)))
    return table


def _chains(found: Calibration) -> Rows:
    e, config = found.estimate, found.config
    many = f"{found.chunk} of {e.num_chains} at a time" if e.method == "batched" else "one after another"
    step = "given" if config.sampler is not None and config.sampler.lr is not None else "found"
    share = found.step_share
    of_limit = f", {share:.0%} of the largest stable one" if share is not None else ""
    n = f"{e.num_samples:,}" if e.num_samples is not None else "n"
    draws = f"{count_of(e.num_chains, 'chain')} of {count_of(e.num_draws, 'draw')}, each of "
    return [
        ("path", f"{many} ({e.method}): {e.method_reason}"),
        ("step size", f"{number(e.step_size)}, {step}{of_limit}"),
        ("burn-in", count_of(e.num_burnin_steps, "step")),
        ("draws", draws + count_of(e.num_steps_bw_draws, "step")),
        ("batch size", f"{e.batch_size:,} samples"),
        ("localization", f"{number(e.localization)}, {_localization_from(found)}"),
        ("nbeta", f"{number(e.nbeta)}, {'given' if config.nbeta is not None else f'n / log n of {n} samples'}"),
        ("weights", f"{e.num_weights:,} move"),
    ]


def _localization_from(found: Calibration) -> str:
    return "given" if found.config.localization is not None else "from the size of these weights"


def _diagnostics(found: Calibration) -> Rows:
    e = found.estimate
    rows = [
        ("R-hat", f"{number(e.rhat)} (1 is mixed)"),
        ("ESS", f"{number(e.ess)} independent draws"),
        ("virial ratio", f"{number(e.virial)} (1 where the chains have their full width)"),
        ("heat of the step", _heat(found)),
        ("owed", _part_of_error(e.owed, "for directions that the chains have not reached", e)),
        ("lean", _part_of_error(abs(e.lean), "for chains that keep away from steep weights", e)),
        ("unsure heat", _part_of_error(e.unsure_heat, "for how much of the minibatches' heat reaches the loss", e)),
        ("slope", _slope(e)),
    ]
    if e.num_bad_chains:
        rows.append(("left out", f"{e.num_bad_chains} of {count_of(e.num_chains, 'chain')}"))
    return rows


def _heat(found: Calibration) -> str:
    share = found.heat_share
    if math.isnan(share):
        return "not known: the estimate is not above zero"
    return f"{share:.1%} of the estimate, taken off"


def _slope(estimate: Estimate) -> str:
    if math.isnan(estimate.slope):
        return "not measured"
    size = with_error(estimate.slope, estimate.slope_se)
    if math.isnan(estimate.slope_se):
        return f"{size}, of one chain, which does not tell how sure that is; 0 at a minimum"
    if not estimate.sure_of_slope:
        return f"{size}: none for sure; 0 at a minimum"
    return f"{size} more at the minimum beside these weights; 0 at one"


def _part_of_error(part: float, what: str, estimate: Estimate) -> str:
    if not part > 0:
        return "nothing"
    return f"{number(part)} {what}, {(part / estimate.se) ** 2:.0%} of the squared error"


def _cost(found: Calibration) -> Rows:
    first, later = found.estimate, found.later
    start = "from the chains of the first" if found.warm else "from the weights again, the first chains do not serve"
    again = f"LLC {with_error(later.mean, later.se)}" + ("" if later.valid else ", not valid")
    batch = count_of(found.training_batch, "sample")
    rows = [
        ("first firing", f"{duration(found.first_seconds)}, {_length(first)}"),
        ("second firing", f"{duration(found.later_seconds)}, {_length(later)}, {start}: {again}"),
        ("training step", f"{duration(found.training_seconds)}, forward and backward of {batch}"),
    ]
    if found.config.probe is not None:
        rows.append(("influence", f"of {found.config.probe:,} samples at the most, in both firings"))
    if found.peak_bytes is not None:
        rows.append(("GPU memory", f"{found.peak_bytes / 2**20:,.0f} MiB at the most, beside the model"))
    cadence = f"every_n_train_steps={found.every_n_train_steps}"
    rows.append(("cadence", f"{cadence} keeps firings like the second at or below {MAX_OVERHEAD:.0%} of the run"))
    rows.append(("", f"the first one takes as long as {count_of(found.first_in_steps, 'training step')}"))
    return rows


def _length(estimate: Estimate) -> str:
    steps = estimate.num_burnin_steps + estimate.num_draws * estimate.num_steps_bw_draws
    return f"{count_of(estimate.num_chains, 'chain')} of {count_of(steps, 'step')}"


__all__ = ["told"]
