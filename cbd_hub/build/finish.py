"""The end of a build: everything beside the anchors, and ``chain.json`` last."""

import json
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.build.inputs import BuildInputs
from cbd_hub.chain.chain import Chain
from cbd_hub.chain.measure import measure_barriers, measure_curve, plot_chain
from cbd_hub.chain.refine import save_calibration
from cbd_hub.hub import cards
from cbd_hub.hub.read import Location
from cbd_hub.hub.untrusted import has_chat_template
from cbd_hub.interpolation.checkpoints import checksum_file
from cbd_hub.manifest import manifest as manifests
from cbd_hub.manifest.index_maps import IndexMap, save_index_maps
from cbd_hub.manifest.manifest import Anchor, Bridge, FileEntry, Manifest

__all__ = ["BRIDGE_RECORD", "STATE", "finish_chain", "measure_chain", "write_checksums", "write_description"]

STATE = ".build"
"""Folder, inside a chain's, of the records that a build goes on from."""

BRIDGE_RECORD = "bridge.json"
"""How anchor zero was made, written before its step is."""

_LIBRARIES = ("cbd_hub", "torch", "transformers", "tokenizers", "datasets", "safetensors", "numpy")


def finish_chain(
    inputs: BuildInputs,
    folder: Path,
    anchors: list[Anchor],
    maps: Mapping[str, IndexMap],
    basis: str,
    progress: bool = True,
) -> None:
    """Writes index maps, checksums, tokenizer, measured curve and cards, and ``chain.json`` last.

    Args:
        inputs: The recipe with its text and tokenizer.
        folder: Folder of the chain; the anchors are there.
        anchors: Their entries, largest first.
        maps: Correspondence of each pair, by the smaller anchor's name.
        basis: ``native`` or ``pca``.
        progress: Show progress bars.

    Cost: one pass over the weights; barriers and curve make and evaluate five models a pair, and one or two for
        each of ``evaluation.curve_points``.
    """
    recipe = inputs.recipe
    config: PreTrainedConfig = AutoConfig.from_pretrained(folder / "anchors" / anchors[0].name)
    axis_map = axis_map_for(config)
    write_checksums(folder, anchors)
    maps_path = folder / manifests.INDEX_MAPS_NAME
    if any(m.orders or m.energy for m in maps.values()):
        save_index_maps(maps, maps_path)
    calibration = inputs.shipped_calibration()
    if calibration is not None:
        save_calibration(calibration, folder / manifests.CALIBRATION_NAME)
    tokenizer = {name: manifests.file_entry(folder / name) for name in inputs.save_tokenizer(folder)}
    bridge = None
    if recipe.bridge is not None:
        bridge = Bridge.model_validate_json((folder / STATE / BRIDGE_RECORD).read_text(encoding="utf-8"))
    manifest = Manifest(
        format=Manifest.needed_format(anchors, recipe.spread.round_widths),
        name=recipe.name,
        architecture=config.model_type,
        axis_map=json.loads(json.dumps(axis_map.to_dict())),
        basis=basis,  # type: ignore[arg-type]
        layers_last=recipe.spread.layers_last,
        round_widths=recipe.spread.round_widths or None,
        source=inputs.source_name,
        source_revision=recipe.source.revision,
        bridge=bridge,
        license=recipe.license,
        anchors=anchors,
        tokenizer=tokenizer,
        index_maps=manifests.file_entry(maps_path) if maps_path.is_file() else None,
        checksums=manifests.file_entry(folder / manifests.CHECKSUMS_NAME),
        calibration=None if calibration is None else manifests.file_entry(folder / manifests.CALIBRATION_NAME),
        recipe=inputs.recorded_recipe(),
        versions={library: version(library) for library in _LIBRARIES},
    )
    if better := manifest.better_than_source:
        warnings.warn(
            f"{' and '.join(better)} read the held-out text better than the source, {anchors[0].name}: it may have "
            "been trained on text that begins or ends otherwise (data.begin_of_text, data.end_of_text), or on no such "
            "text at all; its anchors then learn from a teacher that is not itself",
            stacklevel=5,
        )
    write_description(measure_chain(manifest, inputs, folder, progress), folder)


def write_checksums(folder: Path, anchors: list[Anchor]) -> FileEntry:
    """Writes the digest of every tensor of a chain's anchors and control points; returns the file's entry.

    Cost: one pass over the files.
    """
    sums = {a.name: checksum_file(folder / "anchors" / a.name, a.files) for a in anchors}
    for a in anchors:
        if a.bent:
            sums[a.control_point_name] = checksum_file(folder, [f"{a.control_point_name}.safetensors"])
    path = folder / manifests.CHECKSUMS_NAME
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(sums, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(path)
    return manifests.file_entry(path)


def measure_chain(manifest: Manifest, inputs: BuildInputs, folder: Path, progress: bool = True) -> Manifest:
    """Measures barriers and curve, draws the plot, and returns the manifest with what was found.

    Args:
        manifest: All that is known of the chain but what is measured here.
        inputs: The recipe with its text; without text nothing is measured.
        folder: Folder of the chain.
        progress: Show progress bars.

    Cost: five models a pair are made and evaluated, and one or two for each of ``evaluation.curve_points``.
    """
    if inputs.text is None or not (per_pair := inputs.recipe.evaluation.curve_points):
        return manifest
    place, most = Location(str(folder)), inputs.recipe.evaluation.tokens
    anchors = measure_barriers(Chain(place, manifest), inputs.validation or [], most, progress)
    manifest = manifest.model_copy(update={"anchors": anchors})
    curve = measure_curve(Chain(place, manifest), inputs.text.test, per_pair, most, progress)
    manifest = manifest.model_copy(update={"curve": curve})
    plot_chain(manifest, folder / "size_loss.png")
    return manifest


def write_description(manifest: Manifest, folder: Path) -> None:
    """Writes the cards of a chain and of its anchors, and ``chain.json`` last."""
    chat = has_chat_template({name: folder / name for name in manifest.tokenizer})
    cards.chain_card(manifest, folder=folder, chat=chat).save(folder / "README.md")
    for anchor in manifest.anchors:
        cards.anchor_card(manifest, anchor).save(folder / "anchors" / anchor.name / "README.md")
    manifests.write_manifest(manifest, folder)
