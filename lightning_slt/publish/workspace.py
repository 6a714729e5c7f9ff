"""The wandb workspace "Structure over training" as code: which panels there are, and sending it to a server.

The plan of panels is plain data, so that every key it names can be held against those that are logged. Building the
workspace needs ``wandb-workspaces`` (``pip install 'lightning_slt[publish]'``) and no server; sending it needs one.
"""

from __future__ import annotations

import hashlib
import json
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Optional

from lightning_slt.publish.specs.chains import chains
from lightning_slt.publish.specs.curve import curve
from lightning_slt.publish.specs.filled import fields_of, for_wandb
from lightning_slt.publish.specs.parts import Spec

NAME = "Structure over training"
X_AXIS = "trainer/global_step"
"""The step that Lightning's WandbLogger logs beside every row: with it the LLC lines up with the training loss."""
WIDE, HALF, THIRD = 24, 12, 8
"""Columns of wandb's grid."""
_TIMEOUT = 10.0
_VALUE = "(.{1,2}|.*[^e]|.*[^s]e|.*[^_]se)"
"""What does not end in ``_se``, an error's own key, for engines of regular expressions that cannot look back."""


@dataclass(frozen=True)
class PanelPlan:
    """One panel.

    Attributes:
        kind: ``line`` and ``scalar`` show metrics, ``lines`` all metrics of a pattern, ``media`` pictures, ``table`` a
            table, ``chart`` a custom chart.
        title: above it.
        names: of what it shows, without the prefix; of ``chart`` the table that it draws, of ``lines`` the pattern.
        width, height: in cells of wandb's grid, 24 across.
        chart: of ``chart``, its name in :data:`CHARTS`.
    """

    kind: Literal["line", "lines", "scalar", "media", "table", "chart"]
    title: str
    names: tuple[str, ...]
    width: int = THIRD
    height: int = 6
    chart: str = ""


PLAN: tuple[tuple[str, tuple[PanelPlan, ...]], ...] = (
    (
        "1 Overview",
        (
            PanelPlan("chart", "LLC above the loss", ("tables/curve",), WIDE, 12, chart="curve"),
            PanelPlan("line", "LLC with its 95 % band, live", ("llc/mean", "llc/lo", "llc/hi"), HALF, 8),
            PanelPlan("line", "Valid (1: the LLC may be read)", ("diag/valid",), HALF, 8),
            PanelPlan("line", "Loss at the weights, and of the chains", ("loss/anchor", "loss/chain_mean"), HALF, 8),
            PanelPlan("scalar", "Transitions", ("transition/count",), THIRD // 2, 8),
            PanelPlan("media", "The run, at its end", ("media/history",), THIRD, 8),
        ),
    ),
    (
        "2 Diagnostics",
        (
            PanelPlan("line", "R-hat (1 is mixed)", ("diag/rhat",)),
            PanelPlan("line", "Effective draws", ("diag/ess",)),
            PanelPlan("line", "Chains left out", ("diag/n_bad_chains", "diag/nan_frac")),
            PanelPlan("media", "Chains of each firing", ("media/chains",), HALF, 10),
            PanelPlan("chart", "Chains of the last firing", ("tables/chains",), HALF, 10, chart="chains"),
        ),
    ),
    (
        "3 Influence",
        (
            PanelPlan("table", "Likely wrong labels and outliers", ("tables/influence_top",), HALF, 10),
            PanelPlan("media", "How they look", ("media/suspects",), HALF, 10),
            PanelPlan("line", "Share of the top tenth", ("influence/top_share",)),
            PanelPlan("line", "Largest influence", ("influence/max_abs",)),
            PanelPlan("media", "Between groups", ("media/influence",)),
        ),
    ),
    (
        "4 Transitions",
        (
            PanelPlan("line", "Score and its threshold", ("transition/score", "transition/threshold"), HALF, 8),
            PanelPlan("line", "Log-odds of the newest phase", ("transition/log_odds",), HALF, 8),
            PanelPlan("table", "Transitions", ("tables/transitions",), WIDE, 8),
            PanelPlan("media", "Free energy of the two phases", ("media/free_energy",), WIDE, 9),
        ),
    ),
    (
        "5 Cost",
        (
            PanelPlan("line", "Seconds of a firing", ("cost/seconds",), HALF),
            PanelPlan("line", "Share of the run's wall-clock", ("cost/overhead_frac",), HALF),
        ),
    ),
    (
        "6 Susceptibility",
        (
            PanelPlan("lines", "Of each component, to the whole shift", ("susceptibility/[^/]+/all",), HALF, 8),
            PanelPlan("lines", "Of each component, to each group", (f"susceptibility/[^/]+/group_{_VALUE}",), HALF, 8),
        ),
    ),
)
"""Sections in their order; what counts first comes first."""

CHARTS: dict[str, Spec] = {
    "curve": for_wandb(curve(), width=900),
    "chains": for_wandb(chains(band=False), width=480),
}
"""Custom charts: the report's own specs, filled in for wandb."""


def chart_id(name: str) -> str:
    """What a chart is called on a server: its content is part of the name, so that a newer spec is another chart.

    Example:
        >>> chart_id("curve").startswith("slt-curve-")
        True
    """
    digest = hashlib.sha256(json.dumps(CHARTS[name], sort_keys=True).encode()).hexdigest()
    return f"slt-{name}-{digest[:8]}"


def keys(prefix: str = "slt", losses: Sequence[str] = ()) -> list[str]:
    """Every key that the workspace names, in order.

    Example:
        >>> keys()[:2], len(keys(losses=["train/loss"])) - len(keys())
        (['slt/tables/curve', 'slt/llc/mean'], 1)
    """
    found = [panel for _, panels in PLAN for panel in panels if panel.kind != "lines"]
    return [*(f"{prefix}/{name}" for panel in found for name in panel.names), *losses]


def patterns(prefix: str = "slt") -> list[str]:
    """The patterns of keys whose names are the run's own, in order.

    Example:
        >>> patterns()[0]
        '^slt/susceptibility/[^/]+/all$'
    """
    return [_pattern(panel, prefix) for _, panels in PLAN for panel in panels if panel.kind == "lines"]


def _pattern(panel: PanelPlan, prefix: str) -> str:
    return f"^{prefix}/{panel.names[0]}$"


def build_workspace(
    entity: str, project: str, prefix: str = "slt", losses: Sequence[str] = (), charts: bool = True
) -> Any:
    """The workspace, not sent anywhere.

    Args:
        entity: user or team.
        project: project.
        prefix: of the monitor's keys, behind that of the logger where it has one (``exp-slt``).
        losses: keys of the module's own losses, drawn beside the anchor loss.
        charts: whether it has the custom charts, which must be on the server.

    Returns:
        A ``wandb_workspaces.workspaces.Workspace``.

    Raises:
        ModuleNotFoundError: without ``wandb-workspaces``.
        ValueError: for a prefix that no monitor has.
    """
    if not re.fullmatch(r"(.+-)?slt(_[a-z0-9_]+)?", prefix):
        raise ValueError(
            f"prefix={prefix!r}: expected that of a monitor, 'slt' or 'slt_<name>', with the logger's own prefix and a "
            "'-' before it where it has one: 'exp-slt' of WandbLogger(prefix='exp')."
        )
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise ModuleNotFoundError(
            "the workspace needs wandb-workspaces: pip install 'lightning_slt[publish]'."
        ) from error

    def panel(plan: PanelPlan, x: int, y: int) -> Any:
        layout = wr.Layout(x=x, y=y, w=plan.width, h=plan.height)
        named = [f"{prefix}/{name}" for name in plan.names]
        if plan.kind == "line":
            more = list(losses) if "loss/anchor" in plan.names else []
            # what a person compares are the points themselves
            return wr.LinePlot(title=plan.title, x=X_AXIS, y=[*named, *more], smoothing_factor=0, layout=layout)
        if plan.kind == "lines":
            matching = _pattern(plan, prefix)
            return wr.LinePlot(title=plan.title, x=X_AXIS, metric_regex=matching, smoothing_factor=0, layout=layout)
        if plan.kind == "scalar":
            return wr.ScalarChart(title=plan.title, metric=wr.SummaryMetric(named[0]), layout=layout)
        if plan.kind == "media":
            return wr.MediaBrowser(
                title=plan.title, media_keys=named, num_columns=1, gallery_axis="step", layout=layout
            )
        if plan.kind == "table":
            return wr.WeavePanelSummaryTable(table_name=named[0], layout=layout)
        fields = {name: name for name in fields_of(CHARTS[plan.chart])}
        made = wr.CustomChart.from_table(named[0], chart_fields=fields, chart_strings={})
        made.chart_name = f"{entity}/{chart_id(plan.chart)}"
        made.layout = layout
        return made

    sections = []
    for title, plans in PLAN:
        placed, x, y, row = [], 0, 0, 0
        for plan in plans:
            if plan.kind == "chart" and not charts:
                continue
            if x + plan.width > WIDE:
                x, y, row = 0, y + row, 0
            placed.append(panel(plan, x, y))
            x, row = x + plan.width, max(row, plan.height)
        sections.append(
            ws.Section(
                name=title,
                panels=placed,
                is_open=True,
                panel_settings=ws.SectionPanelSettings(x_axis=X_AXIS),
            )
        )
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME if prefix == "slt" else f"{NAME}: {prefix}",
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis=X_AXIS),
    )


def serialised(workspace: Any) -> dict[str, Any]:
    """The workspace as it would be sent: plain types."""
    spec: dict[str, Any] = json.loads(workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
    return spec


def send(entity: str, project: str, prefix: str = "slt", losses: Sequence[str] = ()) -> tuple[str, Optional[str]]:
    """Build it, put the custom charts on the server, and save it there as a new view.

    Returns:
        Its address, and why it has no custom charts (None where it has them).

    Raises:
        ConnectionError: where no server answers, or nobody is logged in; says what to do.
    """
    import wandb

    server = wandb.setup().settings.base_url
    _require_server(server)
    if not wandb.setup().settings.api_key and not _stored_key(server):
        raise ConnectionError(f"nobody is logged in to {server}. Run `wandb login`, or set WANDB_API_KEY.")
    missing: Optional[str] = None
    try:
        api = wandb.Api(timeout=int(_TIMEOUT))
        for name, spec in CHARTS.items():
            try:
                api.create_custom_chart(
                    entity=entity,
                    name=chart_id(name),
                    display_name=f"lightning_slt: {name}",
                    spec_type="vega2",
                    access="private",
                    spec=spec,
                )
            except Exception as error:
                if not _is_there_already(str(error)):
                    missing = f"{type(error).__name__}: {error}"
        workspace = build_workspace(entity, project, prefix, losses, charts=missing is None)
        workspace.save()
        return str(workspace.url), missing
    except (ModuleNotFoundError, ValueError):
        raise
    except Exception as error:
        raise ConnectionError(f"{server} did not take the workspace: {type(error).__name__}: {error}") from error


def _is_there_already(message: str) -> bool:
    """Whether a server refuses a chart since it has it: its content is part of its name.

    Example:
        >>> _is_there_already("view already exists"), _is_there_already("entity me does not exist")
        (True, False)
    """
    said = message.lower()
    return "duplicate" in said or ("exist" in said and re.search(r"n['o]t exist|no longer exist", said) is None)


def _require_server(address: str) -> None:
    """Ask once, briefly: wandb's own client tries again for minutes."""
    try:
        urllib.request.urlopen(address, timeout=_TIMEOUT).close()
    except urllib.error.HTTPError:
        return  # it answers
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"no wandb server answers at {address} ({error}). Nothing was sent. Where the server is another one, set "
            "WANDB_BASE_URL; without a server, `lightning-slt report RUN_DIR` makes a page of a run."
        ) from error


def _stored_key(server: str) -> bool:
    import wandb

    try:
        return bool(wandb.Api(timeout=int(_TIMEOUT)).api_key)
    except Exception:
        return False


__all__ = ["CHARTS", "NAME", "PLAN", "build_workspace", "chart_id", "keys", "patterns", "send", "serialised"]
