"""The package's docstrings, written for Python's own help, as Markdown: roles as links, equations as MathML."""

from __future__ import annotations

import re
from textwrap import dedent
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`(~?)([^`]+)`")
EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)
TOGETHER = re.compile(r"^(    )(\w+), (\w+): ", re.MULTILINE)
EQUATION = re.compile(r"^( *)\.\. math::\n((?:\1 +.*\n?|\n)+)", re.MULTILINE)


def as_markdown(text: str) -> str:
    """Sphinx roles as cross-references (as code where the reference has no such entry), ``.. math::`` as a fence."""

    def link(match: re.Match[str]) -> str:
        path = match[2]
        name = path.rsplit(".", 1)[-1] if match[1] else path
        return f'<autoref optional identifier="{path}"><code>{name}</code></autoref>'

    def fence(match: re.Match[str]) -> str:
        body = dedent(match[2]).strip()
        return "\n".join(match[1] + line if line else "" for line in ("```math", *body.splitlines(), "```", "", ""))

    text = TOGETHER.sub(r"\1\2: as ``\3``, next.\n\1\3: ", text)  # griffe knows no entry of two names
    # the section that griffe knows is called by its plural
    return ROLE.sub(link, EQUATION.sub(fence, EXAMPLE.sub(r"\1Examples:", text)))


class Docstrings(griffe.Extension):
    """Rewrites every docstring as it is loaded."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
