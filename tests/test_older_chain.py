"""A chain and a build that version 0.1.0 made before the package had folders: both go on as they were.

``tests/fixtures/older_chain`` holds its recipe, the chain, and the records of the build.
"""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from tiny_recipe import digests

from cbd_hub import Chain, build_chain, from_chain
from cbd_hub.build.begun import as_recorded

OLDER = Path(__file__).parent / "fixtures" / "older_chain"

# SHA-256 over the float32 bytes of all parameters, in the order of their names, as version 0.1.0 made them.
MADE = {
    ("28k", "auto"): "f1f02b3b36d44665005dcd1ed6c8f61681b4b9e8036a71091344262ae449c4f1",
    ("40k", "auto"): "374c2aa16a292fb974edb104a69b8abc2d2e0a75c33390a161346dabc11bb2c7",
    ("40k", "paper"): "4f57e01baba7507cb2ff825b73bd4eb9209bf20f9749888fddfa81c541d15ef4",
    ("28k", "expand"): "c3bc767c43d1f7633fab001f935d6ae47220ad6fe9c886dd2197cc290e12f9bc",
    ("40k", "prune"): "a148eb51997d0cacd3d41a3a3be72b3a81976be70184b2dd2fa32a99d5eb40bc",
}


def fingerprint(size: str, method: str) -> str:
    model = from_chain(OLDER / "chain", size, method=method, tolerance=0.2)
    digest = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        digest.update(parameter.detach().to(torch.float32).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize(("size", "method"), MADE)
def test_an_older_chain_makes_the_same_models(size: str, method: str) -> None:
    assert fingerprint(size, method) == MADE[size, method]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The chain where its recipe expects the text to be."""
    folder = tmp_path / "tests" / "fixtures" / "older_chain"
    shutil.copytree(OLDER, folder)
    (tmp_path / "examples").symlink_to(OLDER.parents[2] / "examples")
    return folder


def test_an_older_build_is_finished_and_is_not_built_again(copy: Path) -> None:
    """Without its manifest the build goes on behind its last record; the finished anchors stay as they are."""
    before = digests(copy / "chain")
    (copy / "chain" / "chain.json").unlink()
    build_chain(copy / "recipe.yaml", copy / "chain", progress=False)
    after = digests(copy / "chain")
    weights = [name for name in before if name.endswith((".safetensors", "tokenizer.json", "config.json"))]
    assert len(weights) > 10 and all(before[name] == after[name] for name in weights)
    kept, made = (Chain.from_pretrained(folder / "chain").manifest for folder in (OLDER, copy))
    assert as_recorded(made.recipe or {}) == as_recorded(kept.recipe or {})
    assert made.round_widths is None and made.format == kept.format
    assert [a.files for a in made.anchors] == [a.files for a in kept.anchors]
    assert [p.loss for p in made.curve] == pytest.approx([p.loss for p in kept.curve], abs=1e-4)


@pytest.mark.slow
def test_an_older_build_trains_the_same_anchor_again(copy: Path) -> None:
    """The last anchor is lost with its record: the same recipe makes it again, to rounding on another processor."""
    state = copy / "chain" / ".build"
    name = Chain.from_pretrained(OLDER / "chain").manifest.anchors[-1].name
    for path in (copy / "chain" / "chain.json", state / "step-2.json", state / "step-2.safetensors"):
        path.unlink()
    (state / "ranking-2.json").unlink()
    shutil.rmtree(copy / "chain" / "anchors" / name)
    chain = build_chain(copy / "recipe.yaml", copy / "chain", progress=False)
    older = Chain.from_pretrained(OLDER / "chain")
    again, before = (c.anchors[-1].load().state_dict() for c in (chain, older))
    for key, value in before.items():
        torch.testing.assert_close(again[key], value, atol=1e-4, rtol=1e-3)
