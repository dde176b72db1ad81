"""The declared lower bounds as pip constraints: ``min_constraints.py [EXTRA...] > constraints-min.txt``.

Every ``name>=version`` of setup.cfg's ``install_requires``, and of the extras that are named, becomes
``name==version``. torch stays at the version that constraints.txt pins: of an older one PyPI may have nothing but a
CUDA build of several gigabytes.
"""

import configparser
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BOUND = re.compile(r"^([A-Za-z0-9._-]+)\s*>=\s*([0-9][^\s,;]*)")
AS_TESTED = {"torch"}


def constraints(extras: list[str], root: Path = ROOT) -> list[str]:
    """The constraints, sorted by name.

    Args:
        extras: Of setup.cfg; a ``%(other)s`` in one stands for another and is followed.
        root: Folder of setup.cfg and constraints.txt.
    """
    setup = configparser.ConfigParser()
    setup.read(root / "setup.cfg", encoding="utf-8")
    texts = [setup.get("options", "install_requires")]
    texts += [setup.get("options.extras_require", extra) for extra in extras]
    bounds = dict(match.groups() for text in texts for line in text.split() if (match := BOUND.match(line)))
    tested = dict(line.split("==") for line in (root / "constraints.txt").read_text().split() if "==" in line)
    bounds.update({name: tested[name] for name in AS_TESTED & bounds.keys() & tested.keys()})
    return [f"{name}=={version}" for name, version in sorted(bounds.items())]


if __name__ == "__main__":
    sys.stdout.write("\n".join(constraints(sys.argv[1:])) + "\n")
