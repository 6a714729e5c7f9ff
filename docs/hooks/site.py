"""What the site needs beyond mkdocs' own: pages from outside docs/, a nav of the pages that are there, equations.

Links and equations are written so that GitHub shows them as well; here they are turned into what the site has.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
ELSEWHERE = {"changelog.md": "CHANGELOG.md", "benchmarks.md": "benchmarks/README.md"}
"""Pages of the site that are kept where people look for them in the repository."""
FUNCTION = re.compile(r"(<m[io]>(?:log|exp|min|max)</m[io]>)")
LINK = re.compile(r"(?P<open>!?\[(?P<text>[^\]]*)\]\()(?P<target>[^)\s#]+)(?P<close>(?:#[^)\s]*)?\))")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.nav = _there(config.nav or [], Path(config.docs_dir))
    fences = [{"name": "math", "class": "math", "format": math}]
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = fences
    return config


def _there(nav: list[Any], docs: Path) -> list[Any]:
    """The nav without the pages that are not there."""
    kept: list[Any] = []
    for entry in nav:
        ((title, target),) = entry.items()
        if isinstance(target, list):
            inside = _there(target, docs)
            if inside:
                kept.append({title: inside})
        elif target in ELSEWHERE or (docs / target).exists():
            kept.append(entry)
    return kept


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links that leave docs/ lead to the page that shows the file; where none does, their words stay without a link."""
    here = ROOT / ELSEWHERE.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def link(match: re.Match[str]) -> str:
        target = match["target"]
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = (here.parent / target).resolve()
        shown = {ROOT / source: page for page, source in ELSEWHERE.items()}.get(path)
        if shown is None and path.is_relative_to(ROOT / "docs"):
            shown = path.relative_to(ROOT / "docs").as_posix()
        if shown is None:
            # a file of the repository; what is nowhere at all is left for mkdocs to complain of
            return match["text"] if path.exists() else match[0]
        up = "../" * page.file.src_uri.count("/")
        return f"{match['open']}{up}{shown}{match['close']}"

    return LINK.sub(link, markdown)


def math(source: str, language: str, css_class: str, options: Any, md: Any, **_: Any) -> str:
    """A ```math block as MathML, which browsers draw by themselves."""
    text = " ".join(source.split())
    if "&" in text or "\\\\" in text:
        text = rf"\begin{{aligned}} {text} \end{{aligned}}"
    # latex2mathml sets the name of a function as tight as a variable
    drawn = FUNCTION.sub(r'<mspace width="0.17em"/>\1<mspace width="0.17em"/>', convert(text, display="block"))
    return f'<div class="{escape(css_class)}">{drawn}</div>'
