"""Lets mkdocstrings read this library's docstrings.

A role such as ``:func:`cbd_hub.text.packing.pack``` becomes a link where the reference has the name, a term above an
indented text a list item, and a ``Cost:`` part a paragraph: griffe would take its first line for the title of a box.
"""

import re
from typing import Any

import griffe

COST = re.compile(r"^( *)Cost: (.*(?:\n\1 +\S.*)*)", re.MULTILINE)
TERM = re.compile(r"^( *)(``\w+``(?:, ``\w+``)*)\n((?:\1 {4}\S.*\n?)+)", re.MULTILINE)
ROLE = re.compile(r":(?:mod|class|func|meth|attr|data|exc):`(~?)([\w.]+)`")


def item(match: re.Match[str]) -> str:
    """A term and its text as a list item."""
    return f"{match[1]}- {match[2]}: {' '.join(match[3].split())}\n"


class Roles(griffe.Extension):
    """Turns roles into links, or code alone where the reference has no such name."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every module, class, function and attribute."""
        if obj.docstring is None:
            return
        module = obj.module.path

        def link(match: re.Match[str]) -> str:
            name = match[2]
            known = name if name.startswith("cbd_hub") else f"{module}.{name}"
            shown = name.rsplit(".", 1)[-1] if match[1] else name
            return f'<autoref identifier="{known}" optional><code>{shown}</code></autoref>'

        text = COST.sub(lambda match: f"{match[1]}**Cost:** {' '.join(match[2].split())}", obj.docstring.value)
        obj.docstring.value = ROLE.sub(link, TERM.sub(item, text))
