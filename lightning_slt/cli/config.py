"""``lightning-slt config``: all settings with their defaults, as commented YAML to start from.

The comments are the ``Args:`` of the callbacks and functions that the settings are for: what an argument means is said
in one place.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any, Optional

import yaml

NAME = "config"
HELP = "Print the settings with their defaults, as commented YAML that can be loaded again."
SECTIONS = ("run", "monitor", "transitions", "llc", "influence", "detector")
WIDTH = 110


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "section",
        nargs="?",
        choices=SECTIONS,
        default="run",
        help="run: all that a run measures; monitor: SLTMonitor; transitions: TransitionMonitor; "
        "llc: estimate_llc; influence: estimate_influence; detector: TransitionDetector and detect_transitions "
        "(default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints the defaults."""
    print("\n".join(commented(schema_of(arguments.section))))
    return 0


def schema_of(name: str) -> type[Any]:
    """The schema that :func:`lightning_slt.config.load` takes for a section."""
    from lightning_slt import config

    schemas = (
        config.RunConfig,
        config.MonitorConfig,
        config.TransitionMonitorConfig,
        config.LLCConfig,
        config.InfluenceConfig,
        config.DetectorConfig,
    )
    return dict(zip(SECTIONS, schemas, strict=True))[name]


def commented(schema: type[Any], indent: str = "") -> Iterator[str]:
    """The lines of a schema's defaults, what each field means above it.

    What has no default section (a sampler that is calibrated) is followed by one that is commented out.

    Example:
        >>> from lightning_slt.config import SamplerConfig
        >>> print("\\n".join(commented(SamplerConfig)))
        # LeimkuhlerMatthews, SGLD, RMSpropSGLD or SGNHT.
        name: SGLD
        # the step size; null has it calibrated.
        lr: null
        # of RMSpropSGLD: how far its metric may go, the smaller the further; null for its default.
        kappa: null
        # of SGNHT: the noise injected in a step, also the friction to begin with; null for its default.
        diffusion_factor: null
    """
    from lightning_slt.schema import is_named, section

    comments = comments_of(schema)
    for f in dataclasses.fields(schema):
        yield from _comment(comments[f.name], indent)
        inner = section(schema, f.name)
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if inner is None:
            yield f"{indent}{f.name}: {_plain(default)}"
        elif dataclasses.is_dataclass(default):
            yield f"{indent}{f.name}:"
            yield from commented(inner, indent + "  ")
        else:
            yield f"{indent}{f.name}: {'{}' if is_named(schema, f.name) else 'null'}"
            if not is_named(schema, f.name):
                yield f"{indent}# {f.name}:"
                yield from (f"{indent}#{line}" for line in commented(inner, "   "))


def comments_of(schema: type[Any]) -> dict[str, str]:
    """What each field means, from the docstring of what is configured, and from that of the schema itself.

    Raises:
        KeyError: for a field that neither says anything of.
    """
    from lightning_slt import SLTMonitor, TransitionDetector, TransitionMonitor, estimate_influence, estimate_llc
    from lightning_slt.config import (
        DetectorConfig,
        InfluenceConfig,
        LLCConfig,
        MonitorConfig,
        TransitionMonitorConfig,
    )

    configured: dict[Any, Any] = {
        MonitorConfig: SLTMonitor,
        TransitionMonitorConfig: TransitionMonitor,
        LLCConfig: estimate_llc,
        InfluenceConfig: estimate_influence,
        DetectorConfig: TransitionDetector,
    }
    said = arguments_of(configured[schema]) if schema in configured else {}
    said |= arguments_of(schema)
    return {f.name: said[f.name] for f in dataclasses.fields(schema)}


def arguments_of(documented: Any) -> dict[str, str]:
    """The ``Args:`` of a docstring, roles and line breaks taken out."""
    import docstring_parser

    found = docstring_parser.parse(inspect.getdoc(documented) or "", docstring_parser.DocstringStyle.GOOGLE).params
    # one entry may be of several: "max_train, max_query: ..."
    return {name.strip(): _as_comment(p.description or "") for p in found for name in p.arg_name.split(",")}


_YAML = {"None": "null", "True": "true", "False": "false"}


def _as_comment(text: str) -> str:
    """Without roles and backticks, and in YAML's words."""
    text = re.sub(
        r":(?:class|func|meth|attr):`~?(?:[\w.]*\.)?([^`.]+)`|:mod:`~?([^`]+)`", r"\1\2", " ".join(text.split())
    )
    return re.sub(r"\b(None|True|False)\b", lambda word: _YAML[word[1]], text.replace("``", ""))


def _comment(text: str, indent: str) -> Iterator[str]:
    for line in textwrap.wrap(text, WIDTH - len(indent), break_on_hyphens=False):
        yield f"{indent}# {line}"


def _plain(value: Optional[Any]) -> str:
    value = getattr(value, "value", value)  # an Enum's
    return yaml.safe_dump(value, default_flow_style=True).splitlines()[0]
