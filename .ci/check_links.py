"""Relative links: ``check_links.py PATH...`` takes Markdown files, or folders of them, and checks where links lead.

A link to ``#heading`` must be a heading of the file it points into. Links to other sites are not followed.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\[[^\]]*\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)|^\[[^\]]+\]:\s*(\S+)", re.MULTILINE)
ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


def anchors(path: Path) -> set[str]:
    """The anchors of a Markdown file's headings, as GitHub forms them: lower case, dashes, no punctuation."""
    found: dict[str, int] = {}
    slugs = set()
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        slugs.add(f"{slug}-{found[slug]}" if slug in found else slug)
        found[slug] = found.get(slug, 0) + 1
    return slugs


def broken(path: Path) -> Iterator[str]:
    text = CODE.sub("", FENCE.sub("", path.read_text(encoding="utf-8")))
    for match in LINK.finditer(text):
        link = match[1] or match[2]
        if ELSEWHERE.match(link):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        if not target.exists():
            yield f"{path}: {link} does not exist"
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            yield f"{path}: {link} names no heading of {target}"


def main(paths: list[str]) -> int:
    """Prints every broken link; returns 1 if there is one."""
    files: list[Path] = []
    for path in map(Path, paths):
        files += sorted(path.rglob("*.md")) if path.is_dir() else [path]
    absent = [f"{path} does not exist" for path in files if not path.exists()]
    problems = absent + [line for path in files if path.exists() for line in broken(path)]
    print("\n".join([*problems, f"{len(files)} files, {len(problems)} broken links"]))
    return 1 if problems else 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: check_links.py PATH...")
    sys.exit(main(sys.argv[1:]))
