"""What the site needs beside the pages of docs/, which are written for GitHub.

A page may link to a file outside docs/ (the contribution guide, a recipe). Such a file is taken into the site under
``repository/``, and the link is made to lead there; a link of a taken page back into docs/ likewise. And GitHub begins
a list right behind a paragraph, where Markdown proper wants an empty line.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
OUTSIDE = "repository"

FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2[ ]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)\s#]+)")
LIST = re.compile(r"^(?!\s*(?:[-*+]|\d+\.)\s|\s*$|\||#)(.*\S.*)\n(?=(?:[-*+]|\d+\.) )", re.MULTILINE)
INFO = re.compile(r"^( *```\w+) [\w -]+$", re.MULTILINE)


def outside_fences(text: str, change: Callable[[str], str]) -> str:
    """Changes the text between code blocks."""
    pieces, end = [], 0
    for fence in FENCE.finditer(text):
        pieces += [change(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*pieces, change(text[end:])])


def original(src_uri: str) -> Path:
    """The file of the repository that a page of the site is made from."""
    inside, _, rest = src_uri.partition("/")
    return ROOT / rest if inside == OUTSIDE else DOCS / src_uri


def place(target: Path) -> str:
    """Where a file of the repository stands in the site, as a path from its top."""
    return (
        target.relative_to(DOCS).as_posix()
        if target.is_relative_to(DOCS)
        else f"{OUTSIDE}/{target.relative_to(ROOT).as_posix()}"
    )


def targets(page: Path) -> set[Path]:
    """The files that a page links to."""
    found: set[Path] = set()

    def collect(text: str) -> str:
        found.update(Path(os.path.normpath(page.parent / match[1])) for match in LINK.finditer(text))
        return text

    outside_fences(page.read_text(encoding="utf-8"), collect)
    return {target for target in found if target.is_relative_to(ROOT) and target.is_file()}


def on_files(files: Files, config: Any) -> Files:
    """Takes every file outside docs/ that a page links to into the site, and what those link to in turn."""
    waiting = [original(file.src_uri) for file in files.documentation_pages()]
    while waiting:
        for target in sorted(targets(waiting.pop())):
            if target.is_relative_to(DOCS) or files.get_file_from_path(place(target)):
                continue
            files.append(File.generated(config, place(target), abs_src_path=str(target)))
            if target.suffix == ".md":
                waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Makes links lead within the site, and lists begin where GitHub begins them."""
    here = original(page.file.src_uri)
    top = Path(page.file.src_uri).parent

    def lead(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(here.parent / match[1]))
        if not target.is_relative_to(ROOT):
            return match[0]
        return Path(os.path.relpath(place(target), top)).as_posix()

    markdown = outside_fences(markdown, lambda text: LIST.sub(r"\1\n\n", LINK.sub(lead, text)))
    return INFO.sub(r"\1", markdown)
