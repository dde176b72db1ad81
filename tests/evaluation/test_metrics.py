"""ROUGE: against numbers worked out by hand, and against `evaluate` running real metric scripts.

The scripts are loaded from a folder, and over HTTP from a server on this machine; each in a process of its own, whose
HF_HOME is a temporary folder, since `evaluate` copies what it runs there.
"""

import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from cbd_hub.errors import RecipeError
from cbd_hub.evaluation.metrics import HUB, ROUGE, rouge

pytest.importorskip("rouge_score", reason="needs rouge-score: pip install 'cbd_hub[eval]'")
needs_evaluate = pytest.mark.skipif(
    find_spec("evaluate") is None, reason="needs evaluate: pip install 'cbd_hub[eval]'"
)

GOT = ["the cats sat on mats", "a house", "", "c b a", "The houses, of the Nation!"]
WANTED = ["a cat sat on the mat", "a house", "peace", "a b c", "the house of nations"]

# As evaluate's own are: a class derived from its Metric, that calls the packaged implementation.
SCRIPT = """
import datasets
import evaluate
{imports}

class Metric(evaluate.Metric):
    def _info(self):
        column = datasets.Value({kind!r})
        features = datasets.Features({{"predictions": column, "references": column}})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references, {compute}
"""
ROUGE_SCRIPT = SCRIPT.format(
    imports="from rouge_score.rouge_scorer import RougeScorer",
    kind="string",
    compute="""rouge_types, use_stemmer, use_aggregator):
        assert not use_aggregator
        scorer = RougeScorer(rouge_types, use_stemmer=use_stemmer)
        found = [scorer.score(r, p) for r, p in zip(references, predictions)]
        return {name: [each[name].fmeasure for each in found] for name in rouge_types}
""",
)


def in_a_process(code: str, home: Path, **environment: str) -> Any:
    """What code prints as JSON, in a process with an HF_HOME of its own."""
    lines = f"import json, sys\nfrom cbd_hub.evaluation.metrics import *\nGOT, WANTED = {GOT!r}, {WANTED!r}\n{code}"
    env = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", **environment}
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, env=env, timeout=100)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def f1(common: int, got: int, wanted: int) -> float:
    return 2 * common / (got + wanted)


def test_rouge_is_f1_of_stemmed_words_in_common() -> None:
    scores = rouge(GOT, WANTED)
    assert list(scores.values) == list(ROUGE) == list(scores.means) == list(scores.stderrs)
    # the, cat, sat, on, mat; cat sat, sat on; cat sat on mat: each over the words, or pairs, of both texts.
    assert scores.values["rouge1"] == pytest.approx([f1(5, 5, 6), 1, 0, 1, f1(4, 5, 4)])
    assert scores.values["rouge2"] == pytest.approx([f1(2, 4, 5), 1, 0, 0, f1(2, 4, 3)])
    assert scores.values["rougeL"] == pytest.approx([f1(4, 5, 6), 1, 0, f1(1, 3, 3), f1(4, 5, 4)])
    assert scores.implementation == f"rouge-score {version('rouge-score')}"


def test_means_and_standard_errors_are_over_items() -> None:
    scores = rouge(["a house", "peace", "a b", "a b"], ["a house", "a b", "a b", "a b"])
    assert scores.values["rouge1"] == [1, 0, 1, 1]
    assert scores.means["rouge1"] == 0.75
    assert scores.stderrs["rouge1"] == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert rouge(["a"], ["a"]).stderrs["rouge1"] is None


@pytest.mark.parametrize(("got", "wanted"), [([], []), (["1"], []), (["1"], ["1", "2"])])
def test_items_without_a_counterpart_are_refused(got: list[str], wanted: list[str]) -> None:
    with pytest.raises(RecipeError, match=f"{len(got)} predictions and {len(wanted)} references"):
        rouge(got, wanted)


def test_a_folder_without_the_script_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no metric script rouge/rouge\.py"):
        rouge(GOT, WANTED, tmp_path)


@needs_evaluate
def test_a_script_of_a_folder_gives_the_same_numbers(tmp_path: Path) -> None:
    (tmp_path / "mine" / "rouge").mkdir(parents=True)
    (tmp_path / "mine" / "rouge" / "rouge.py").write_text(ROUGE_SCRIPT)
    code = f"a = rouge(GOT, WANTED, {str(tmp_path / 'mine')!r})\nprint(json.dumps([a.values, a.implementation]))"
    values, by = in_a_process(code, tmp_path / "home")
    assert values == rouge(GOT, WANTED).values
    assert by == f"evaluate {version('evaluate')}, script {tmp_path / 'mine' / 'rouge'}"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """A server with ``evaluate-metric/rouge``, as the Hub has it."""
    for revision in ("main", f"v{version('evaluate')}") if find_spec("evaluate") else ("main",):
        folder = tmp_path / "hub" / "spaces" / "evaluate-metric" / "rouge" / "resolve" / revision
        folder.mkdir(parents=True)
        (folder / "rouge.py").write_text(ROUGE_SCRIPT)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "hub"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
@needs_evaluate
def test_the_hubs_script_is_run_only_where_it_is_asked_for(hub: str, tmp_path: Path) -> None:
    code = f"""
before = rouge(GOT, WANTED)
assert "evaluate" not in sys.modules
a = rouge(GOT, WANTED, {HUB!r})
print(json.dumps([before.implementation, a.values, a.implementation]))
"""
    before, values, by = in_a_process(code, tmp_path / "home", HF_ENDPOINT=hub)
    assert before.startswith("rouge-score")
    assert values == rouge(GOT, WANTED).values
    assert by == f"evaluate {version('evaluate')}, script evaluate-metric/rouge"


@pytest.mark.slow
@needs_evaluate
def test_where_the_script_cannot_be_had_rouge_score_does_it_and_says_so(tmp_path: Path) -> None:
    code = f"a = rouge(GOT, WANTED, {HUB!r})\nprint(json.dumps([a.values, a.implementation]))"
    values, by = in_a_process(code, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")  # nobody listens there
    assert values == rouge(GOT, WANTED).values
    assert by.startswith("rouge-score") and "could not be loaded" in by and "\n" not in by


def test_offline_nothing_is_fetched(hub: str, tmp_path: Path) -> None:
    code = f"a = rouge(GOT, WANTED, {HUB!r})\nprint(json.dumps([a.values, a.implementation]))"
    values, by = in_a_process(code, tmp_path / "home", HF_ENDPOINT=hub, HF_HUB_OFFLINE="1")
    assert values == rouge(GOT, WANTED).values
    assert by.startswith("rouge-score") and "HF_HUB_OFFLINE" in by


def test_without_the_packages_it_says_what_to_install(tmp_path: Path) -> None:
    code = f"""
sys.modules["evaluate"] = None
implementation = rouge(GOT, WANTED, {HUB!r}).implementation
sys.modules["rouge_score.rouge_scorer"] = None
try:
    rouge(GOT, WANTED)
except Exception as error:
    print(json.dumps([implementation, type(error).__name__, str(error)]))
"""
    first, kind, message = in_a_process(code, tmp_path)
    assert first.startswith("rouge-score") and "'evaluate'" in first and "pip install" in first
    assert kind == "CbdError" and "pip install 'cbd_hub[eval]'" in message
