"""What a user installs: metadata, a light import, and a wheel that carries templates and types."""

import configparser
import email
import importlib.metadata
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from make_chain import add_tokenizer, make_chain, variant_model

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = {"anchor.md.jinja", "chain.md.jinja", "model.md.jinja", "recovered.md.jinja"}


def run_python(code: str, **environment: str) -> str:
    """Runs code in a new interpreter, in no particular folder, and returns what it printed."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT.anchor,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_version_is_the_installed_one() -> None:
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    version = run_python("import cbd_hub; print(cbd_hub.__version__)")
    assert version == importlib.metadata.version("cbd_hub") == setup["metadata"]["version"]


def test_import_is_light() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'huggingface_hub', 'numpy'}"
    assert run_python(f"import sys, cbd_hub; print(*{heavy} & set(sys.modules))") == ""


def test_every_exported_name_exists() -> None:
    """Each name of ``__all__`` is in ``dir()``, and an unknown one is an AttributeError that names it."""
    names = "[name for name in cbd_hub.__all__ if name not in dir(cbd_hub) or getattr(cbd_hub, name) is None]"
    assert run_python(f"import cbd_hub; print(*{names})") == ""
    code = "import cbd_hub\ntry: cbd_hub.from_chian\nexcept AttributeError as error: print(error)"
    assert "'from_chian'" in run_python(code)


def test_runtime_dependencies_are_installed_and_new_enough() -> None:
    """The lower bounds of setup.cfg hold for what the tests run with."""
    code = (
        "import importlib.metadata as m; from packaging.requirements import Requirement as R\n"
        "needed = [r for r in map(R, m.requires('cbd_hub')) if not r.marker]\n"
        "print(*[str(r) for r in needed if m.version(r.name) not in r.specifier])"
    )
    assert run_python(code) == ""


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Runs a program and returns what it printed; the checkout is not on its path."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env={**env, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what packages are built from, so that the checkout stays as it is and nothing stale is packed."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("cbd_hub", "cards"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def files(folder: Path, pattern: str) -> dict[str, Path]:
    """Name → path of the files below a folder; folders have dots in their names too."""
    found = [path for path in folder.glob(pattern) if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(folder).as_posix(): path for path in found}


def built(kind: str, source: Path, folder: Path, **environment: str) -> Path:
    """The wheel or sdist of a source folder, built by the build backend itself."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})"
    run(sys.executable, "-c", code, cwd=source, **{"GITHUB_REPOSITORY": "", **environment})
    (package,) = folder.glob("cbd_hub-*.whl" if kind == "wheel" else "cbd_hub-*.tar.gz")
    return package


def fresh_environment(folder: Path, package: Path) -> Path:
    """A new environment with this package alone installed, which borrows the dependencies of the running one.

    The borrowed folder comes last on the path, and its own ``.pth`` files (the editable install) are not read.
    """
    venv.create(folder, with_pip=False)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--quiet",
        "--python",
        folder / "bin" / "python",
    ]
    home = run(folder / "bin" / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    Path(home.strip(), "borrowed.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    run(*pip, "install", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", package, cwd=folder)
    return folder / "bin"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_an_installed_package_runs_outside_the_checkout(kind: str, source: Path, tmp_path: Path) -> None:
    package = built(kind, source, tmp_path)
    programs = fresh_environment(tmp_path / "fresh", package)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def python(code: str) -> str:
        return run(programs / "python", "-c", code, cwd=elsewhere).strip()

    home = Path(python("import cbd_hub; print(cbd_hub.__path__[0])"))
    assert home.is_relative_to(tmp_path / "fresh")
    # Every file of the package and nothing else.
    carried = files(home, "**/*")
    expected = files(source / "cbd_hub", "**/*")
    expected |= {f"cards/{name}": source / "cards" / name for name in TEMPLATES}
    assert carried.keys() == expected.keys()
    assert {"py.typed", "cards/chain.md.jinja", "evaluation/task_files/boolq.yaml"} <= carried.keys()
    assert all(path.read_bytes() == expected[name].read_bytes() for name, path in carried.items())
    assert next(home.parent.glob("cbd_hub-*.dist-info/licenses/LICENSE")).is_file()

    told = run(programs / "cbd-hub", "--help", cwd=elsewhere)
    assert "from-chain" in told and "\x1b" not in told
    facts = json.loads(run(programs / "cbd-hub", "env", "--json", cwd=elsewhere))
    assert facts["cbd_hub"] == importlib.metadata.version("cbd_hub")
    written = json.loads(run(programs / "cbd-hub", "demo", "--num-parameters", "500k", "--json", cwd=elsewhere))
    assert abs(written["num_parameters"] - 500_000) < 5000 and len(written["text"]) > 60
    count = "from cbd_hub import from_chain; print(from_chain('quickstart', '700k').num_parameters())"
    made_offline = run(programs / "python", "-c", count, cwd=elsewhere, HF_HUB_OFFLINE="1", HF_HOME="no-cache")
    assert abs(int(made_offline) - 700_000) < 7000
    # A model with its card, from the installed templates.
    chain = add_tokenizer(make_chain(tmp_path / "chain", variant_model("llama", vocab_size=300)))
    size = json.loads((chain / "chain.json").read_text(encoding="utf-8"))["anchors"][1]["num_parameters"]
    made = ("from-chain", chain, "--num-parameters", size, "--output", "model", "--json")
    assert json.loads(run(programs / "cbd-hub", *made, cwd=elsewhere))["num_parameters"] == size
    assert "library_name: transformers" in (elsewhere / "model" / "README.md").read_text(encoding="utf-8")


def links_of(package: Path) -> tuple[dict[str, str], list[str]]:
    """A wheel's project links, and where the links of its description lead, code aside."""
    with zipfile.ZipFile(package) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    urls = dict(line.split(", ", 1) for line in metadata.get_all("Project-URL", []))
    text = re.sub(r"^```.*?^```$", "", metadata.get_payload(), flags=re.MULTILINE | re.DOTALL)
    return urls, re.findall(r"\]\(([^)]+)\)", text)


def test_links_of_a_release_lead_to_the_files_of_its_tag(source: Path, tmp_path: Path) -> None:
    """The workflow that releases knows the repository; the files that links name are there."""
    address = {"GITHUB_SERVER_URL": "https://github.com", "GITHUB_REPOSITORY": "owner/name"}
    urls, links = links_of(built("wheel", source, tmp_path, **address))
    version = importlib.metadata.version("cbd_hub")
    blob, raw = (f"https://github.com/owner/name/{kind}/v{version}/" for kind in ("blob", "raw"))
    assert urls == {
        "Source": "https://github.com/owner/name",
        "Documentation": f"{blob}docs/index.md",
        "Changelog": f"{blob}CHANGELOG.md",
        "Issues": "https://github.com/owner/name/issues",
    }
    inner = [link.removeprefix(blob).removeprefix(raw) for link in [*urls.values(), *links] if f"/v{version}/" in link]
    assert len(inner) > 15 and all((ROOT / name).is_file() for name in inner)
    assert {link.rpartition(".")[2] for link in links if link.startswith(raw)} == {"png"}
    assert all(link.startswith("https://") for link in links)
    workflow = (ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8")
    assert 'test "$TAG" = "v$(' in workflow  # the tag that links name


def test_a_package_that_is_built_elsewhere_names_no_repository(source: Path, tmp_path: Path) -> None:
    urls, links = links_of(built("wheel", source, tmp_path))
    assert urls == {} and "docs/index.md" in links


@pytest.mark.slow
def test_the_index_would_take_the_package(source: Path, tmp_path: Path) -> None:
    """What is uploaded, built as a release builds it: an sdist, and from it a wheel, with the small chain in both."""
    for tool in ("build", "twine"):
        pytest.importorskip(tool, reason=f"needs {tool}: pip install 'cbd_hub[release]'")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, source, cwd=tmp_path)
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    told = run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist, cwd=tmp_path)
    assert told.count("PASSED") == 2
    demo = files(source, "cbd_hub/demo/**/*").keys()
    assert "cbd_hub/demo/chain.json" in demo and demo <= set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        assert demo <= {name.partition("/")[2] for name in archive.getnames()}
    assert wheel.stat().st_size < 20e6  # people download it to try it


def test_lower_bounds_become_constraints(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / ".ci" / "min_constraints.py"))
    (tmp_path / "setup.cfg").write_text(
        "[options]\ninstall_requires =\n    numpy>=2.0\n    torch>=2.6\n"
        "[options.extras_require]\ntest =\n    pytest>=8.0\ndev =\n    %(test)s\n    mypy\n"
    )
    (tmp_path / "constraints.txt").write_text("# tested\ntorch==2.13.0\nnumpy==2.4.0\n")
    assert script["constraints"](["dev"], tmp_path) == ["numpy==2.0", "pytest==8.0", "torch==2.13.0"]
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    assert len(script["constraints"]([])) == len(setup["options"]["install_requires"].split())
