"""``refine``: never worse than the plan on the calibration tokens, and open about what it did."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from make_chain import add_calibration, make_chain, refresh, variant_model
from safetensors.torch import save_file
from torch import Tensor
from trained import text, trained_chain
from transformers import AutoModelForCausalLM, PreTrainedModel

from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.chain.chain import Chain, ChainAnchor
from cbd_hub.chain.refine import SCREEN_TOKENS, Candidate, choose, list_candidates, load_calibration, save_calibration
from cbd_hub.errors import IntegrityError
from cbd_hub.evaluation.held_out import evaluate_loss
from cbd_hub.interpolation.plan import Plan
from cbd_hub.manifest.manifest import CALIBRATION_NAME, MANIFEST_NAME, read_manifest

TOKENS = torch.randint(3, 97, (12, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def chain_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``chain_of(variant, dtype)``: a chain of three random anchors with calibration tokens, made once."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def get(variant: str, dtype: torch.dtype = torch.float32) -> Path:
        if (variant, dtype) not in made:
            folder = make_chain(tmp_path_factory.mktemp("chains") / variant, variant_model(variant, dtype))
            made[variant, dtype] = add_calibration(folder, TOKENS)
        return made[variant, dtype]

    return get


def plan_of(chain: Chain, share: float = 0.5, pair: int = 0, **options: Any) -> Plan:
    """A plan at a share of the way from the small to the large anchor of a pair."""
    large, small = (chain.manifest.anchors[pair + i].num_parameters for i in range(2))
    return chain.plan(round(small + share * (large - small)), **options)


def report(model: PreTrainedModel) -> dict[str, Any]:
    return model.config.cbd_hub["refine"]


def stages(plan: Plan, chain: Chain, best: Callable[[list[Candidate]], Candidate | None]) -> list[list[Candidate]]:
    """All stages, when ``best`` says which candidate of a stage is the best so far (None: the one before)."""
    generator, chosen, seen = list_candidates(plan, chain.manifest), Candidate("planned", plan), []
    try:
        stage = next(generator)
        while True:
            seen.append(stage)
            chosen = best(stage) or chosen
            stage = generator.send(chosen)
    except StopIteration:
        return seen


def compared_tokens(chain: Chain) -> Tensor:
    """The half of the calibration tokens that no refit sees."""
    assert chain.calibration is not None
    return chain.calibration[: len(chain.calibration) // 2]


# -- the best of several ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("chain", [{"layers": 2}, {"aligned": False}], ids=["aligned", "independent"])
def test_never_worse_than_the_plan_on_the_calibration_tokens(chain: dict[str, Any], share: float) -> None:
    opened = Chain.from_pretrained(trained_chain(**chain))
    plan = plan_of(opened, share)
    model = opened.initialize(plan, refine=True, progress=False)
    blocks, said = compared_tokens(opened), report(model)
    planned = evaluate_loss(opened.initialize(plan, progress=False), blocks).loss
    mine = evaluate_loss(model, blocks).loss
    assert mine <= planned
    assert said["planned_loss"] == pytest.approx(planned, abs=1e-5)
    assert said["calibration_loss"] == pytest.approx(mine, abs=1e-5)
    assert said["calibration_tokens"] == blocks.numel()
    assert said["compared"]["planned"] == pytest.approx(planned, abs=1e-5)  # all are screened on: they are few
    assert said["candidate"] == "planned" or said["candidate"] == min(said["compared"], key=said["compared"].get)
    assert model.num_parameters() == plan.num_parameters
    assert not model.training


def test_weights_that_cannot_be_averaged_are_not() -> None:
    """Nothing in this chain's manifest says that its anchors are strangers; the loss does, on other text too."""
    chain = Chain.from_pretrained(trained_chain(aligned=False))
    plan = plan_of(chain)
    assert plan.method == "interpolate"
    model = chain.initialize(plan, refine=True, progress=False)
    assert model.config.cbd_hub["method"] in ("expand", "prune")
    assert model.config.cbd_hub["alpha"] in (0.0, 1.0)
    said, fresh = report(model), text(48, seed=8)
    assert said["calibration_loss"] < said["planned_loss"] - 0.2
    assert evaluate_loss(model, fresh).loss < evaluate_loss(chain.initialize(plan, progress=False), fresh).loss - 0.2


def test_the_report_survives_saving(tmp_path: Path) -> None:
    chain = Chain.from_pretrained(trained_chain(layers=2))
    model = chain.initialize(plan_of(chain), refine=True, progress=False)
    assert set(report(model)) == {
        "candidate",
        "calibration_loss",
        "planned_loss",
        "calibration_tokens",
        "compared",
    }
    assert all(isinstance(v, float) for v in report(model)["compared"].values())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.cbd_hub == model.config.cbd_hub
    assert json.loads((tmp_path / "config.json").read_text())["cbd_hub"]["refine"] == report(model)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_the_same_twice() -> None:
    chain = Chain.from_pretrained(trained_chain(layers=2))
    one, two = (chain.initialize(plan_of(chain), refine=True, progress=False) for _ in range(2))
    assert report(one) == report(two)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("dtype", ["auto", "float32", torch.bfloat16, "float16"])
def test_the_dtype_is_the_one_that_was_asked_for(chain_of: Callable[..., Path], tmp_path: Path, dtype: Any) -> None:
    """Of the weights: rotary frequencies stay float32, as in a model that was loaded."""
    chain = Chain.from_pretrained(chain_of("llama", torch.bfloat16))
    model = chain.initialize(plan_of(chain, pair=1), refine=True, dtype=dtype, progress=False)
    wanted = {"auto": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}.get(dtype, dtype)
    assert {p.dtype for p in model.parameters()} == {wanted}
    assert model.config.dtype == wanted
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert [b.dtype for b in model.buffers()] == [b.dtype for b in loaded.buffers()]
    with torch.no_grad():
        assert torch.equal(model(input_ids=TOKENS).logits, loaded(input_ids=TOKENS).logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_plan_that_nothing_beats_gives_the_model_that_it_gives_without(
    chain_of: Callable[..., Path], tmp_path: Path, dtype: str
) -> None:
    """One block is too little to tell anything from chance, and the refits have no text of their own."""
    chain = Chain.from_pretrained(chain_of("llama-tied"))
    chain.save_pretrained(tmp_path / "c")
    chain = Chain.from_pretrained(add_calibration(tmp_path / "c", TOKENS[:1]))
    plan = plan_of(chain)
    refined = chain.initialize(plan, refine=True, dtype=dtype, progress=False)
    plain = chain.initialize(plan, dtype=dtype, progress=False)
    assert report(refined)["candidate"] == "planned"
    assert not any("refit" in name for name in report(refined)["compared"])
    assert report(refined)["calibration_loss"] == report(refined)["planned_loss"]
    assert {k: v for k, v in refined.config.cbd_hub.items() if k != "refine"} == plain.config.cbd_hub
    assert all(torch.equal(a, b) for a, b in zip(refined.parameters(), plain.parameters(), strict=True))
    assert refined.lm_head.weight is refined.model.embed_tokens.weight


@pytest.mark.parametrize("blocks", [3, 65, 200])
def test_most_tokens_are_compared_on_and_the_refits_see_none_of_them(tmp_path: Path, blocks: int) -> None:
    """Groups are of equal size, so up to one block in 32 is left over; the screen takes a part."""
    chain = Chain.from_pretrained(trained_chain())
    chain.save_pretrained(tmp_path / "c")
    length = SCREEN_TOKENS // 50
    chain = Chain.from_pretrained(add_calibration(tmp_path / "c", text(blocks, 64)[:, :length]))
    model = chain.initialize(plan_of(chain), refine=True, progress=False)
    kept = blocks - blocks // 2
    compared = kept // max(1, kept // 32) * max(1, kept // 32)
    assert report(model)["calibration_tokens"] == compared * 64
    planned = chain.initialize(plan_of(chain), progress=False)
    assert chain.calibration is not None
    loss = evaluate_loss(planned, chain.calibration[:compared]).loss
    assert report(model)["planned_loss"] == pytest.approx(loss, abs=1e-5)
    screened = evaluate_loss(planned, chain.calibration[: min(kept, SCREEN_TOKENS // 64)]).loss
    assert report(model)["compared"]["planned"] == pytest.approx(screened, abs=1e-5)


def test_the_large_anchor_is_loaded_once_and_models_are_made_in_float32() -> None:
    chain = Chain.from_pretrained(trained_chain())
    plan, loads, made = plan_of(chain), [], []

    def load_large() -> PreTrainedModel:
        loads.append(plan.large)
        return ChainAnchor(chain, chain.manifest.anchors[0]).load(torch.float32)

    def make(asked: Plan) -> PreTrainedModel:
        made.append(asked)
        return chain.initialize(asked, dtype=torch.float32, progress=False)

    assert chain.calibration is not None
    model = choose(plan, chain.manifest, make, load_large, chain.calibration, torch.bfloat16, progress=False)
    assert loads == [plan.large]
    assert made[0] is plan
    assert {p.sizes["layers"] for p in made} == {plan.sizes["layers"]}
    assert len(report(model)["compared"]) <= len(made) <= len(report(model)["compared"]) + 1
    assert model.dtype == torch.bfloat16


def test_an_anchor_is_itself(chain_of: Callable[..., Path], tmp_path: Path) -> None:
    chain = Chain.from_pretrained(chain_of("llama"))
    chain.save_pretrained(tmp_path / "c")
    (tmp_path / "c" / CALIBRATION_NAME).unlink()  # not even looked at
    chain = Chain.from_pretrained(tmp_path / "c")
    plan = chain.plan(chain.anchors[1].num_parameters)
    assert "refine" not in chain.initialize(plan, refine=True, progress=False).config.cbd_hub


@pytest.mark.parametrize("variant", ["gpt2", "gpt_neox", "opt", "phi3", "olmo2", "gemma3_text", "qwen3-sliding"])
def test_every_family(chain_of: Callable[..., Path], variant: str) -> None:
    chain = Chain.from_pretrained(chain_of(variant))
    for pair in (0, 1):
        model = chain.initialize(plan_of(chain, pair=pair), refine=True, progress=False)
        said = report(model)
        assert said["calibration_loss"] <= said["planned_loss"]
        assert all(np.isfinite(loss) for loss in said["compared"].values())
        assert any("refit" in name for name in said["compared"]) is (variant not in ("olmo2", "gemma3_text"))


# -- the candidates ---------------------------------------------------------------------------------------------------


def test_candidates_of_an_interpolation_whose_anchors_differ_in_layers() -> None:
    chain = Chain.from_pretrained(trained_chain(layers=2))
    plan = plan_of(chain, 0.5)
    assert (plan.method, plan.sizes["layers"]) == ("interpolate", 4)
    found = stages(plan, chain, lambda stage: None)
    assert [[c.name for c in stage] for stage in found] == [
        [
            "interpolate, large-only units at full weight",
            f"interpolate, alpha {plan.alpha - 0.2:.2f}",
            f"interpolate, alpha {plan.alpha + 0.2:.2f}",
        ],
        ["planned, other layers (1)", "planned, other layers (2)"],
        ["expand", "prune + refit"],
        ["planned + refit"],
    ]
    weights, layers, others, last = found
    assert (weights[0].plan.alpha, weights[0].plan.large_only_weight) == (plan.alpha, 1.0)
    for candidate in weights[1:]:
        assert candidate.plan.large_only_weight == pytest.approx(1 - candidate.plan.alpha**2)
    order = plan.pair.index_map.layers.tolist()
    assert order == [2, 4, 3, 0, 1]  # 2 and 4 are the small anchor's
    chosen = [sorted(c.plan.pair.index_map.layers[:4].tolist()) for c in layers]
    assert chosen == [[0, 1, 2, 4], [1, 2, 3, 4]]
    assert [c.plan.alpha for c in others] == [1.0, 0.0]
    assert [c.refit for c in others + last] == [False, True, True]
    assert last[0].plan is plan


def test_later_candidates_start_from_the_best_so_far() -> None:
    chain = Chain.from_pretrained(trained_chain(layers=2))
    plan = plan_of(chain, 0.5)
    _, layers, _, last = stages(plan, chain, lambda stage: next((c for c in stage if not c.refit), None))
    assert [c.name for c in layers] == [
        "interpolate, large-only units at full weight, other layers (1)",
        "interpolate, large-only units at full weight, other layers (2)",
    ]
    assert all(c.plan.large_only_weight == 1.0 and c.plan.alpha == plan.alpha for c in layers)
    assert [(c.name, c.plan.method, c.refit) for c in last] == [("expand + refit", "expand", True)]


def test_what_was_refitted_is_not_refitted_again() -> None:
    chain = Chain.from_pretrained(trained_chain(layers=2))
    found = stages(plan_of(chain), chain, lambda stage: next((c for c in stage if c.refit), None))
    assert [c.name for c in found[-1]] == ["expand", "prune + refit"]


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("expand", [["prune + refit"], ["planned + refit"]]),
        ("prune", [["expand"], ["planned + refit"]]),
        ("paper", [["expand", "prune + refit"], ["planned + refit"]]),
    ],
)
def test_candidates_of_the_other_methods(method: str, names: list[list[str]]) -> None:
    chain = Chain.from_pretrained(trained_chain(layers=2))
    found = stages(plan_of(chain, method=method), chain, lambda stage: None)
    assert [[c.name for c in stage] for stage in found] == names


def test_the_same_number_of_layers_leaves_nothing_to_choose(tmp_path: Path) -> None:
    model = variant_model("llama")
    sizes = axis_map_for(model.config).sizes(model.config)
    chain = Chain.from_pretrained(make_chain(tmp_path / "c", model, [{**sizes, "ffn": 80}]))
    found = stages(plan_of(chain), chain, lambda stage: None)
    assert found[1] == []
    assert not any("layers" in c.name for stage in found for c in stage)


def test_alphas_stay_between_the_anchors(chain_of: Callable[..., Path]) -> None:
    chain = Chain.from_pretrained(chain_of("llama"))
    for alpha, near in ((0.1, [0.3]), (0.9, [0.7]), (0.5, [0.3, 0.7])):
        found = stages(plan_of(chain, alpha=alpha), chain, lambda stage: None)[0]
        assert [round(c.plan.alpha, 6) for c in found if "alpha" in c.name] == near


def test_an_anchor_that_was_only_cut_out_has_full_weights_already(tmp_path: Path) -> None:
    folder = make_chain(tmp_path / "c", variant_model("llama"), training={"tokens": 0, "seed": 0})
    chain = Chain.from_pretrained(folder)
    plan = plan_of(chain)
    found = stages(plan, chain, lambda stage: None)[0]
    assert plan.large_only_weight == 1.0
    assert [c.plan.large_only_weight for c in found] == [1.0, 1.0]
    assert not any("full weight" in c.name for c in found)


def test_every_candidate_has_the_shape_that_was_planned(chain_of: Callable[..., Path]) -> None:
    chain = Chain.from_pretrained(chain_of("llama"))
    plan = plan_of(chain, pair=1)
    for stage in stages(plan, chain, lambda stage: stage[-1] if stage else None):
        for candidate in stage:
            assert candidate.plan.sizes == plan.sizes
            assert [op.shape for op in candidate.plan.operations] == [op.shape for op in plan.operations]
            model = chain.initialize(candidate.plan, progress=False)
            assert model.num_parameters() == plan.num_parameters


# -- the calibration tokens -------------------------------------------------------------------------------------------


def test_calibration_round_trip(chain_of: Callable[..., Path], tmp_path: Path) -> None:
    manifest = read_manifest(chain_of("llama") / MANIFEST_NAME)
    save_calibration(TOKENS, tmp_path / CALIBRATION_NAME)
    assert torch.equal(load_calibration(manifest, tmp_path / CALIBRATION_NAME), TOKENS)
    assert (tmp_path / CALIBRATION_NAME).read_bytes() == (chain_of("llama") / CALIBRATION_NAME).read_bytes()
    assert (tmp_path / CALIBRATION_NAME).stat().st_size < 4 * TOKENS.numel() + 200


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"input_ids": TOKENS}, "must hold `input_ids`, int32"),
        ({"input_ids": TOKENS.float()}, "must hold `input_ids`, int32"),
        ({"input_ids": TOKENS.bfloat16()}, "must hold `input_ids`, int32|cannot be read"),
        ({"input_ids": TOKENS.to(torch.float8_e4m3fn)}, "must hold `input_ids`, int32|cannot be read"),
        ({"input_ids": TOKENS[0].int()}, "must hold `input_ids`, int32"),
        ({"input_ids": TOKENS[:, :1].int()}, "2 or more tokens"),
        ({"input_ids": TOKENS[:0].int()}, "must hold `input_ids`, int32"),
        ({"ids": TOKENS.int()}, "must hold `input_ids`, int32"),
        ({"input_ids": TOKENS.int() + 1}, "outside the vocabulary of 97"),
        ({"input_ids": TOKENS.int() - 4}, "outside the vocabulary of 97"),
    ],
)
def test_what_are_no_token_ids_is_refused(
    chain_of: Callable[..., Path], tmp_path: Path, tensors: dict[str, Tensor], says: str
) -> None:
    Chain.from_pretrained(chain_of("llama")).save_pretrained(tmp_path / "c")
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "c" / CALIBRATION_NAME)
    refresh(tmp_path / "c")  # the hash fits: the file itself is at fault
    chain = Chain.from_pretrained(tmp_path / "c")
    with pytest.raises(IntegrityError, match=says):
        chain.initialize(plan_of(chain), refine=True, progress=False)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
@pytest.mark.parametrize("fits", [True, False])
def test_a_calibration_file_cut_short_is_refused(
    chain_of: Callable[..., Path], tmp_path: Path, size: int, fits: bool
) -> None:
    Chain.from_pretrained(chain_of("llama")).save_pretrained(tmp_path / "c")
    path = tmp_path / "c" / CALIBRATION_NAME
    path.write_bytes(path.read_bytes()[:size])
    if fits:
        refresh(tmp_path / "c")
    chain = Chain.from_pretrained(tmp_path / "c")
    with pytest.raises(IntegrityError, match="cannot be read" if fits else "is not the file that the manifest names"):
        _ = chain.calibration
    with pytest.raises(IntegrityError):
        chain.initialize(plan_of(chain), refine=True, progress=False)
