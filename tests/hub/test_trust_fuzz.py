"""Every file of a chain altered at random, with the hashes as they were and with hashes that fit, as a forger has.

What comes of it is a refusal in one line, the very same model, or the other one that the altered chain says it is.

``TRUST_SEED=llama:17`` runs one case and prints it.
"""

import hashlib
import json
import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from alterations import KINDS, LEGITIMATE, alter_bytes, alter_header, alter_json, differences, dumped
from hostile import GENERATION, Watched, between, equal, linux_only, split, tiny_chain, tree, vouch
from transformers import PreTrainedModel

from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.axes.sizing import count_parameters
from cbd_hub.chain.chain import Chain
from cbd_hub.interpolation.checkpoints import checksum
from cbd_hub.interpolation.plan import Plan
from cbd_hub.manifest.manifest import CALIBRATION_NAME, CHECKSUMS_NAME, INDEX_MAPS_NAME, MANIFEST_NAME

pytestmark = linux_only


@dataclass
class Case:
    """One altered chain: the files that differ from the original, and what may come of it."""

    kind: str
    forged: bool
    """Whether the manifest vouches for what was altered."""
    size: int
    what: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    may_differ: bool = False
    """Whether another model is what the altered chain says."""
    finite: bool = True
    """Whether every parameter must be finite: not where a forger rewrote the weights themselves."""


class Original:
    """A chain, its files, and what it gives."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        opened = Chain.from_pretrained(folder)
        sizes = [between(folder, pair, share) for pair, share in ((0, 0.6), (1, 0.3), (1, 0.7))]
        self.plans = {size: opened.plan(size, tolerance=0.2) for size in sizes}
        assert {plan.method for plan in self.plans.values()} == {"interpolate", "expand"}
        assert {(plan.small, plan.large) for plan in self.plans.values()} == {("a1", "a0"), ("a2", "a1")}
        self.models = {size: opened.initialize(plan, progress=False) for size, plan in self.plans.items()}
        self.calibration = opened.calibration
        assert self.calibration is not None

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads(self.files[MANIFEST_NAME])

    def case(self, variant: str, number: int) -> Case:
        """The altered chain of one number."""
        draw, kind = random.Random(f"{variant}:{number}"), KINDS[number % len(KINDS)]
        forged = number // len(KINDS) % 2 == 1 and kind != "manifest"  # which nothing vouches for
        case = Case(kind, forged, draw.choice(list(self.plans)))
        if kind in ("manifest", "axis map"):
            self._alter_manifest(case, draw)
            return case
        if kind == "claims":
            self._alter_claims(case, draw)
            return case
        plan = self.plans[case.size]
        anchor = "anchors/" + draw.choice([plan.small, plan.small if plan.method == "expand" else plan.large])
        name = {
            "config": f"anchors/{draw.choice([plan.small, plan.large])}/config.json",
            "header": f"{anchor}/model.safetensors",
            "data": f"{anchor}/model.safetensors",
            "index maps": INDEX_MAPS_NAME,
            "checksums": CHECKSUMS_NAME,
            "generation config": GENERATION,
            "calibration": CALIBRATION_NAME,
        }[kind]
        data = self.files[name]
        if name.endswith(".json"):
            what, data = alter_bytes(data, draw) if draw.random() < 0.15 else alter_json(json.loads(data), draw)
        elif kind == "data" or (kind != "header" and draw.random() < 0.2):
            what, data = alter_bytes(data, draw, 8 + int.from_bytes(data[:8], "little"))
            case.finite = False
        else:
            what, data = alter_header(data, draw)
        case.what, case.files[name] = f"{name}: {what}", data
        if case.forged:
            case.may_differ = name.endswith(".safetensors")
            self._forge(case, name, without_digests=draw.random() < 0.3)
        return case

    def _alter_manifest(self, case: Case, draw: random.Random) -> None:
        manifest = self.manifest
        if draw.random() < 0.1:
            case.what, case.files[MANIFEST_NAME] = alter_bytes(self.files[MANIFEST_NAME], draw)
        elif case.kind == "manifest":
            told, text = alter_json(manifest, draw)
            if draw.random() < 0.3 and isinstance(manifest.get("anchors"), list):
                more, text = alter_json(manifest, draw)
                told = f"{told}; {more}"
            case.what, case.files[MANIFEST_NAME] = told, text
        else:
            case.what, text = alter_json(manifest["axis_map"], draw)
            if case.forged:
                self._recount(manifest)
            whole = dumped({**manifest, "axis_map": "@map@"})
            case.files[MANIFEST_NAME] = whole.replace(b'"@map@"', text)
        with Watched():  # what is no JSON differs in nothing that matters
            changed = list(differences(self.manifest, json.loads(case.files[MANIFEST_NAME])))
            case.may_differ = any(LEGITIMATE & set(path) or path == ("anchors",) for path in changed)

    @staticmethod
    def _recount(manifest: dict[str, Any]) -> None:
        """Makes the parameter counts fit the axis map, where that has any."""
        with Watched():
            axis_map = AxisMap.from_dict(manifest["axis_map"])
            for anchor in manifest["anchors"]:
                anchor["num_parameters"] = count_parameters(axis_map, axis_map.sizes(anchor["shape"]))

    def _alter_claims(self, case: Case, draw: random.Random) -> None:
        """Lets the manifest and the configs agree on another size."""
        manifest = self.manifest
        name = draw.choice(list(manifest["anchors"][0]["shape"]))
        numbers = (
            (0, 1, 2) if name in ("vocab_size", "head_dim") else draw.choice([(0,), (0,), (0, 1), (2,), (0, 1, 2)])
        )
        factor, more = draw.choice([(1, 1), (1, -1), (2, 0), (2, 0), (3, 0), (1000, 0), (2**31, 0), (2**36, 0)])
        case.what, case.may_differ, case.forged = f"{name} of {numbers} times {factor} plus {more}", True, True
        for i in numbers:
            anchor, config = manifest["anchors"][i], f"anchors/a{i}/config.json"
            anchor["shape"][name] = anchor["shape"][name] * factor + more
            data = json.dumps(json.loads(self.files[config]) | {name: anchor["shape"][name]}).encode()
            vouch(manifest, config, {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()})
            case.files[config] = data
        if name == "num_hidden_layers":
            for i in (1, 2):
                layers = min(manifest["anchors"][i - 1]["shape"][name], 20_000)
                manifest["anchors"][i]["layer_order"] = list(range(layers))
        self._recount(manifest)
        case.files[MANIFEST_NAME] = json.dumps(manifest).encode()

    def _forge(self, case: Case, name: str, without_digests: bool) -> None:
        """Makes hashes, and digests of tensors, fit what was altered."""
        manifest, data = self.manifest, case.files[name]
        vouch(manifest, name, {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()})
        if name.endswith("model.safetensors") and without_digests:
            manifest.pop("checksums")
        elif name.endswith("model.safetensors"):
            digests = json.loads(self.files[CHECKSUMS_NAME])
            with Watched():  # a header that cannot be read has no digests
                header, body = split(data)
                entries = {key: entry for key, entry in header.items() if key != "__metadata__"}
                digests[name.split("/")[1]] = {
                    k: checksum(body[slice(*e["data_offsets"])]) for k, e in entries.items()
                }
            text = case.files[CHECKSUMS_NAME] = dumped(digests)
            vouch(manifest, CHECKSUMS_NAME, {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()})
        case.files[MANIFEST_NAME] = json.dumps(manifest).encode()


@dataclass
class Made:
    """How far a case got, and what came of it."""

    stage: str = "manifest"
    plan: Plan | None = None
    model: PreTrainedModel | None = None
    calibration: torch.Tensor | None = None


def carry_out(original: Original, case: Case, made: Made) -> None:
    """What :func:`cbd_hub.from_chain` does, step by step."""
    hub = str(original.folder.parent / "hub")
    opened = Chain.from_pretrained(original.folder, cache_dir=hub, local_files_only=True)
    made.stage = "plan"
    made.plan = opened.plan(case.size, tolerance=0.2)
    made.stage = "weights"
    if case.kind == "calibration":
        made.calibration = opened.calibration
    made.model = opened.initialize(made.plan, progress=False)


def comparable(config: Any) -> dict[str, Any]:
    return {k: v for k, v in config.to_dict().items() if k not in ("cbd_hub", "_name_or_path")}


def judge(original: Original, case: Case, made: Made, outcome: Watched) -> tuple[str, str]:
    """What came of a case in a word, and what is wrong with it, if anything."""
    if outcome.problem:
        return "failed", outcome.problem
    if made.model is None or made.plan is None:
        return made.stage, ""
    if "auto_map" in made.model.config.to_json_string():
        return "failed", "its config names code"
    values, ordinary = dict(made.model.named_parameters()), original.models[case.size]
    if {k: tuple(v.shape) for k, v in values.items()} != {op.name: op.shape for op in made.plan.operations}:
        return "failed", "its shapes are not those of the plan"
    if made.calibration is not None and not torch.equal(made.calibration, original.calibration):  # type: ignore[arg-type]
        ids = made.calibration
        if not (case.forged and ids.ndim == 2 and 0 <= int(ids.min()) <= int(ids.max()) < 13):
            return "failed", "it gives token ids of nobody"
    if not equal(values, dict(ordinary.named_parameters())):
        if not case.may_differ:
            return "failed", "its tensors silently differ"
        if case.finite and not all(bool(torch.isfinite(value).all()) for value in values.values()):
            return "failed", "a parameter is not finite"
        return "other", ""
    if not (case.forged and case.kind in ("config", "claims")):
        if comparable(made.model.config) != comparable(ordinary.config):
            return "failed", "its config silently differs"
        generation = made.model.generation_config.to_dict(), ordinary.generation_config.to_dict()
        if generation[0] != generation[1] and not (
            case.kind == "manifest" or (case.forged and case.kind == "generation config")
        ):
            return "failed", "its generation config silently differs"
    return "same", ""


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Two gigabytes more than are in use: a claim that is believed fails, and fails soon."""
    resource = pytest.importorskip("resource", reason="memory is limited as POSIX does")
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


COUNTS = [
    ("llama", 400),
    pytest.param("llama", 1500, marks=pytest.mark.slow),
    pytest.param("smollm3-nope-sliding", 750, marks=pytest.mark.slow),
]
"""Cases of each family; the last one has lists of one entry a layer in its configs."""

COLUMNS = ("manifest", "plan", "weights", "same", "other", "failed")
"""Where a case was refused, or what model it gave."""


@pytest.mark.timeout(900)  # a minute of processor time, on a machine that may be busy
@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize(("variant", "count"), COUNTS)
def test_whatever_is_altered_is_refused_or_harmless(
    tmp_path: Path, variant: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CbdError in one line, the very same model, or the other one that a forger's chain says it is. Nothing else."""
    original = Original(tiny_chain(tmp_path / "work" / "chain", variant))
    (tmp_path / "work" / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "work" / "cwd")
    only = os.environ.get("TRUST_SEED", "")
    numbers = [int(only.rpartition(":")[2])] if only.startswith(f"{variant}:") else range(0 if only else count)
    table: dict[tuple[str, bool], Counter[str]] = defaultdict(Counter)
    failures: dict[str, list[str]] = defaultdict(list)
    for number in numbers:
        case, made = original.case(variant, number), Made()
        for name, data in case.files.items():
            (original.folder / name).write_bytes(data)
        before = tree(tmp_path)
        with Watched() as outcome:
            carry_out(original, case, made)
        label, problem = judge(original, case, made, outcome)
        if written := sorted(set(tree(tmp_path).items()) ^ set(before.items())):
            problem = f"it wrote {written[:3]}; {problem}"
        if torch.get_default_dtype() != torch.float32:
            problem = f"it left another default dtype; {problem}"
            torch.set_default_dtype(torch.float32)
        table[case.kind, case.forged]["failed" if problem else label] += 1
        if problem:
            told = f"TRUST_SEED={variant}:{number} ({case.kind}, {'forged' if case.forged else 'hashes kept'})"
            failures[problem.split(": ")[0]].append(f"{told}: {case.what[:200]}: {problem}")
        if only:
            print(case, label, outcome.error, sep="\n")
        for name in case.files:
            (original.folder / name).write_bytes(original.files[name])
    print(f"\n{variant:<26}" + "".join(f"{column:>10}" for column in COLUMNS))
    for (kind, forged), found in sorted(table.items()):
        print(f"{kind + (', forged' if forged else ''):<26}" + "".join(f"{found[column]:>10}" for column in COLUMNS))
    report = [f"{len(cases)} x {what}\n    {cases[0]}" for what, cases in failures.items()]
    assert not failures, "\n".join([f"{sum(map(len, failures.values()))} of {count} cases:", *sorted(report)])
    if not only:
        assert_every_stage_was_reached(table, count)


def assert_every_stage_was_reached(table: dict[tuple[str, bool], Counter[str]], count: int) -> None:
    """So that no case is refused for another reason than the one that it is there for."""
    total = sum(table.values(), Counter())
    assert total.total() == count
    for outcome, share in {"manifest": 0.1, "plan": 0.05, "weights": 0.2, "same": 0.05, "other": 0.005}.items():
        assert total[outcome] >= share * count, (outcome, total)
    for kind in set(KINDS) - {"manifest", "axis map", "claims"}:
        kept, forged = table[kind, False], table[kind, True]
        assert kept["other"] == 0
        if kind != "generation config":  # which `expand` and the second pair do not read
            assert kept["plan"] + kept["weights"] >= 0.9 * kept.total(), (kind, kept)
        assert forged["same"] + forged["other"] >= 0.05 * forged.total(), (kind, forged)
