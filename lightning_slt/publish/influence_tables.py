"""Influence as plain rows: suspects by posterior mean loss, and the pairs that stand out of their errors."""

from __future__ import annotations

from typing import Any

from lightning_slt.influence_record import MIN_Z, InfluenceEstimate
from lightning_slt.publish.tables import plain

SUSPECT_COLUMNS: tuple[str, ...] = (
    "rank",
    "index",
    "group",
    "mean_loss",
    "mean_loss_se",
    "plain_loss",
    "plain_loss_rank",
    "self_influence",
    "llc",
    "media",
)
PAIR_COLUMNS: tuple[str, ...] = ("query", "token", "query_group", "side", "index", "group", "value", "se", "z", "rho")


def media_id(index: int) -> str:
    """Under which a sample's picture is kept; it is logged once."""
    return f"sample_{index}"


def suspect_rows(estimate: InfluenceEstimate, k: int = 20) -> list[list[Any]]:
    """The ``k`` training samples of the largest posterior mean loss, in the order of :data:`SUSPECT_COLUMNS`.

    Their rank by plain loss stands beside: where the data has been memorised, the two differ, and the posterior mean is
    the one that still finds wrong labels.
    """
    ranks, llc = estimate.loss_rank(), estimate.per_sample_llc
    rows = []
    for place, j in enumerate(estimate.suspects(k), start=1):
        index = int(estimate.train_index[j])
        group = estimate.train_group[j] if estimate.train_group is not None else ""
        row = [place, index, group, float(estimate.mean_loss[j]), float(estimate.mean_loss_se[j])]
        row += [float(estimate.init_loss[j]), int(ranks[j]), float(estimate.self_influence[j]), float(llc[j])]
        rows.append([plain(v) for v in row] + [media_id(index)])
    return rows


def pair_rows(estimate: InfluenceEstimate, k: int = 5, max_queries: int = 20) -> list[list[Any]]:
    """Training samples that help and harm the first queries most, only where ``|value| / se`` is above 3."""
    rows: list[list[Any]] = []
    column = {int(i): j for j, i in enumerate(estimate.train_index.tolist())}
    for query in range(min(len(estimate.matrix), max_queries)):
        number = int(estimate.query_index[query])
        token = int(estimate.query_token[query]) if estimate.query_token is not None else None
        query_group = estimate.query_group[query] if estimate.query_group is not None else ""
        for side, found in (("helpful", estimate.top(query, k, MIN_Z)), ("harmful", estimate.bottom(query, k, MIN_Z))):
            for index, value, error in found:
                j = column[index]
                group = estimate.train_group[j] if estimate.train_group is not None else ""
                row = [number, token, query_group, side, index, group, value, error]
                row += [value / error if error else None, float(estimate.correlation[query, j])]
                rows.append([plain(v) for v in row])
    return rows
