"""``build_chain``: from a recipe to a chain on disk, one anchor after the other, resumable.

Every step is a function of the recipe, the text and the finished steps before it, and is written in full before it
counts: the anchor's folder is renamed into place, then a record of the step appears under ``.build``. A build that was
killed goes on behind its last record and ends with the same chain. ``chain.json`` is written last of all. Under
``accelerate launch`` every process does the same, trains its share, and the first one writes.
"""

import hashlib
import json
import shutil
import sys
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from cbd_hub.alignment.basis import rotate
from cbd_hub.alignment.learned import LEARNING_TOKENS
from cbd_hub.alignment.ranking import rank
from cbd_hub.alignment.ready_made import check_layers, check_neighbors, load_ready_made
from cbd_hub.axes.architectures import axis_map_for, register_axis_map
from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.axes.sizing import Sizes, count_parameters, format_count
from cbd_hub.build.begun import as_begun, list_changes, step_fingerprint
from cbd_hub.build.bridge import build_anchor_zero
from cbd_hub.build.check import anchor_sizes, check_inputs
from cbd_hub.build.finish import BRIDGE_RECORD, STATE, finish_chain
from cbd_hub.build.inputs import BuildInputs
from cbd_hub.build.recipe import AnchorSpec, Recipe, load_recipe
from cbd_hub.build.students import curve_to_train, cut_student
from cbd_hub.chain.chain import Chain
from cbd_hub.devices import on_accelerator
from cbd_hub.errors import OutputExistsError, RecipeError
from cbd_hub.evaluation.held_out import evaluate_loss
from cbd_hub.files import LOCK_NAME, clear_full_disk, locked_folder
from cbd_hub.hub.load import load_model
from cbd_hub.hub.read import Location
from cbd_hub.initialization.refit import REFIT_TOKENS
from cbd_hub.interpolation.materialize import check_fits, parse_dtype, plain_defaults
from cbd_hub.interpolation.pair import Pair
from cbd_hub.manifest import manifest as manifests
from cbd_hub.manifest.index_maps import IndexMap, read_index_map, save_index_maps
from cbd_hub.manifest.manifest import Anchor, ControlPoint, Training
from cbd_hub.progress import stage_line, transformers_bars_off
from cbd_hub.training.curve import is_better, save_control_point
from cbd_hub.training.distill import distill

__all__ = ["build_chain"]


@dataclass(frozen=True)
class _BuiltAnchor:
    """What one step made, before it is saved."""

    name: str
    model: PreTrainedModel
    training: Training | None
    index_map: IndexMap | None
    """Correspondence with the larger neighbor; None for the source."""
    basis: str
    control_point: ControlPoint | None = None
    """Of the curve to the larger neighbor, if one was trained."""
    factors: Mapping[str, Tensor] | None = None
    """What is stored of it; None where the straight line is no worse."""


class _Build:
    """One build: the recipe, the output folder, and what the steps share."""

    def __init__(self, recipe: Recipe, base: Path, output: Path, progress: bool) -> None:
        self.recipe = recipe
        self.inputs = BuildInputs(recipe, base)
        self.output = output
        self.state = output / STATE
        self.progress = progress
        self.names: set[str] = set()
        if recipe.axis_map is not None:
            register_axis_map(AxisMap.from_dict(recipe.axis_map))

    def load(self, name: str) -> PreTrainedModel:
        """Loads a finished anchor in float32."""
        return load_model(Location(str(self.output / "anchors" / name)))

    # -- steps

    def source(self) -> _BuiltAnchor:
        """Step 0: the source becomes the largest anchor, rotated first where a later anchor is narrower."""
        model, training = self._source_model()
        axis_map = axis_map_for(model.config)
        sizes = axis_map.sizes(model.config)
        basis, blocks = self._basis(axis_map, sizes), self.inputs.calibration()
        if basis == "pca" and blocks is not None:
            with on_accelerator(model, float64=True):
                rotate(model, axis_map, sizes, blocks)
        name = self.recipe.source.name or f"{self.recipe.name}-{format_count(count_parameters(axis_map, sizes))}"
        return _BuiltAnchor(name, model, training, None, basis)

    def _source_model(self) -> tuple[PreTrainedModel, Training | None]:
        """The source itself, or anchor zero, which is founded on it and has a record of its own."""
        if (bridge := self.recipe.bridge) is None:
            return self.inputs.source(self.state / "work", self.progress)
        inputs = self.inputs.bridge_inputs(bridge)

        def say(text: str) -> None:
            stage_line(text, self.progress and PartialState().is_main_process)

        model, training, record = build_anchor_zero(
            bridge, inputs, self.state / "work", log=say, progress=self.progress
        )
        if PartialState().is_main_process:
            _write_json(self.state / BRIDGE_RECORD, record.model_dump(mode="json"))
        return model, training

    def _basis(self, axis_map: AxisMap, sizes: Sizes) -> str:
        """``pca`` where the source is to be rotated: there is a narrower anchor, and text to measure on."""
        can = axis_map.rotatable and self.inputs.calibration() is not None
        return "pca" if can and self._width_changes(axis_map, sizes) else "native"

    def _width_changes(self, axis_map: AxisMap, sizes: Sizes) -> bool:
        for spec in self.recipe.anchors:
            small = self._target(spec, axis_map, sizes)
            if small["hidden"] != sizes["hidden"]:
                return True
            sizes = small
        return False

    def _target(self, spec: AnchorSpec, axis_map: AxisMap, large: Sizes) -> dict[str, int]:
        """The sizes of the next anchor."""
        return anchor_sizes(
            self.recipe, spec, axis_map, large, lambda: self.inputs.checkpoint_config(str(spec.init), spec.revision)
        )

    def anchor(self, index: int, parent: Anchor, basis: str) -> _BuiltAnchor:
        """Step k: rank the parent's units, cut the student out, refit it, distill it from the parent."""
        spec = self.recipe.anchors[index - 1]
        teacher = self.load(parent.name)
        axis_map = axis_map_for(teacher.config)
        large = axis_map.sizes(teacher.config)
        small = self._target(spec, axis_map, large)
        name = spec.name or f"{self.recipe.name}-{format_count(count_parameters(axis_map, small))}"
        if name in self.names:
            raise RecipeError(f"two anchors would have the name {name!r}; give one of them another `name`")
        cut_loss = None
        if spec.init is not None:
            check_neighbors(self.inputs.checkpoint_config(spec.init, spec.revision), teacher.config, spec.init)
            self.inputs.check_tokenizer(spec.init, spec.revision)
            student = self.inputs.checkpoint(spec.init, spec.revision)
            blocks = self.inputs.calibration() if spec.align else None
            text = self.inputs.training_blocks(LEARNING_TOKENS) if spec.align == "learned" else None
            student, index_map = load_ready_made(student, teacher, axis_map, blocks, self.progress, text)
            check_layers(student.config, teacher.config, index_map, spec.init)
            if PartialState().is_main_process:
                save_index_maps({"": index_map}, self.state / f"step-{index}.safetensors")
        else:
            blocks = self.inputs.training_blocks(REFIT_TOKENS) if self.recipe.refit else None
            with on_accelerator(teacher, float64=True):
                index_map = self._rank(index, parent, teacher, axis_map, small, basis)
                student, cut_loss = cut_student(
                    teacher, axis_map, small, index_map, blocks, self.inputs.validation, self.progress
                )
        tokens = {} if spec.tokens is None else {"tokens": spec.tokens}
        config = self.recipe.distillation.model_copy(update=tokens)
        pair = Pair(axis_map, small, large, index_map)
        length = 1 if self.recipe.data is None else self.recipe.data.sequence_length
        curve = curve_to_train(student, teacher, pair, config, self.recipe.spread.layers_last, length)
        if config.tokens == 0 and curve is None:
            training = Training(tokens=0, seed=config.seed)
        elif self.inputs.text is None:
            raise RecipeError("distillation.tokens is above 0 and the recipe has no `data`")
        else:
            training = distill(
                student,
                teacher,
                self.inputs.text.train,
                self.inputs.validation,
                config,
                index_map=index_map,
                curve=curve,
                work_dir=self.state / "work",
                progress=self.progress,
            )
        if cut_loss is not None:
            training = training.model_copy(update={"cut_loss": cut_loss})
        if curve is None:
            return _BuiltAnchor(name, student, training, index_map, basis)
        record = curve.judge(self.inputs.validation or [])
        return _BuiltAnchor(
            name, student, training, index_map, basis, record, curve.factors() if is_better(record) else None
        )

    def _rank(
        self, index: int, parent: Anchor, teacher: PreTrainedModel, axis_map: AxisMap, small: Sizes, basis: str
    ) -> IndexMap:
        """Which units are kept; written down at once, since it takes minutes; made again where it would differ."""
        record = self.state / f"ranking-{index}.json"
        maps = self.state / f"step-{index}.safetensors"
        blocks = self.inputs.calibration()
        fingerprint = _ranking_fingerprint(parent, small, basis, blocks)
        if record.is_file():
            saved = json.loads(record.read_text(encoding="utf-8"))
            if saved["fingerprint"] in (fingerprint, step_fingerprint(self.recipe, index)):  # an earlier version's
                return read_index_map(saved["layers"], maps)
        large = axis_map.sizes(teacher.config)
        index_map = rank(teacher, axis_map, large, small, blocks, basis == "pca", self.progress)
        if PartialState().is_main_process:
            record.unlink(missing_ok=True)  # it never stands beside maps that are not its own
            save_index_maps({"": index_map}, maps)
            _write_json(record, {"fingerprint": fingerprint, "layers": [int(i) for i in index_map.layers]})
        return index_map

    def step(self, index: int, parent: Anchor | None, basis: str) -> tuple[Anchor, IndexMap | None, str]:
        """Runs step ``index`` (0 is the source) unless an earlier run did; what counts is its record either way."""
        record = self.state / f"step-{index}.json"
        fingerprint = step_fingerprint(self.recipe, index)
        if not record.is_file():
            built = self.source() if parent is None else self.anchor(index, parent, basis)
            if PartialState().is_main_process:
                init = self.recipe.anchors[index - 1].init if index else None
                entry = self._save(built, parent, init).model_dump(mode="json")
                _write_json(record, {"fingerprint": fingerprint, "basis": built.basis, "anchor": entry})
            PartialState().wait_for_everyone()
        saved = json.loads(record.read_text(encoding="utf-8"))
        if saved["fingerprint"] != fingerprint:
            raise self._another(f"step {index} differs")
        anchor = Anchor.model_validate_json(json.dumps(saved["anchor"]))
        for name, file in anchor.files.items():
            manifests.check_file(self.output / "anchors" / anchor.name / name, file)
        if anchor.control_point is not None and anchor.control_point.file is not None:
            manifests.check_file(self.output / f"{anchor.control_point_name}.safetensors", anchor.control_point.file)
        if parent is None:  # the one thing in which later anchors touch an earlier step
            axis_map = axis_map_for(AutoConfig.from_pretrained(self.output / "anchors" / anchor.name))
            if (wanted := self._basis(axis_map, axis_map.sizes(anchor.shape))) != saved["basis"]:
                raise self._another(f"its basis is {saved['basis']}, these anchors need {wanted}")
        self.names.add(anchor.name)
        maps = self.state / f"step-{index}.safetensors"
        own = read_index_map(anchor.layer_order, maps) if anchor.layer_order is not None else None
        return anchor, own, saved["basis"]

    def _another(self, why: str) -> OutputExistsError:
        changed = f": {changes}" if (changes := list_changes(self.state, self.recipe)) else ""
        return OutputExistsError(
            f"{self.output} holds a build of another recipe ({why}{changed}); name another folder, put the recipe "
            "back, or start over with resume=False (--no-resume)"
        )

    def _save(self, built: _BuiltAnchor, parent: Anchor | None, init: str | None) -> Anchor:
        """Writes an anchor's folder whole, then renames it into place; returns its manifest entry."""
        name, model, index_map = built.name, built.model, built.index_map
        axis_map = axis_map_for(model.config)
        sizes = axis_map.sizes(model.config)
        evaluation = None
        if self.inputs.text is not None:
            with on_accelerator(model):
                result = evaluate_loss(
                    model, self.inputs.text.test, progress=self.progress, max_tokens=self.recipe.evaluation.tokens
                )
            evaluation = manifests.Evaluation(**asdict(result))
        dtype = parse_dtype(self.recipe.dtype)
        for tensor, parameter in model.named_parameters():
            check_fits(tensor, parameter.detach().to(dtype), parameter.detach)
        model.to(dtype=dtype)  # type: ignore[call-arg]
        model.config.dtype = dtype
        folder, partial = self.output / "anchors" / name, self.state / f"partial-{name}"
        for old in (folder, partial):
            shutil.rmtree(old, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        model.config._name_or_path = name
        model.save_pretrained(partial)
        self.inputs.save_tokenizer(partial)
        files = {p.name: manifests.file_entry(p) for p in sorted(partial.iterdir()) if _is_model_file(p.name)}
        partial.replace(folder)
        control = built.control_point
        if control is not None and built.factors is not None:
            control = save_control_point(built.factors, control, self.output, name, dtype)
        return Anchor(
            name=name,
            subfolder=f"anchors/{name}",
            shape=axis_map.config_fields(sizes),
            num_parameters=count_parameters(axis_map, sizes),
            dtype=self.recipe.dtype,
            parent=parent.name if parent else None,
            init=init,
            aligned=init is None,
            layer_order=[int(i) for i in index_map.layers] if index_map is not None else None,
            files=files,
            training=built.training,
            evaluation=evaluation,
            control_point=control,
        )


def _empty(folder: Path) -> None:
    """Removes an earlier build, but not the lock that is held on its folder."""
    for path in folder.iterdir():
        if path.is_dir() and path.name == STATE:
            for record in (p for p in path.iterdir() if p.name != Path(LOCK_NAME).name):
                shutil.rmtree(record) if record.is_dir() else record.unlink()
        else:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _all_of(problems: list[str]) -> str:
    """Problems with their numbers."""
    return f"{len(problems)} things stop this build: " + "; ".join(f"({i}) {p}" for i, p in enumerate(problems, 1))


def _ranking_fingerprint(parent: Anchor, small: Sizes, basis: str, blocks: Tensor | None) -> str:
    """A SHA-256 over all that decides a ranking: how the anchor is trained afterwards plays no part."""
    weights = {name: file.sha256 for name, file in parent.files.items() if name.endswith(".safetensors")}
    text = None if blocks is None else hashlib.sha256(blocks.numpy().tobytes()).hexdigest()
    decisive = {"weights": weights, "small": dict(small), "basis": basis, "calibration": text}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value))
    partial.replace(path)


def _is_model_file(name: str) -> bool:
    return name in ("config.json", "generation_config.json") or name.startswith("model")


@plain_defaults()
def build_chain(
    recipe: str | Path | Mapping[str, Any] | Recipe, output_dir: str | Path, resume: bool = True, progress: bool = True
) -> Chain:
    """Builds a chain: source, then every anchor distilled from its larger neighbor.

    Args:
        recipe: Path of a YAML file, a mapping, or a :class:`cbd_hub.build.recipe.Recipe`.
        output_dir: Folder of the chain. An unfinished build of the same recipe in it is resumed.
        resume: False starts over (the folder's earlier build is removed).
        progress: Show progress bars (HF_HUB_DISABLE_PROGRESS_BARS is obeyed).

    Returns:
        The finished chain.

    Cost: dominated by distillation; every finished anchor is kept, whatever happens later.

    Raises:
        RecipeError: The recipe is malformed or cannot be carried out.
        OutputExistsError: The folder holds something else, or a build of another recipe.
        SizeError: An anchor's size cannot be reached.
        PublishError: The recipe has ``hub:`` and the finished chain could not be published; it is on disk.
    """
    loaded, base = load_recipe(recipe)
    output = Path(output_dir).expanduser()
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / STATE).is_dir())):
        raise OutputExistsError(f"{output} exists and holds no build; name a new folder (nothing was changed)")
    lock = locked_folder(output, "start this one") if PartialState().is_main_process else nullcontext()
    with clear_full_disk(output), lock, transformers_bars_off(not (progress and sys.stderr.isatty())):
        chain = _build_chain(loaded, base, output, resume, progress)
    if PartialState().is_main_process and (hub := loaded.hub):  # outside of the lock, which publishing takes itself
        chain.push_to_hub(hub.repo_id, hub.private, license=hub.license, progress=progress)
    PartialState().wait_for_everyone()
    return chain


def _build_chain(loaded: Recipe, base: Path, output: Path, resume: bool, progress: bool) -> Chain:
    if not resume and PartialState().is_main_process:
        _empty(output)
    PartialState().wait_for_everyone()
    build = _Build(as_begun(loaded, output / STATE), base, output, progress)
    plan = check_inputs(build.inputs, output)
    if len(plan.problems) == len(plan.errors) == 1:
        raise plan.errors[0]
    if plan.problems:
        raise RecipeError(_all_of(plan.problems))
    for warning in plan.warnings:
        warnings.warn(warning, stacklevel=4)
    anchors: list[Anchor] = []
    maps: dict[str, IndexMap] = {}
    basis = "native"
    for index in range(len(loaded.anchors) + 1):
        anchor, index_map, basis = build.step(index, anchors[-1] if anchors else None, basis)
        anchors.append(anchor)
        if index_map is not None:
            maps[anchor.name] = index_map
    if PartialState().is_main_process:
        finish_chain(build.inputs, output, anchors, maps, basis, progress)
        shutil.rmtree(build.state / "work", ignore_errors=True)
    PartialState().wait_for_everyone()
    return Chain.from_pretrained(output)
