"""What a spec leaves open, filled in for the place where it is drawn."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from lightning_slt.publish.specs.parts import LIGHT, STATES, Spec


def for_page(spec: Spec) -> Spec:
    """With plain column names; colours and numbers are filled in on the page."""
    filled: Spec = json.loads(re.sub(r"\$\{field:(\w+)\}", r"\1", json.dumps(spec)))
    return filled


def for_wandb(spec: Spec, width: int = 640, palette: Mapping[str, str] = LIGHT) -> Spec:
    """As a custom chart of wandb: its own name for the data, a fixed width, the colours of a light page."""
    tokens: dict[str, Any] = {"@width": width, "@states": list(STATES), "@columns": 2, "@cell": width // 2, **palette}
    dropped = {"@limits"}

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: fill(v) for k, v in value.items() if not (isinstance(v, str) and v in dropped)}
        if isinstance(value, list):
            return [fill(v) for v in value]
        if isinstance(value, str) and value.startswith("@"):
            return tokens[value]
        return value

    filled: Spec = fill(spec)
    filled["data"] = {"name": "wandb"}
    return filled


def fields_of(spec: Spec) -> tuple[str, ...]:
    """The columns that a spec leaves to wandb, sorted.

    Example:
        >>> from lightning_slt.publish.specs.chains import chains
        >>> fields_of(chains(band=False))
        ('chain', 'draw', 'llc')
    """
    return tuple(sorted(set(re.findall(r"\$\{field:(\w+)\}", json.dumps(spec)))))


__all__ = ["fields_of", "for_page", "for_wandb"]
