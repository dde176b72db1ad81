"""The refit of a cut model, against ridge solutions that NumPy finds from the activations of whole forward passes."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from make_chain import random_index_map
from tiny_models import FAMILIES, VARIANTS, tiny_config, tiny_model
from torch import Tensor, nn
from trained import text, trained_model
from transformers import PreTrainedModel

from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.errors import RecipeError
from cbd_hub.evaluation.held_out import evaluate_loss
from cbd_hub.initialization.refit import RIDGE, can_refit, refit
from cbd_hub.interpolation.materialize import cut

TOKENS = torch.randint(3, 97, (24, 16), generator=torch.Generator().manual_seed(0))

# variant -> stack of layers, attention's output projection, the norm behind it, the ffn's output projection
MODULES = {
    "llama": ("model.layers", "self_attn.o_proj", "post_attention_layernorm", "mlp.down_proj"),
    "gpt2": ("transformer.h", "attn.c_proj", "ln_2", "mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers", "attention.dense", "post_attention_layernorm", "mlp.dense_4h_to_h"),
    "gpt_neox-sequential": ("gpt_neox.layers", "attention.dense", "post_attention_layernorm", "mlp.dense_4h_to_h"),
    "opt": ("model.decoder.layers", "self_attn.out_proj", "final_layer_norm", "fc2"),
}


def teacher_of(variant: str, **overrides: Any) -> PreTrainedModel:
    family, fields = VARIANTS[variant]
    return tiny_model(tiny_config(family, **{**fields, "num_hidden_layers": 4, **overrides}))


def cut_of(teacher: PreTrainedModel, seed: int = 0, **sizes: int) -> tuple[PreTrainedModel, list[int], Tensor | None]:
    """A subset of the teacher with these sizes, random units kept: (student, its layers, its hidden coordinates)."""
    axis_map = axis_map_for(teacher.config)
    large = axis_map.sizes(teacher.config)
    small = {**large, **sizes}
    index_map = random_index_map(axis_map, large, small, np.random.default_rng(seed))
    student = cut(teacher, axis_map, large, small, index_map)
    order = index_map.orders.get("hidden")
    kept = None if order is None else torch.from_numpy(order[: small["hidden"]].astype(np.int64))
    return student, index_map.layers[: small["layers"]].tolist(), kept


def activations(
    model: PreTrainedModel, inputs: Mapping[str, str], outputs: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """Inputs and outputs of some modules when the whole model sees :data:`TOKENS`: float64 (tokens, units) each."""
    seen: dict[str, np.ndarray] = {}

    def flat(value: Any) -> np.ndarray:
        value = value[0] if isinstance(value, tuple) else value
        return value.reshape(-1, value.shape[-1]).double().numpy()

    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs, key=key: seen.update({key: flat(args[0] if args else kwargs["hidden_states"])}),
            with_kwargs=True,
        )
        for key, name in inputs.items()
    ]
    handles += [
        model.get_submodule(name).register_forward_hook(lambda _, a, out, key=key: seen.update({key: flat(out)}))
        for key, name in outputs.items()
    ]
    with torch.no_grad():
        model(input_ids=TOKENS, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def ridge_change(inputs: np.ndarray, target: np.ndarray, error: np.ndarray, ridge: float) -> np.ndarray:
    """The change (units, hidden), as ordinary least squares of rows weighted and lengthened by the ridge's."""
    weight = 1 / np.linalg.norm(target, axis=1, keepdims=True)
    rows = inputs * weight
    penalty = np.sqrt(ridge * np.square(rows).sum() / rows.shape[1]) * np.eye(rows.shape[1])
    goal = np.concatenate([error * weight, np.zeros((rows.shape[1], error.shape[1]))])
    return np.linalg.lstsq(np.concatenate([rows, penalty]), goal, rcond=None)[0]


def add(module: nn.Module, change: np.ndarray) -> None:
    """Adds a change (units, hidden) to a matrix, which nn.Linear stores the other way round."""
    change = change.T if isinstance(module, nn.Linear) else change
    with torch.no_grad():
        module.weight += torch.from_numpy(change).to(module.weight.dtype)


def refit_by_hand(
    student: PreTrainedModel, teacher: PreTrainedModel, variant: str, layers: list[int], kept: Tensor | None
) -> None:
    """What :func:`refit` is to do, with whole forward passes."""
    stack, attention, norm, ffn = MODULES[variant]
    ends = [*(layer - 1 for layer in layers[1:]), teacher.config.num_hidden_layers - 1]
    columns = slice(None) if kept is None else kept.numpy()
    for j, (first, end) in enumerate(zip(layers, ends, strict=True)):
        wanted = activations(teacher, {"middle": f"{stack}.{first}.{norm}"}, {"end": f"{stack}.{end}"})
        middle, target = wanted["middle"][:, columns], wanted["end"][:, columns]
        own = f"{stack}.{j}."
        modules = student.get_submodule(own + attention), student.get_submodule(own + ffn)
        inputs = {"attention": own + attention, "ffn": own + ffn, "middle": own + norm}
        got = activations(student, inputs, {"end": f"{stack}.{j}"})
        if variant == "gpt_neox":  # attention and ffn read the same stream and are fitted together
            both = np.concatenate([got["attention"], got["ffn"]], 1)
            change = ridge_change(both, target, target - got["end"], RIDGE)
            split = got["attention"].shape[1]
            add(modules[0], change[:split])
            add(modules[1], change[split:])
            continue
        add(modules[0], ridge_change(got["attention"], middle, middle - got["middle"], RIDGE))
        got = activations(student, inputs, {"end": f"{stack}.{j}"})
        add(modules[1], ridge_change(got["ffn"], target, target - got["end"], RIDGE))


def stream_errors(
    student: PreTrainedModel, teacher: PreTrainedModel, layers: list[int], kept: Tensor | None
) -> Tensor:
    """Relative error of the student's stream at the end of each block, every token weighing the same: (layers,)."""
    stack = MODULES[teacher.config.model_type][0]
    ends = [*(layer - 1 for layer in layers[1:]), teacher.config.num_hidden_layers - 1]
    wanted = activations(teacher, {}, {str(i): f"{stack}.{end}" for i, end in enumerate(ends)})
    got = activations(student, {}, {str(i): f"{stack}.{i}" for i in range(len(layers))})
    errors = []
    for i in range(len(layers)):
        target = wanted[str(i)] if kept is None else wanted[str(i)][:, kept.numpy()]
        lack = np.square(target - got[str(i)]).sum(1) / np.square(target).sum(1)
        errors.append(lack.mean())
    return torch.tensor(errors)


def state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


# -- what it computes -------------------------------------------------------------------------------------------------

NARROW = {
    "llama": {"ffn": 40, "layers": 2, "kv_heads": 1},
    "gpt2": {"ffn": 50, "layers": 2},
    "gpt_neox": {"ffn": 50, "layers": 2},
    "gpt_neox-sequential": {"ffn": 50, "layers": 2},
    "opt": {"ffn": 50, "layers": 3},
}


@pytest.mark.parametrize("variant", MODULES)
def test_every_matrix_is_the_ridge_solution(variant: str) -> None:
    teacher = teacher_of(variant)
    student, layers, kept = cut_of(teacher, **NARROW[variant])
    expected, before = copy.deepcopy(student), state(student)
    refit_by_hand(expected, teacher, variant, layers, kept)
    teachers = state(teacher)
    assert refit(student, teacher, axis_map_for(teacher.config), layers, kept, TOKENS) == 2 * len(layers)
    assert all(torch.equal(value, teachers[name]) for name, value in teacher.named_parameters())
    changed = set()
    for name, value in student.named_parameters():
        change, wanted = value - before[name], expected.get_parameter(name) - before[name]
        assert (change - wanted).norm() <= 1e-4 * wanted.norm(), name
        if change.any():
            changed.add(name)
    stack, attention, _, ffn = MODULES[variant]
    assert changed == {f"{stack}.{j}.{m}.weight" for j in range(len(layers)) for m in (attention, ffn)}


def test_the_streams_of_a_narrower_model_are_compared_on_the_coordinates_it_kept() -> None:
    teacher = teacher_of("llama")
    student, layers, kept = cut_of(teacher, hidden=32, ffn=40, layers=3)
    assert kept is not None and kept.tolist() != sorted(kept.tolist())
    expected, before = copy.deepcopy(student), state(student)
    refit_by_hand(expected, teacher, "llama", layers, kept)
    refit(student, teacher, axis_map_for(teacher.config), layers, kept, TOKENS)
    for name, value in student.named_parameters():
        wanted = expected.get_parameter(name) - before[name]
        assert (value - before[name] - wanted).norm() <= 1e-4 * wanted.norm(), name


def test_batches_change_nothing_and_the_ridge_holds_back() -> None:
    teacher = teacher_of("llama")
    student, layers, kept = cut_of(teacher, ffn=40, layers=2)
    name = "model.layers.1.mlp.down_proj.weight"
    made = []
    for options in ({}, {"batch_size": 5}, {"ridge": 30.0}):
        model = copy.deepcopy(student)
        refit(model, teacher, axis_map_for(teacher.config), layers, kept, TOKENS, **options)
        made.append(model.get_parameter(name) - student.get_parameter(name))
    assert (made[0] - made[1]).norm() <= 1e-4 * made[0].norm()
    assert 0 < made[2].norm() < 0.2 * made[0].norm()


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_the_whole_model_has_nothing_to_make_up_for(variant: str) -> None:
    family, fields = VARIANTS[variant]
    teacher = tiny_model(tiny_config(family, **fields))
    student, axis_map = copy.deepcopy(teacher), axis_map_for(teacher.config)
    count = teacher.config.num_hidden_layers
    fitted = refit(student, teacher, axis_map, list(range(count)), None, TOKENS[:4])
    assert fitted == (2 * count if can_refit(axis_map) else 0)
    for name, value in student.named_parameters():
        assert (value - teacher.get_parameter(name)).abs().max() <= 1e-4, name


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_no_refit_where_norms_follow_blocks(family: str) -> None:
    teacher = tiny_model(tiny_config(family))
    axis_map = axis_map_for(teacher.config)
    assert can_refit(axis_map) is (family not in ("olmo2", "gemma3_text"))
    student, layers, kept = cut_of(teacher, ffn=48, layers=2)
    before = state(student)
    fitted = refit(student, teacher, axis_map, layers, kept, TOKENS[:4])
    same = all(torch.equal(value, before[name]) for name, value in student.named_parameters())
    assert (fitted, same) == ((4, False) if can_refit(axis_map) else (0, True))


def test_an_affine_free_norm_leaves_nothing_to_find_the_middle_by() -> None:
    config = tiny_config("opt", layer_norm_elementwise_affine=False)
    assert not can_refit(axis_map_for(config))


# -- what it is good for ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", {"ffn": 40, "layers": 3}),
        ("llama", {"hidden": 32, "ffn": 40, "layers": 3}),
        ("llama", {"layers": 1}),
        ("gpt2", {"ffn": 50, "layers": 3}),
        ("gpt_neox", {"ffn": 50, "layers": 3}),
        ("opt", {"ffn": 50, "layers": 3}),
    ],
)
def test_the_stream_follows_the_teacher_s_again(family: str, sizes: dict[str, int]) -> None:
    teacher = teacher_of(family)
    student, layers, kept = cut_of(teacher, **sizes)
    before = stream_errors(student, teacher, layers, kept)
    refit(student, teacher, axis_map_for(teacher.config), layers, kept, TOKENS)
    after = stream_errors(student, teacher, layers, kept)
    assert (after < 0.95 * before).all(), (before, after)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_trained_model_s_loss_comes_back(family: str) -> None:
    """On text that the fit did not see."""
    teacher = trained_model(family, num_hidden_layers=4)
    whole = evaluate_loss(teacher, text(64, seed=1)).loss
    assert whole < 1.2
    student, layers, kept = cut_of(teacher, ffn=60, layers=3)
    before = evaluate_loss(student, text(64, seed=1)).loss
    refit(student, teacher, axis_map_for(teacher.config), layers, kept, text(128, seed=2))
    after = evaluate_loss(student, text(64, seed=1)).loss
    assert before > whole + 0.05
    assert after < before - 0.2 * (before - whole)


def test_half_precision() -> None:
    teacher = teacher_of("llama")
    student, layers, kept = cut_of(teacher, ffn=40, layers=2)
    whole, before = copy.deepcopy(student), stream_errors(student, teacher, layers, kept)
    refit(whole, teacher, axis_map_for(teacher.config), layers, kept, TOKENS)
    nn.Module.to(student, dtype=torch.bfloat16)
    refit(student, teacher, axis_map_for(teacher.config), layers, kept, TOKENS)
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    after = stream_errors(nn.Module.to(student, dtype=torch.float32), teacher, layers, kept)
    best = stream_errors(whole, teacher, layers, kept)
    assert ((after - best).abs() < 0.1 * (before - best)).all()


# -- what it leaves as it was -----------------------------------------------------------------------------------------


def hooks(*models: PreTrainedModel) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for model in models for m in model.modules())


def outside_the_vocabulary(teacher: PreTrainedModel) -> Tensor:
    return torch.full((2, 8), teacher.config.vocab_size)


def failing_in_a_layer(teacher: PreTrainedModel) -> Tensor:
    """The teacher's third layer stops working in its second pass: after the inputs were noted."""
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) > 1:
            raise IndexError("broken")

    teacher.get_submodule("model.layers.2.mlp").register_forward_hook(fail)
    return TOKENS[:4]


@pytest.mark.parametrize("modes", [(True, False), (False, True)])
@pytest.mark.parametrize("trouble", [outside_the_vocabulary, failing_in_a_layer, None])
def test_hooks_and_modes_are_left_as_they_were(
    trouble: Callable[[PreTrainedModel], Tensor] | None, modes: tuple[bool, bool]
) -> None:
    teacher = teacher_of("llama")
    student, layers, kept = cut_of(teacher, ffn=40, layers=2)
    student.train(modes[0])
    teacher.train(modes[1])
    blocks = TOKENS[:4] if trouble is None else trouble(teacher)
    before = hooks(student, teacher)
    if trouble is None:
        refit(student, teacher, axis_map_for(teacher.config), layers, kept, blocks)
    else:
        with pytest.raises(IndexError):
            refit(student, teacher, axis_map_for(teacher.config), layers, kept, blocks)
    assert hooks(student, teacher) == before
    assert {m.training for m in student.modules()} == {modes[0]}
    assert {m.training for m in teacher.modules()} == {modes[1]}
    assert all(p.requires_grad and p.grad is None for p in student.parameters())


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [[], [0], [0, 1, 2], [1, 0], [0, 0], [0, 4], [-1, 0]])
def test_bad_layers_are_refused(layers: list[int]) -> None:
    teacher = teacher_of("llama")
    student, _, _ = cut_of(teacher, layers=2)
    with pytest.raises(RecipeError, match="are not 2 ascending layers out of 4"):
        refit(student, teacher, axis_map_for(teacher.config), layers, None, TOKENS)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0), (8,), (1, 2, 8)])
def test_bad_blocks_are_refused(shape: tuple[int, ...]) -> None:
    teacher = teacher_of("llama")
    student, layers, _ = cut_of(teacher, layers=2)
    with pytest.raises(RecipeError, match="calibration blocks have shape"):
        refit(student, teacher, axis_map_for(teacher.config), layers, None, torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize(("hidden", "kept"), [(32, None), (32, 48), (32, 31), (48, 32)])
def test_coordinates_that_are_not_the_student_s_are_refused(hidden: int, kept: int | None) -> None:
    teacher = teacher_of("llama")
    student, layers, _ = cut_of(teacher, hidden=hidden, layers=2)
    wanted = None if kept is None else torch.arange(kept)
    with pytest.raises(RecipeError, match=f"the student has {hidden}; pass as many in `kept`"):
        refit(student, teacher, axis_map_for(teacher.config), layers, wanted, TOKENS)
