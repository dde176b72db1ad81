"""A chain for the page, on disk, open, and with losses."""

from pathlib import Path

import pytest
from make_chain import add_tokenizer, make_chain, variant_model

from cbd_hub.chain.chain import Chain
from cbd_hub.manifest.manifest import CurvePoint, Evaluation, Manifest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("chains") / "chain"
    make_chain(made, variant_model("llama", vocab_size=320))
    add_tokenizer(made)
    return made


@pytest.fixture(scope="module")
def chain(folder: Path) -> Chain:
    return Chain.from_pretrained(folder)


@pytest.fixture(scope="module")
def measured(chain: Chain) -> Manifest:
    """The manifest with losses of the anchors (3, 4, 5) and of two sizes between the upper two."""
    anchors = [
        a.model_copy(update={"evaluation": Evaluation(loss=loss, perplexity=20.0, num_tokens=100)})
        for a, loss in zip(chain.manifest.anchors, (3.0, 4.0, 5.0), strict=True)
    ]
    high, low = anchors[0].num_parameters, anchors[1].num_parameters
    curve = [
        CurvePoint(num_parameters=low + (high - low) * 2 // 3, loss=3.1, method="interpolate"),
        CurvePoint(num_parameters=low + (high - low) // 3, loss=3.5, method="interpolate"),
        CurvePoint(num_parameters=low + (high - low) // 3, loss=4.5, method="$x$<b>"),
    ]
    return chain.manifest.model_copy(update={"anchors": anchors, "curve": curve})
