"""What setup.cfg cannot say: where this repository is, known only to the workflow that builds a release from it.

There, the package gets links to the repository, and those of its README lead to the files of the release. Built
anywhere else, it has none, and its README stays as it is.
"""

import os
import re
from configparser import ConfigParser
from pathlib import Path
from typing import Any

from setuptools import setup

HERE = Path(__file__).parent
LINK = re.compile(r"(!?)(\[[^\]\n]*\])\((?![a-z]+:|#)([^)\s]+)\)")
FENCES = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def linked(text: str, repository: str, tag: str) -> str:
    """Markdown whose relative links, outside code blocks, lead to a repository's files at a tag."""

    def absolute(link: re.Match[str]) -> str:
        return f"{link[1]}{link[2]}({repository}/{'raw' if link[1] else 'blob'}/{tag}/{link[3]})"

    parts = FENCES.split(text)
    return "".join(part if part.startswith("```") else LINK.sub(absolute, part) for part in parts)


def links(repository: str) -> dict[str, Any]:
    """Metadata that names a repository, by its address."""
    config = ConfigParser(interpolation=None)
    config.read(HERE / "setup.cfg", encoding="utf-8")
    tag = f"v{config['metadata']['version']}"
    return {
        "long_description": linked((HERE / "README.md").read_text(encoding="utf-8"), repository, tag),
        "project_urls": {
            "Source": repository,
            "Documentation": f"{repository}/blob/{tag}/docs/index.md",
            "Changelog": f"{repository}/blob/{tag}/CHANGELOG.md",
            "Issues": f"{repository}/issues",
        },
    }


SERVER, NAME = os.environ.get("GITHUB_SERVER_URL"), os.environ.get("GITHUB_REPOSITORY")
setup(**(links(f"{SERVER}/{NAME}") if SERVER and NAME else {}))
