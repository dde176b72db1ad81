"""Models of any size out of a chain: exact at the anchors, as the formulas say in between, and plain transformers."""

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from make_chain import add_calibration, edit_manifest, labels, make_chain, refresh, steps_for, variant_model
from safetensors.torch import load_file, save_file
from tiny_models import VARIANTS
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from cbd_hub.axes.architectures import AXIS_MAPS, axis_map_for
from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.chain.assemble import anchor_config, open_weights
from cbd_hub.chain.chain import SHIPPED, Chain, from_chain
from cbd_hub.errors import (
    CbdError,
    ChainNotFoundError,
    IntegrityError,
    ManifestError,
    OutputExistsError,
    SizeError,
)
from cbd_hub.interpolation.materialize import make_tensor
from cbd_hub.interpolation.plan import Plan
from cbd_hub.manifest.manifest import CALIBRATION_NAME, CHECKSUMS_NAME, INDEX_MAPS_NAME, MANIFEST_NAME, file_entry

TOKENS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))

each_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(scope="module")
def chain_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``chain_of(variant, dtype)``: the folder of a chain of three anchors, made once; bfloat16 ones are sharded."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def get(variant: str, dtype: torch.dtype = torch.float32) -> Path:
        if (variant, dtype) not in made:
            shards = "60KB" if dtype == torch.bfloat16 else "1GB"
            folder = tmp_path_factory.mktemp("chains") / variant
            made[variant, dtype] = make_chain(
                folder, variant_model(variant, dtype), energy=True, max_shard_size=shards
            )
        return made[variant, dtype]

    return get


@pytest.fixture
def llama(chain_of: Callable[..., Path], tmp_path: Path) -> Path:
    """A Llama chain that a test may damage."""
    shutil.copytree(chain_of("llama"), tmp_path / "llama")
    return tmp_path / "llama"


def middle_size(folder: Path, pair: int = 0, share: float = 0.5) -> int:
    counts = [a.num_parameters for a in Chain.from_pretrained(folder).anchors]
    return round(counts[pair + 1] + share * (counts[pair] - counts[pair + 1]))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model folder, by their names as parameters (GPT-NeoX stores its head as ``embed_out``)."""
    tensors = {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}
    return {AXIS_MAPS["gpt_neox"].renamed.get(key, key): value for key, value in tensors.items()}


def parameters(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in model.named_parameters()}


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


def digest(values: torch.Tensor) -> str:
    return hashlib.sha256(values.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


# -- every family, many sizes, in a process that knows nothing of this library ----------------------------------------

RELOAD = """
import hashlib, json, sys
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
tokens = torch.tensor(json.loads(sys.stdin.readline()))
for line in sys.stdin:
    model, info = AutoModelForCausalLM.from_pretrained(line.strip(), output_loading_info=True)
    with torch.no_grad():
        logits = model.eval()(input_ids=tokens, use_cache=False).logits
    made = model.generate(tokens[:1], max_new_tokens=2, min_new_tokens=2, do_sample=False)
    print(json.dumps({
        "logits": hashlib.sha256(logits.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest(),
        "finite": bool(torch.isfinite(logits.float()).all()),
        "generated": made.shape[1] - tokens.shape[1],
        "problems": {k: sorted(map(str, v)) for k, v in info.items() if v},
        "dtype": str(model.dtype),
        "num_parameters": model.num_parameters(),
        "code": "cbd_hub" in sys.modules or hasattr(model.config, "auto_map"),
    }), flush=True)
"""


@pytest.fixture(scope="module")
def reload() -> Iterator[Callable[[Path], dict[str, Any]]]:
    """``reload(folder)``: what plain transformers, in a process of its own, says of a model folder."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", RELOAD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, bufsize=1
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout
    stdin.write(json.dumps(TOKENS.tolist()) + "\n")

    def ask(folder: Path) -> dict[str, Any]:
        stdin.write(f"{folder}\n")
        answer = stdout.readline()
        assert answer, "the other process ended; its traceback is above"
        return json.loads(answer)

    yield ask
    stdin.close()
    assert process.wait(60) == 0


@each_variant
@pytest.mark.parametrize("sizes", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_any_size_is_a_plain_transformers_model(
    chain_of: Callable[..., Path], tmp_path: Path, reload: Callable[[Path], dict[str, Any]], variant: str, sizes: int
) -> None:
    for i in range(sizes):
        dtype = (torch.float32, torch.bfloat16)[i % 2]
        chain = Chain.from_pretrained(chain_of(variant, dtype))
        low, high = chain.anchors[-1].num_parameters, chain.anchors[0].num_parameters
        target = low + (high - low) * i // (sizes - 1)
        plan = chain.plan(target)
        model = chain.initialize(plan, progress=False)

        assert not model.training
        assert model.num_parameters() == plan.num_parameters
        assert abs(plan.num_parameters - target) <= 0.01 * target
        assert {p.dtype for p in model.parameters()} == {dtype}
        axis_map = chain.manifest.resolved_axis_map
        assert axis_map_for(model.config) == axis_map
        assert axis_map.sizes(model.config) == plan.sizes
        for name in axis_map.layer_lists:
            entries = getattr(model.config, name, None)
            assert entries is None or len(entries) == plan.sizes["layers"]
        numbers = {module.layer_idx for module in model.modules() if hasattr(module, "layer_idx")}
        assert numbers == set(range(plan.sizes["layers"]))

        folder = tmp_path / str(i)
        model.save_pretrained(folder, max_shard_size="60KB" if i % 3 == 0 else "1GB")
        assert set(stored(folder)) == set(axis_map.shapes(plan.sizes))  # a tied head is not stored
        answer = reload(folder)
        assert answer == {
            "logits": digest(logits(model)),
            "finite": True,
            "generated": 2,
            "problems": {},
            "dtype": str(dtype),
            "num_parameters": plan.num_parameters,
            "code": False,
        }
        shutil.rmtree(folder)


@pytest.mark.parametrize("variant", ["gemma3_text", "qwen2-sliding", "smollm3-nope"])
def test_lists_of_a_layer_each_follow_the_layers(chain_of: Callable[..., Path], variant: str) -> None:
    chain = Chain.from_pretrained(chain_of(variant))
    large, small = anchor_config(chain, chain.manifest.anchors[0]), chain.manifest.anchors[1]
    kept = sorted((small.layer_order or [])[: chain.manifest.sizes(small)["layers"]])
    cut = anchor_config(chain, small)
    for name in ("layer_types", "no_rope_layers"):
        if getattr(large, name, None):
            assert getattr(cut, name) == [getattr(large, name)[i] for i in kept]


# -- invariants -------------------------------------------------------------------------------------------------------


@each_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_anchor_comes_back_bit_for_bit(chain_of: Callable[..., Path], variant: str, dtype: torch.dtype) -> None:
    folder = chain_of(variant, dtype)
    chain = Chain.from_pretrained(folder)
    for i, anchor in enumerate(chain.anchors):
        original = stored(folder / "anchors" / anchor.name)
        asked: list[dict[str, Any]] = [{"num_parameters": anchor.num_parameters}]
        if i != 1:  # an end of the chain: alpha 0 is the largest anchor, alpha 1 the smallest
            asked += [{"shape": anchor.shape, "alpha": i // 2, "method": m} for m in ("interpolate", "paper")]
        for arguments in asked:
            state = parameters(chain.initialize(chain.plan(**arguments), progress=False))
            assert set(state) == set(original)
            assert all(torch.equal(state[k], original[k]) for k in state)
        config = anchor.load().config
        wanted = anchor_config(chain, anchor.entry).to_dict() | anchor.shape | {"cbd_hub": config.cbd_hub}
        assert {**config.to_dict(), "_name_or_path": ""} == {**wanted, "_name_or_path": ""}


def reference(folder: Path, plan: Plan, paper: bool) -> dict[str, np.ndarray]:
    """What a plan's model must be, from the stored tensors and the index maps, by labels of units; float32."""
    chain = Chain.from_pretrained(folder)
    axis_map, index_map = chain.manifest.resolved_axis_map, chain.index_maps[plan.small]
    entries = {a.name: a for a in chain.manifest.anchors}
    big, little = axis_map.sizes(entries[plan.large].shape), axis_map.sizes(entries[plan.small].shape)
    theirs, ours = stored(folder / "anchors" / plan.large), stored(folder / "anchors" / plan.small)
    order = entries[plan.small].layer_order or []
    kept = sorted(order[: plan.sizes["layers"]])
    alpha, rest, made = np.float32(plan.alpha), np.float32(1 - plan.alpha), {}
    large_only_weight = np.float32(1 - plan.alpha**2)
    for name, pattern, layer in axis_map.names(plan.sizes):
        from_large = layer if layer is None else kept[layer]
        has_partner = layer is None or from_large in order[: little["layers"]]
        large = theirs[pattern.replace("*", str(from_large))].float().numpy()
        small = None
        if has_partner:
            key = pattern if from_large is None else pattern.replace("*", str(order.index(from_large)))
            small = ours[key].float().numpy()
        if not paper:
            energy = index_map.energy.get(pattern)
            if energy is not None and big["hidden"] != plan.sizes["hidden"]:
                share = energy[from_large] if energy.ndim == 2 else energy
                kept_units = index_map.orders["hidden"][: plan.sizes["hidden"]]
                measured = np.sqrt(np.mean(share[kept_units], dtype=np.float64))
            else:
                measured = 1.0
            large = scaled(large, axis_map, pattern, big, plan.sizes, measured)
            if small is not None:
                counts = [
                    np.prod([len(dim) for dim in labels(axis_map.tensors[pattern], s)]) for s in (little, plan.sizes)
                ]
                small = scaled(small, axis_map, pattern, little, plan.sizes, np.sqrt(counts[0] / counts[1]))
        spec = axis_map.tensors[pattern]
        wanted = labels(spec, plan.sizes)
        in_large = [{label: i for i, label in enumerate(dim)} for dim in labels(spec, big)]

        def partner(label: Any, layer: int | None = from_large) -> Any:
            return tuple(
                (a, int(index_map.orders[a][layer][u] if a != "hidden" else index_map.orders[a][u]))
                if a in index_map.orders
                else (a, u)
                for a, u in label
            )

        value = large[np.ix_(*[[in_large[d][partner(label)] for label in dim] for d, dim in enumerate(wanted)])]
        placed, mask = np.zeros_like(value), np.zeros(value.shape, dtype=bool)
        if not paper and small is None:  # a block that only the large anchor has writes with weight 1 - alpha^2
            if axis_map.writes(pattern):
                value = value * large_only_weight
            elif axis_map.norms.get(pattern) == () and axis_map.tensors[pattern] == "hidden":
                offset = np.float32(axis_map.model_type == "gemma3_text")
                value = (value + offset) * large_only_weight - offset
        if small is not None:
            in_small = [{label: i for i, label in enumerate(dim)} for dim in labels(spec, little)]
            here = [[i for i, label in enumerate(dim) if label in in_small[d]] for d, dim in enumerate(wanted)]
            there = [[in_small[d][dim[i]] for i in here[d]] for d, dim in enumerate(wanted)]
            placed[np.ix_(*here)], mask[np.ix_(*here)] = small[np.ix_(*there)], True
            if not paper and layer is not None and axis_map.writes(pattern) and value.ndim == 2:  # so do its units
                dim = next(d for d, spec_dim in enumerate(wanted) if spec_dim[0][1][0] != "hidden")
                own = [i for i in range(value.shape[dim]) if i not in set(here[dim])]
                value[(slice(None),) * dim + (own,)] *= large_only_weight
        mixed = alpha * placed + rest * value
        made[name] = mixed if paper else np.where(mask, mixed, value)
    return made


def scaled(
    value: np.ndarray, axis_map: AxisMap, pattern: str, old: Mapping[str, int], new: Mapping[str, int], gain: float
) -> np.ndarray:
    """The corrections of scale: norm gains by the root mean square, Gemma's embedding by sqrt(hidden)."""
    ratio = np.sqrt(old["hidden"] / new["hidden"])
    factor = gain if pattern in axis_map.norms else 1.0
    if axis_map.model_type == "gemma3_text":
        if pattern == "model.embed_tokens.weight":
            factor = ratio
        if pattern == "model.norm.weight" and axis_map.tied:
            factor /= ratio
    if factor == 1.0:
        return value
    offset = np.float32(1.0 if axis_map.model_type == "gemma3_text" and pattern in axis_map.norms else 0.0)
    return (value + offset) * np.float32(factor) - offset


@each_variant
@pytest.mark.parametrize("method", ["interpolate", "paper"])
def test_tensors_are_what_the_formula_says(chain_of: Callable[..., Path], variant: str, method: str) -> None:
    asked = {
        torch.float32: [(0, 0.6, "auto"), (1, 0.4, 1.0), (1, 0.5, 0.0)],
        torch.bfloat16: [(1, 0.5, 0.3)],
    }
    for dtype, cases in asked.items():
        folder = chain_of(variant, dtype)
        chain = Chain.from_pretrained(folder)
        for pair, share, alpha in cases:
            plan = chain.plan(middle_size(folder, pair, share), method=method, alpha=alpha)
            state = parameters(chain.initialize(plan, progress=False))
            expected = reference(folder, plan, method == "paper")
            assert set(state) == set(expected)
            for name, value in state.items():
                exact = torch.from_numpy(expected[name]).double()
                rounded = 1e-6 if dtype == torch.float32 else 2**-8  # once: by half a step of the dtype at most
                assert torch.allclose(value.double(), exact, rtol=rounded, atol=1e-7), name


@each_variant
def test_prune_and_expand_use_one_anchor(chain_of: Callable[..., Path], tmp_path: Path, variant: str) -> None:
    """With the other anchor's weights gone, the model is still made."""
    shutil.copytree(chain_of(variant), tmp_path / "c")
    target = middle_size(tmp_path / "c", 1)
    for method, gone in (("prune", "a2"), ("expand", "a1")):
        whole = from_chain(chain_of(variant), target, method=method)
        for file in (tmp_path / "c" / "anchors" / gone).glob("*.safetensors"):
            file.rename(file.with_suffix(".away"))
        part = from_chain(tmp_path / "c", target, method=method)
        assert torch.equal(logits(part), logits(whole))
        for file in (tmp_path / "c" / "anchors" / gone).glob("*.away"):
            file.rename(file.with_suffix(".safetensors"))


def without_epsilon(model: PreTrainedModel) -> PreTrainedModel:
    """The model with the epsilon of its norms made tiny: the one thing that widening changes."""
    for module in model.modules():
        for name in ("eps", "variance_epsilon"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 1e-30)
    return model


@each_variant
def test_expand_preserves_the_function(tmp_path: Path, variant: str) -> None:
    """The small anchor's logits, whatever is made bigger: ffn, heads, the residual stream, depth, and all of it."""
    source = variant_model(variant, torch.float64)
    axis_map = axis_map_for(source.config)
    sizes = axis_map.sizes(source.config)
    small = {**steps_for(axis_map, sizes)[1], "layers": sizes["layers"] - 2}
    chain = Chain.from_pretrained(make_chain(tmp_path / "c", source, [small], energy=True))
    before = logits(without_epsilon(chain.anchors[-1].load()))
    heads = ["heads", "hidden"] if "hidden" in axis_map.equal else ["kv_heads", "q_per_kv"]
    wider = {axis: sizes[axis] for axis in heads}
    grown = [{"ffn": 100}, {"layers": sizes["layers"] - 1}, wider, sizes]
    if "hidden" not in axis_map.equal:
        grown.append({"hidden": sizes["hidden"]})
    for axes in grown:
        plan = chain.plan(shape=axis_map.config_fields({**small, **axes}), method="expand")
        assert plan.method == "expand"
        after = logits(without_epsilon(chain.initialize(plan, progress=False)))
        tolerance = 1e-5 if axis_map.norm.startswith("rms") else 1e-12  # RMSNorms of transformers sum in float32
        assert (after - before).abs().max() < tolerance, axes


@each_variant
def test_equal_anchors_make_equal_models(tmp_path: Path, variant: str) -> None:
    """Where the small anchor was only cut out, its units are the large one's to the bit, and alpha is of no matter."""
    folder = make_chain(tmp_path / "c", variant_model(variant), width=False, noise=0.0)
    manifest = json.loads((folder / "chain.json").read_text())
    for entry in manifest["anchors"][1:]:
        entry["training"] = {"tokens": 0, "seed": 0}
    (folder / "chain.json").write_text(json.dumps(manifest))
    chain = Chain.from_pretrained(folder)
    target = middle_size(tmp_path / "c")
    pruned = logits(chain.initialize(chain.plan(target, method="prune"), progress=False))
    for alpha in (0.0, 0.3, 1.0):
        mixed = logits(chain.initialize(chain.plan(target, method="interpolate", alpha=alpha), progress=False))
        assert torch.allclose(mixed, pruned, atol=1e-5)


@pytest.mark.parametrize("variant", ["llama", "gemma3_text", "gpt2", "phi3-tied", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_to_read_are_the_bytes_read(chain_of: Callable[..., Path], variant: str, dtype: torch.dtype) -> None:
    folder = chain_of(variant, dtype)
    chain = Chain.from_pretrained(folder)
    for method in ("interpolate", "paper", "expand", "prune"):
        for pair in (0, 1):
            plan = chain.plan(middle_size(folder, pair), method=method)
            entries = {a.name: a.entry for a in chain.anchors}
            files = {name: open_weights(chain, entries[name]) for name in (plan.large, plan.small)}
            read = files[plan.large].read, files[plan.small].read
            for op in plan.operations:
                tensor = make_tensor(op, plan.pair, plan.sizes, *read, dtype)
                assert (tuple(tensor.shape), tensor.dtype) == (op.shape, dtype)
                assert tensor.is_contiguous()
                assert tensor.untyped_storage().nbytes() == tensor.nbytes  # owns its memory, and no more
            assert sum(file.bytes_read for file in files.values()) == plan.bytes_to_read


@pytest.mark.parametrize("variant", ["llama", "gemma3_text", "gpt2"])
def test_same_inputs_same_bytes(chain_of: Callable[..., Path], tmp_path: Path, variant: str) -> None:
    target = middle_size(chain_of(variant), 1)
    for i, threads in enumerate((1, 2, 1)):
        torch.set_num_threads(threads)
        try:
            from_chain(chain_of(variant), target).save_pretrained(tmp_path / str(i))
        finally:
            torch.set_num_threads(1)
    names = sorted(p.name for p in (tmp_path / "0").iterdir())
    for i in (1, 2):
        assert sorted(p.name for p in (tmp_path / str(i)).iterdir()) == names
        for name in names:
            assert (tmp_path / str(i) / name).read_bytes() == (tmp_path / "0" / name).read_bytes()


def test_dtype_can_be_asked_for(chain_of: Callable[..., Path]) -> None:
    folder = chain_of("llama")
    target = middle_size(folder)
    exact = parameters(from_chain(folder, target))
    for dtype in ("bfloat16", torch.float16, "float64"):
        model = from_chain(folder, target, dtype=dtype)
        wanted = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
        assert model.dtype == model.config.dtype == wanted
        for name, value in parameters(model).items():
            assert torch.equal(value, exact[name].to(wanted))  # float32, cast once
    for wrong in ("int8", "color", torch.int8, 5):
        with pytest.raises(SizeError, match="allowed: 'auto', float64, float32, float16, bfloat16"):
            from_chain(folder, target, dtype=wrong)  # type: ignore[arg-type]


# -- what comes with a model ------------------------------------------------------------------------------------------


def test_origin_is_told(chain_of: Callable[..., Path]) -> None:
    folder = chain_of("llama")
    model = from_chain(folder, middle_size(folder), alpha=0.25)
    assert model.config.cbd_hub == {
        "chain": "llama-chain",
        "revision": None,
        "anchors": ["a1", "a0"],
        "alpha": 0.25,
        "method": "interpolate",
        "version": "0.1.0",
    }
    assert str(folder) not in json.dumps(model.config.to_dict())
    assert from_chain(folder, Chain.from_pretrained(folder).anchors[0].num_parameters).config.cbd_hub["anchors"] == [
        "a0"
    ]


@pytest.mark.parametrize("variant", ["gpt_neox", "gpt2", "opt", "llama-tied"])
def test_keys_are_those_of_published_checkpoints(chain_of: Callable[..., Path], tmp_path: Path, variant: str) -> None:
    from_chain(chain_of(variant), middle_size(chain_of(variant), 1)).save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "model.safetensors"))
    assert keys == set(load_file(weights(chain_of(variant), "a1")))
    assert ("embed_out.weight" in keys) == (variant == "gpt_neox")


@pytest.mark.parametrize("quant", ["bf16", "q8_0", "q4_k_m"])
def test_the_largest_model_that_fits(llama: Path, quant: str) -> None:
    chain = Chain.from_pretrained(llama)
    anchors = [chain.plan(shape=anchor.shape) for anchor in chain.anchors]
    most = (anchors[0].disk_size(quant) + anchors[1].disk_size(quant)) // 2
    plan = chain.plan(memory=most, quant=quant)
    assert anchors[1].disk_size(quant) < plan.disk_size(quant) <= most
    larger = chain.plan(round(plan.num_parameters * 1.06), tolerance=0.05)  # the next sizes up do not fit
    assert larger.disk_size(quant) > most
    assert chain.plan(memory="1GB", quant=quant).num_parameters == anchors[0].num_parameters
    assert from_chain(llama, memory=most, quant=quant).num_parameters() == plan.num_parameters
    assert plan.as_dict()["disk"][quant] == plan.disk_size(quant)
    assert f" as {quant}" in str(plan) and f" as {quant}" in plan._repr_html_()
    with pytest.raises(SizeError, match=r"takes .* more than 1 kB"):
        chain.plan(memory="1kB", quant=quant)
    with pytest.raises(SizeError, match="exactly one of num_parameters, shape and memory"):
        chain.plan("100k", memory="1GB")


def test_a_chain_is_called_with_a_size(llama: Path) -> None:
    chain = Chain.from_pretrained(llama)
    size = (chain.anchors[0].num_parameters + chain.anchors[1].num_parameters) // 2
    made, called = from_chain(llama, size), chain(size)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), called.parameters(), strict=True))
    assert repr(chain).startswith(f"Chain({str(llama)!r}: llama, ")


def test_dtypes_by_the_names_that_people_use(llama: Path) -> None:
    size = Chain.from_pretrained(llama).anchors[1].num_parameters
    assert from_chain(llama, size, dtype="bf16").dtype == torch.bfloat16
    with pytest.warns(FutureWarning, match="older name of dtype"):
        assert from_chain(llama, size, torch_dtype=torch.float16).dtype == torch.float16


def test_arguments_of_from_pretrained_are_taken_as_it_takes_them(llama: Path) -> None:
    chain = Chain.from_pretrained(llama)
    size = (chain.anchors[0].num_parameters + chain.anchors[1].num_parameters) // 2
    plain = from_chain(llama, size)
    loaded = from_chain(llama, size, attn_implementation="eager", device_map="cpu")
    assert loaded.config._attn_implementation == "eager" and loaded.device.type == "cpu"
    assert loaded.config.cbd_hub == plain.config.cbd_hub and loaded.config._name_or_path == ""
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), loaded.parameters(), strict=True))
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'devicemap'. Did you mean 'device_map'"):
        from_chain(llama, size, devicemap="cpu")


def test_the_chain_that_comes_with_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Path) -> None:
    """Whole, small, with control points; a folder of its name comes before it."""
    monkeypatch.chdir(tmp_path)
    chain = Chain.from_pretrained(SHIPPED)
    assert all(anchor.bent for anchor in chain.manifest.anchors[1:])
    chain.save_pretrained(tmp_path / "copy")  # every file is what the manifest says
    assert sum(path.stat().st_size for path in (tmp_path / "copy").rglob("*")) < 8e6
    model = from_chain(SHIPPED, "700k")
    assert abs(model.num_parameters() - 700_000) < 7000 and model.config.cbd_hub["method"] == "bezier"
    text = torch.tensor([chain.tokenizer("The Congress of the United States")["input_ids"]])
    with torch.no_grad():
        assert model(text, labels=text).loss < 4  # nats a token; a uniform guess has 6.9
    shutil.copytree(llama, tmp_path / SHIPPED)
    assert Chain.from_pretrained(SHIPPED).manifest.name == "llama-chain"


def test_making_a_model_imports_no_library_of_text_or_plots(llama: Path) -> None:
    code = f"""
import sys
from cbd_hub import from_chain
from_chain({str(llama)!r}, shape={Chain.from_pretrained(llama).anchors[1].shape!r})
print(*{{"datasets", "evaluate", "matplotlib", "pandas", "pyarrow", "cbd_hub.training"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_no_remote_code_survives(llama: Path) -> None:
    for anchor in ("a0", "a1"):
        path = llama / "anchors" / anchor / "config.json"
        config = json.loads(path.read_text()) | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}
        config["cbd_hub"] = {"chain": "another"}
        path.write_text(json.dumps(config))
        (llama / "anchors" / anchor / "evil.py").write_text("raise SystemExit('remote code was run')")
    refresh(llama)
    for target in (middle_size(llama), Chain.from_pretrained(llama).anchors[0].num_parameters):
        model = from_chain(llama, target)
        assert not hasattr(model.config, "auto_map")
        assert model.config.cbd_hub["chain"] == "llama-chain"
        model.save_pretrained(llama / f"made-{target}")
        assert "auto_map" not in (llama / f"made-{target}" / "config.json").read_text()


def test_generation_config_comes_along(llama: Path) -> None:
    wanted = GenerationConfig(do_sample=True, temperature=0.7, eos_token_id=[2, 5], pad_token_id=0)
    wanted.save_pretrained(llama / "anchors" / "a0")
    refresh(llama)
    model = from_chain(llama, middle_size(llama))
    assert (model.generation_config.temperature, model.generation_config.eos_token_id) == (0.7, [2, 5])
    (llama / "anchors" / "a0" / "generation_config.json").write_text("{")
    refresh(llama)
    with pytest.raises(IntegrityError, match=r"generation_config\.json cannot be read as JSON"):
        from_chain(llama, middle_size(llama))


def with_tokenizer(folder: Path) -> Path:
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    names = [p.name for p in folder.glob("*token*")]
    edit_manifest(folder, "tokenizer", value={n: file_entry(folder / n).model_dump() for n in names})
    return folder


def test_tokenizer(llama: Path) -> None:
    with pytest.raises(IntegrityError, match="'llama-chain' ships no tokenizer"):
        _ = Chain.from_pretrained(llama).tokenizer
    assert Chain.from_pretrained(with_tokenizer(llama)).tokenizer.convert_tokens_to_ids("w42") == 42
    (llama / "tokenizer.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"tokenizer\.json is not the file that the manifest names"):
        _ = Chain.from_pretrained(llama).tokenizer


def test_gradients_flow(chain_of: Callable[..., Path]) -> None:
    model = from_chain(chain_of("llama-tied"), middle_size(chain_of("llama-tied")))
    model.train()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


# -- refining: tests/test_refine.py has what it does ------------------------------------------------------------------


def test_a_refined_model_of_a_chain(llama: Path) -> None:
    target = middle_size(llama, 1)
    with pytest.raises(ManifestError, match="'llama-chain' ships no calibration tokens to refine on"):
        from_chain(llama, target, refine=True)
    assert Chain.from_pretrained(llama).calibration is None
    add_calibration(llama, TOKENS.repeat(4, 1))
    chain = Chain.from_pretrained(llama)
    assert chain.calibration is not None and torch.equal(chain.calibration, TOKENS.repeat(4, 1))
    model = from_chain(llama, target, refine=True)
    assert "refine" not in from_chain(llama, target).config.cbd_hub
    assert model.config.cbd_hub["refine"]["calibration_loss"] <= model.config.cbd_hub["refine"]["planned_loss"]
    again = chain.initialize(chain.plan(target), refine=True, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert from_chain(llama, target, refine=True, dtype="float16").dtype == torch.float16


def test_a_refined_model_is_a_plain_transformers_model(
    llama: Path, tmp_path: Path, reload: Callable[[Path], dict[str, Any]]
) -> None:
    add_calibration(llama, TOKENS.repeat(4, 1))
    model = from_chain(llama, middle_size(llama), refine=True, method="prune")
    model.save_pretrained(tmp_path / "m")
    answer = reload(tmp_path / "m")
    assert (answer["logits"], answer["problems"], answer["code"]) == (digest(logits(model)), {}, False)
    assert not list((tmp_path / "m").glob("calibration*"))


# -- whole chains -----------------------------------------------------------------------------------------------------


def test_a_chain_is_copied_whole(llama: Path, tmp_path: Path) -> None:
    chain = Chain.from_pretrained(add_calibration(with_tokenizer(llama), TOKENS))
    chain.save_pretrained(tmp_path / "copy")
    copy = Chain.from_pretrained(tmp_path / "copy")
    assert [a.name for a in copy.anchors] == ["a0", "a1", "a2"]
    assert copy.tokenizer.convert_tokens_to_ids("w42") == 42
    assert copy.calibration is not None and torch.equal(copy.calibration, TOKENS)
    assert (tmp_path / "copy" / CALIBRATION_NAME).read_bytes() == (llama / CALIBRATION_NAME).read_bytes()
    target = middle_size(llama, 1)
    assert torch.equal(logits(from_chain(tmp_path / "copy", target)), logits(from_chain(llama, target)))
    assert not list(tmp_path.glob(".copy*"))
    copy.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / MANIFEST_NAME).read_bytes() == (tmp_path / "copy" / MANIFEST_NAME).read_bytes()


def test_a_chain_is_not_copied_over_something(chain_of: Callable[..., Path], tmp_path: Path) -> None:
    chain = Chain.from_pretrained(chain_of("llama"))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine.txt").write_text("precious")
    (tmp_path / "b").write_text("a file")
    for name in ("a", "b"):
        with pytest.raises(OutputExistsError, match="is not empty; name a new folder"):
            chain.save_pretrained(tmp_path / name)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    chain.save_pretrained(tmp_path / "empty")
    assert (tmp_path / "empty" / MANIFEST_NAME).is_file()


def test_a_damaged_chain_is_not_copied(llama: Path, tmp_path: Path) -> None:
    (llama / "anchors" / "a2" / "model.safetensors").write_bytes(b"")
    with pytest.raises(IntegrityError, match="a2"):
        Chain.from_pretrained(llama).save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    assert not list(tmp_path.glob(".copy*"))


# -- what is refused --------------------------------------------------------------------------------------------------


def refused(folder: Path, kind: type[CbdError], target: int | None = None) -> str:
    """The message with which a model is refused, one line of it."""
    with pytest.raises(kind) as caught:
        from_chain(folder, target or 40_000, tolerance=0.5 if target is None else 0.01)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_no_chain(tmp_path: Path, llama: Path) -> None:
    assert f"there is no folder '{tmp_path / 'none'}'" in refused(tmp_path / "none", ChainNotFoundError)
    assert f"there is no chain.json in {tmp_path}" in refused(tmp_path, ChainNotFoundError)
    assert "is a file; name the folder that holds chain.json" in refused(llama / MANIFEST_NAME, ChainNotFoundError)


def test_exactly_one_size(chain_of: Callable[..., Path]) -> None:
    folder = chain_of("llama")
    for arguments in ({}, {"num_parameters": "50k", "shape": {"num_hidden_layers": 2}}):
        with pytest.raises(SizeError, match="exactly one of num_parameters, shape and memory"):
            from_chain(folder, **arguments)  # type: ignore[arg-type]
    with pytest.raises(SizeError, match="'138X' is not a parameter count"):
        from_chain(folder, "138X")
    with pytest.raises(SizeError, match="is outside this chain, which covers"):
        from_chain(folder, "138M")
    with pytest.raises(SizeError, match="Did you mean 'hidden_size'"):
        from_chain(folder, shape={"hidden_sizes": 48})


def test_a_later_format(llama: Path) -> None:
    edit_manifest(llama, "format", value=4)
    assert "has format 4; this cbd_hub reads formats up to 3. Upgrade it" in refused(llama, ManifestError)


@pytest.mark.parametrize(
    "name", [INDEX_MAPS_NAME, CHECKSUMS_NAME, "anchors/a0/config.json", "anchors/a0/generation_config.json"]
)
def test_a_hash_that_does_not_fit(llama: Path, name: str) -> None:
    whole = (llama / name).read_bytes()
    (llama / name).write_bytes(whole[:-2] + b"  ")
    message = refused(llama, IntegrityError, middle_size_of(llama))
    assert f"{Path(name).name} is not the file that the manifest names (its size or SHA-256 differs)" in message
    (llama / name).unlink()
    assert "which the manifest names" in refused(llama, IntegrityError, middle_size_of(llama))


def middle_size_of(folder: Path) -> int:
    counts = [a["num_parameters"] for a in json.loads((folder / MANIFEST_NAME).read_text())["anchors"]]
    return (counts[0] + counts[1]) // 2


def weights(folder: Path, anchor: str = "a0") -> Path:
    return folder / "anchors" / anchor / "model.safetensors"


@pytest.mark.parametrize("anchor", ["a0", "a1"])
def test_weights_cut_short(llama: Path, anchor: str) -> None:
    target = middle_size(llama)
    weights(llama, anchor).write_bytes(weights(llama, anchor).read_bytes()[:-10])
    assert re.search(
        rf"anchor '{anchor}': model.safetensors has \d+ bytes; .*fetch it again",
        refused(llama, IntegrityError, target),
    )
    weights(llama, anchor).unlink()
    assert f"anchor '{anchor}': there is no anchors/{anchor}/model.safetensors in" in refused(
        llama, IntegrityError, target
    )


@pytest.mark.parametrize("anchor", ["a0", "a1"])
@pytest.mark.parametrize("checksums", [True, False])
def test_a_flipped_bit_in_the_weights(tmp_path: Path, anchor: str, checksums: bool) -> None:
    folder = make_chain(tmp_path / "c", variant_model("llama"), checksums=checksums)
    target = middle_size(folder)
    data = bytearray(weights(folder, anchor).read_bytes())
    data[-1000] ^= 4
    weights(folder, anchor).write_bytes(data)
    message = refused(folder, IntegrityError, target)
    if checksums:
        assert "does not hold what the manifest says of tensor 'model." in message
    else:
        assert "model.safetensors is not the file that the manifest names" in message


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model.norm.weight": None}, "anchor 'a0': the checkpoint lacks 'model.norm.weight'"),
        ({"model.extra.weight": torch.ones(3)}, "a tensor that does not belong there, 'model.extra.weight'"),
        ({"model.layers.3.mlp.up_proj.weight": torch.ones(3, 3)}, "the config says 3 layers"),
        ({"model.norm.weight": torch.ones(47)}, "has shape [47]; the manifest says [48]"),
        ({"model.norm.weight": torch.ones(48).half()}, "tensor 'model.norm.weight' is stored as F16; allowed: F32"),
    ],
)
def test_other_tensors_than_the_manifest_says(llama: Path, change: Mapping[str, Any], says: str) -> None:
    state = {k: v for k, v in {**load_file(weights(llama)), **change}.items() if v is not None}
    save_file(state, weights(llama), metadata={"format": "pt"})
    refresh(llama)
    assert says in refused(llama, IntegrityError, middle_size(llama))


def test_pickled_weights(llama: Path) -> None:
    target = middle_size(llama)
    torch.save(load_file(weights(llama)), llama / "anchors" / "a0" / "pytorch_model.bin")
    weights(llama).unlink()
    refresh(llama)
    message = refused(llama, IntegrityError, target)
    assert "anchor 'a0' has no safetensors file; no other weights are read" in message


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pretraining_tp": 4}, "the axis map 'llama' does not handle pretraining_tp = 4"),
        ({"quantization_config": {"bits": 4}}, "has 'quantization_config', which no anchor may have"),
        ({"hidden_size": 64}, "contradicts the shape in the manifest"),
        ({"num_hidden_layers": 4}, "contradicts the shape in the manifest"),
        ({"tie_word_embeddings": True}, "the manifest's axis map is not that of 'llama' models"),
        ({"attention_bias": True}, "the manifest's axis map is not that of 'llama' models"),
        ({"model_type": "mistral"}, "is of the family 'mistral'; the manifest says 'llama'"),
        ({"model_type": "nonesuch"}, "config.json of anchor 'a0' is of the family 'nonesuch'"),
        ({"model_type": None}, "config.json of anchor 'a0' is of the family None"),
        ({"hidden_size": "wide"}, "config.json of anchor 'a0': 'hidden_size' is 'wide', which contradicts"),
        ({"rope_parameters": 5}, "config.json of anchor 'a0' cannot be used"),
        ({"dtype": "color"}, "config.json of anchor 'a0' cannot be used"),
        (
            {"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"},
            "config.json of anchor 'a0' is of the family 'evil'",
        ),
    ],
)
def test_a_config_that_does_not_fit(llama: Path, change: Mapping[str, Any], says: str) -> None:
    path = llama / "anchors" / "a0" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refresh(llama)
    with pytest.raises(CbdError) as caught:
        from_chain(llama, middle_size(llama))
    assert says in str(caught.value)


def test_the_small_anchor_s_config_is_checked_too(llama: Path) -> None:
    path = llama / "anchors" / "a1" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_bias": True}))
    refresh(llama)
    assert "axis map is not that of 'llama' models" in refused(llama, ManifestError, middle_size(llama))


def test_an_unknown_architecture(llama: Path) -> None:
    edit_manifest(llama, "architecture", value="nonesuch")
    assert "the manifest says 'nonesuch', which this transformers does not know" in refused(
        llama, ManifestError, middle_size(llama)
    )


@pytest.mark.parametrize(
    "change",
    [{"norm": "layer"}, {"scaled": ["model.embed_tokens.weight"]}, {"tied": {"lm_head.weight": "model.norm.weight"}},
     {"in_out": True}, {"frozen": []}, {"divides": {}}, {"layer_lists": ["layer_types"]}],
)  # fmt: skip
def test_an_axis_map_that_is_not_the_family_s(llama: Path, change: Mapping[str, Any]) -> None:
    data = json.loads((llama / MANIFEST_NAME).read_text())
    edit_manifest(llama, "axis_map", value=data["axis_map"] | change)
    assert "the manifest's axis map is not that of 'llama' models" in refused(llama, ManifestError, middle_size(llama))


@pytest.mark.parametrize("content", ["[]", '{"a0": []}', '{"a0": {"model.norm.weight": 5}}', "{"])
def test_malformed_checksums(llama: Path, content: str) -> None:
    (llama / CHECKSUMS_NAME).write_text(content)
    edit_manifest(llama, "checksums", value=file_entry(llama / CHECKSUMS_NAME).model_dump())
    assert re.search(
        r"checksums\.json (is malformed|is no JSON object|cannot be read as JSON)",
        refused(llama, IntegrityError, middle_size(llama)),
    )


def test_nothing_is_read_before_it_is_checked(llama: Path) -> None:
    """A chain whose large anchor lies is refused though the small one alone would do for the plan's numbers."""
    edit_manifest(llama, "anchors", 0, "num_parameters", value=1)
    assert "claims 1 parameters; its shape has" in refused(llama, ManifestError)


# -- random damage ----------------------------------------------------------------------------------------------------

POOL: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 48, 2**31, 2**63, 10**30, 0.5, 1e999, "", "a", "a0", "a1", "../x", "/", "é",
    "hidden", "hidden 2", "(2 hidden)", "vocab hidden", "float16", "F32", "0" * 64, [], [0], [0, 1, 2], {}, {"a": 1},
    "model.norm.weight", "rms+1", "layer", "heads", "0 hidden", "(hidden + ffn)", "\ud800",
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every path of a JSON value."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def damage(data: Any, draw: random.Random) -> tuple[Any, ...]:
    """Replaces, removes, renames or copies one value, in place; returns where."""
    *keys, last = draw.choice([p for p in places(data) if p])
    parent = data
    for key in keys:
        parent = parent[key]
    action = draw.randrange(6)
    if action == 0:
        del parent[last]
    elif action == 1 and isinstance(parent, dict):
        parent[draw.choice(["x", str(last) + "_", "name", "num_heads"])] = parent.pop(last)
    elif action == 2 and isinstance(parent[last], int):
        parent[last] += draw.choice([-1, 1, 8, -8])
    elif action == 3:
        parent[last] = draw.choice(list(parent.values()) if isinstance(parent, dict) else parent)
    else:
        parent[last] = draw.choice(POOL)
    return (*keys, last)


@pytest.mark.parametrize("variant", ["llama", "gemma3_text", "gpt2"])
def test_a_randomly_altered_manifest_is_refused_or_harmless(
    chain_of: Callable[..., Path], tmp_path: Path, variant: str
) -> None:
    """A CbdError, or the very model that the unaltered chain gives; anything else fails the test."""
    folder = tmp_path / "c"
    shutil.copytree(chain_of(variant), folder)
    original = (folder / MANIFEST_NAME).read_text()
    target = middle_size(folder, 1)
    expected = parameters(from_chain(folder, target))
    refused = 0
    for seed in range(100):
        data, draw = json.loads(original), random.Random(f"{variant} {seed}")
        path = damage(data["axis_map"] if seed % 3 == 0 else data, draw)
        (folder / MANIFEST_NAME).write_text(json.dumps(data))
        try:
            made = parameters(from_chain(folder, target))
        except CbdError:
            refused += 1
            continue
        if path[-1] != "aligned":  # what a manifest may say: another method
            assert all(torch.equal(made[k], expected[k]) for k in expected), path
    assert refused > 50


def test_a_randomly_altered_header_is_refused_or_harmless(llama: Path) -> None:
    """The file keeps its size, so the manifest has nothing against it."""
    target = middle_size(llama)
    expected = parameters(from_chain(llama, target))
    original = weights(llama).read_bytes()
    end = 8 + int.from_bytes(original[:8], "little")
    refused = 0
    for seed in range(100):
        draw, data = random.Random(seed), bytearray(original)
        for _ in range(draw.randint(1, 3)):
            data[draw.randrange(0, end)] = draw.choice([draw.randrange(256), *b'0123456789{}[],:" '])
        weights(llama).write_bytes(data)
        try:
            made = parameters(from_chain(llama, target))
        except CbdError:
            refused += 1
            continue
        assert all(torch.equal(made[k], expected[k]) for k in expected)
    assert refused > 80


def test_what_a_plan_notes_is_a_warning(tmp_path: Path) -> None:
    folder = make_chain(tmp_path / "c", variant_model("llama"), width=False, aligned=False)
    large, small = (anchor.num_parameters for anchor in Chain.from_pretrained(folder).anchors[:2])
    with pytest.warns(UserWarning, match="are not aligned"):
        from_chain(folder, round(0.3 * large + 0.7 * small))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_chain(folder, large)
