"""``from_chain``: carry out a plan, one tensor at a time, and hand back an ordinary transformers model.

Nothing but the manifest is read until a plan stands; then the two anchors' headers are checked against it, and only
then are weights read: each tensor once, blended in float32, cast once, and its sources dropped before the next. Peak
memory stays near the target's size plus the largest pair of source tensors.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub.utils.tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from cbd_hub.axes.architectures import AXIS_MAPS, axis_map_for
from cbd_hub.axes.sizing import Sizes
from cbd_hub.chain.refine import choose, load_calibration
from cbd_hub.errors import ChainNotFoundError, IntegrityError, ManifestError
from cbd_hub.hub.publish import Published, publish
from cbd_hub.hub.read import Location
from cbd_hub.hub.sources import (
    anchor_place,
    checked_file,
    copy_chain,
    open_checkpoint,
    read_checksums,
    reader,
    weight_files,
)
from cbd_hub.hub.untrusted import guarded, read_config, read_generation_config, read_tokenizer
from cbd_hub.interpolation.checkpoints import Checkpoint, Digest
from cbd_hub.interpolation.materialize import Read, build_model, make_tensor, parse_dtype, target_config
from cbd_hub.interpolation.plan import Plan, make_plan, needed_by
from cbd_hub.interpolation.ranges import Run
from cbd_hub.manifest import manifest as manifests
from cbd_hub.manifest.index_maps import IndexMap, load_index_maps
from cbd_hub.manifest.manifest import Anchor, Manifest

__all__ = ["Chain", "ChainAnchor", "from_chain"]


@dataclass(frozen=True)
class ChainAnchor:
    """One anchor of a chain, as users meet it."""

    chain: "Chain"
    entry: Anchor

    @property
    def name(self) -> str:
        """Its name in the chain."""
        return self.entry.name

    @property
    def num_parameters(self) -> int:
        """Tied weights counted once."""
        return self.entry.num_parameters

    @property
    def shape(self) -> dict[str, int]:
        """Sizes in the architecture's own config fields."""
        return dict(self.entry.shape)

    def load(self, dtype: str | torch.dtype = "auto") -> PreTrainedModel:
        """Returns the anchor as a transformers model, bit for bit.

        Raises:
            IntegrityError: Its files are not what the manifest says.
        """
        return self.chain.initialize(self.chain.plan(shape=self.entry.shape), dtype=dtype)


class Chain:
    """A published (or local) chain: its manifest, and models of any size from it.

    Reading a chain fetches the manifest and the small index files, no weights.
    """

    def __init__(self, location: Location, manifest: Manifest) -> None:
        self.location = location
        self.manifest = manifest

    @classmethod
    def from_pretrained(
        cls,
        chain: str | Path,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> "Chain":
        """Reads the manifest of a chain; no weights.

        Args:
            chain: A Hub repo id, or a folder that holds ``chain.json``.
            revision: Branch, tag or commit.
            token: Hub token; None takes it from the usual places.
            cache_dir: Another cache than ``HF_HOME``'s.
            local_files_only: Use the cache alone.
            force_download: Fetch again what is cached.

        Raises:
            ChainNotFoundError: No such folder, repository, revision or manifest, or no access to it.
            ManifestError: The manifest is malformed, of a later format, or contradicts itself.
        """
        place = str(chain)
        if Path(place).expanduser().is_file():
            raise ChainNotFoundError(f"{place} is a file; name the folder that holds {manifests.MANIFEST_NAME}")
        location = Location(place, revision, "", token, cache_dir, local_files_only, force_download)
        path = location.file(manifests.MANIFEST_NAME)
        location.verify(path)
        return cls(location.pinned(path), manifests.read_manifest(path))

    @property
    def anchors(self) -> list[ChainAnchor]:
        """The anchors, largest first."""
        return [ChainAnchor(self, entry) for entry in self.manifest.anchors]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The chain's tokenizer.

        Raises:
            IntegrityError: A tokenizer file differs from the manifest, or there is none.
        """
        if not self.manifest.tokenizer:
            raise IntegrityError(f"the chain {self.manifest.name!r} ships no tokenizer")
        paths = [checked_file(self.location, name, entry) for name, entry in self.manifest.tokenizer.items()]
        return read_tokenizer(paths, self.manifest.name if self.location.is_local else self.location.place)

    @cached_property
    def index_maps(self) -> dict[str, IndexMap]:
        """How each anchor's units correspond to its larger neighbour's, by the smaller one's name."""
        entry = self.manifest.index_maps
        path = checked_file(self.location, manifests.INDEX_MAPS_NAME, entry) if entry else None
        return load_index_maps(self.manifest, path)

    @cached_property
    def _checksums(self) -> dict[str, dict[str, Digest]]:
        return read_checksums(self.manifest, self.location)

    def _entry(self, name: str) -> Anchor:
        return next(a for a in self.manifest.anchors if a.name == name)

    def plan(
        self,
        num_parameters: int | str | None = None,
        *,
        shape: Mapping[str, int] | None = None,
        alpha: float | str = "auto",
        method: str = "auto",
        tolerance: float = 0.01,
    ) -> Plan:
        """Decides how a model is made, without reading a weight: see :func:`cbd_hub.interpolation.plan.make_plan`.

        Raises:
            SizeError: A size that cannot be had; the message names the range and the nearest size.
            IntegrityError: The chain's index files are not what the manifest says.
        """
        return make_plan(self.manifest, self.index_maps, num_parameters, shape, alpha, method, tolerance)

    def checkpoint(
        self, anchor: Anchor, needed: Mapping[str, Sequence[Run]] | None = None, progress: bool = True
    ) -> Checkpoint:
        """Opens an anchor's weights and checks their headers against the manifest; reads no weight.

        Args:
            anchor: The anchor.
            needed: Parameter → byte runs of it that will be read, so that no more is fetched; None is everything.
            progress: Show a progress bar while ranges are fetched.

        Raises:
            IntegrityError: Damaged files, or other tensors than the manifest says.
        """
        place, checksums = anchor_place(self.location, anchor), self._checksums.get(anchor.name)
        return open_checkpoint(place, anchor, self.manifest.resolved_axis_map, checksums, needed, progress)

    def config(self, anchor: Anchor) -> PreTrainedConfig:
        """Returns an anchor's transformers config, checked against the manifest.

        Raises:
            IntegrityError: The file differs from the manifest's hash.
            ManifestError: The config contradicts the manifest's shape or axis map.
        """
        place, axis_map = anchor_place(self.location, anchor), self.manifest.resolved_axis_map
        path = checked_file(place, "config.json", anchor.files["config.json"])
        what = f"config.json of anchor {anchor.name!r}"
        config = read_config(path, what, self.manifest.architecture, axis_map, anchor.shape)
        if config.model_type in AXIS_MAPS:
            known = axis_map_for(config)
            if replace(known, free=()) != replace(axis_map, free=()):
                raise ManifestError(
                    f"the manifest's axis map is not that of {config.model_type!r} models; the chain was made by "
                    "another version or altered"
                )
        return config

    @cached_property
    def calibration(self) -> torch.Tensor | None:
        """The token ids (N, S) that the chain ships for ``refine``; None where it ships none.

        Raises:
            IntegrityError: The file is not what the manifest says.
        """
        if self.manifest.calibration is None:
            return None
        path = checked_file(self.location, manifests.CALIBRATION_NAME, self.manifest.calibration)
        return load_calibration(self.manifest, path)

    def initialize(
        self, plan: Plan, refine: bool = False, *, dtype: str | torch.dtype = "auto", progress: bool = True
    ) -> PreTrainedModel:
        """Carries out a plan: reads, interpolates and returns the model.

        Args:
            plan: From :meth:`plan`.
            refine: Compare other ways to make the model as well, and keep the best: see :mod:`cbd_hub.chain.refine`,
                also for what that costs (minutes at 100M parameters on two cores).
            dtype: A torch dtype or its name; ``"auto"`` keeps the large anchor's.
            progress: Show a progress bar (HF_HUB_DISABLE_PROGRESS_BARS is obeyed).

        Cost: reads ``plan.bytes_to_read`` bytes once; peak memory near the model's own size plus the largest pair of
            source tensors.

        Raises:
            IntegrityError: The anchors' files are not what the manifest says.
            ManifestError: A config contradicts the manifest, or the chain ships no calibration tokens to refine on.
        """
        large, small = self._entry(plan.large), self._entry(plan.small)
        axis_map = self.manifest.resolved_axis_map
        out_dtype = parse_dtype(large.dtype if dtype == "auto" else dtype)
        if refine and plan.method != "anchor":
            if self.calibration is None:
                raise ManifestError(f"the chain {self.manifest.name!r} ships no calibration tokens to refine on")
            for anchor in (large, small):  # the candidates differ in what they need, and one needs everything
                for name in weight_files(anchor):
                    anchor_place(self.location, anchor).file(name)
            make = partial(self.initialize, dtype=torch.float32, progress=False)
            load_large = partial(ChainAnchor(self, large).load, torch.float32)
            return choose(plan, self.manifest, make, load_large, self.calibration, out_dtype, progress)
        config = target_config(self.config(large), axis_map, plan)
        if small is not large:
            self.config(small)  # checked, though what a model needs of it stands in the manifest
        needed = needed_by(self.manifest, large, small, plan.sizes, plan.index_map, plan.operations)

        def source(entry: Anchor) -> tuple[Sizes, Read]:
            read: Read = _unread
            if needed[entry.name]:
                checkpoint = self.checkpoint(entry, needed[entry.name], progress)
                read = reader(anchor_place(self.location, entry), checkpoint)
            return axis_map.sizes(entry.shape), read

        large_source = source(large)
        small_source = large_source if small is large else source(small)
        state = {}
        for op in tqdm(
            plan.operations, desc=f"{plan.method} {self.manifest.name}", unit="tensor", disable=not progress
        ):
            state[op.name] = make_tensor(
                op, axis_map, plan.index_map, large_source, small_source, plan.sizes, out_dtype
            )
        model = guarded(f"config.json of anchor {large.name!r}", partial(build_model, config, state, out_dtype))
        if "generation_config.json" in large.files:
            place = anchor_place(self.location, large)
            path = checked_file(place, "generation_config.json", large.files["generation_config.json"])
            model.generation_config = read_generation_config(path)
        self._sign(model, plan)
        return model

    def _sign(self, model: PreTrainedModel, plan: Plan) -> None:
        """Writes the model's origin into its config."""
        place = self.manifest.name if self.location.is_local else self.location.place
        model.config.cbd_hub = {
            "chain": place,
            "revision": self.location.revision,
            "anchors": list(dict.fromkeys([plan.small, plan.large])),
            "alpha": plan.alpha,
            "method": plan.method,
            "version": version("cbd_hub"),
        }
        named = "" if self.location.is_local else place  # cards would take a local chain's name for a repository
        model.config._name_or_path = model.name_or_path = named

    def save_pretrained(self, folder: str | Path) -> None:
        """Copies the whole chain, anchors included, into an empty folder, from which it can be used offline.

        Raises:
            OutputExistsError: The folder is not empty.
            IntegrityError: A file is not what the manifest says; nothing is left behind then.
        """
        copy_chain(self.manifest, self.location, Path(folder))

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | bool | None = None,
        collection: bool = True,
        *,
        branch: str | None = None,
        create_pr: bool = False,
        license: str | None = None,
        dry_run: bool = False,
        progress: bool = True,
    ) -> Published:
        """Publishes the chain: a repository for each anchor, one for the chain, and a Collection.

        The arguments are those of :func:`cbd_hub.hub.publish.publish`. Pushing again uploads only what changed.

        Raises:
            PublishError: No permission, a repository that holds something else, or a connection that broke. The
                manifest that was published last stays valid, and the next push finishes the work.
            IntegrityError: A file of the chain is not what the manifest says; nothing was uploaded.
        """
        return publish(
            self.manifest,
            self.location,
            repo_id,
            private=private,
            token=self.location.token if token is None else token,
            collection=collection,
            branch=branch,
            create_pr=create_pr,
            license=license,
            dry_run=dry_run,
            progress=progress,
        )


def _unread(name: str) -> torch.Tensor:
    raise IntegrityError(f"{name!r} was not planned to be read")


def from_chain(
    chain: str | Path,
    num_parameters: int | str | None = None,
    *,
    shape: Mapping[str, int] | None = None,
    alpha: float | str = "auto",
    method: str = "auto",
    refine: bool = False,
    tolerance: float = 0.01,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> PreTrainedModel:
    """Makes a model of any size from a chain: no training, no teacher.

    The two anchors next to the size are interpolated, ``alpha * small + (1 - alpha) * large`` wherever both have a
    unit, the large anchor's value elsewhere (Chain-based Distillation, arXiv 2605.07783, with masked averaging). What
    units that only the large anchor has write is weighted ``1 - alpha**2``.

    Args:
        chain: A Hub repo id, or a folder that holds ``chain.json``.
        num_parameters: Size, as an int or a string such as ``"138M"``; tied weights counted once.
        shape: Or the shape, in the architecture's own config fields. Exactly one of the two.
        alpha: Weight of the small anchor, 0..1; ``"auto"`` is 1 - r, r being the position between the anchors.
        method: ``interpolate``, ``paper`` (zero filling, exactly the paper's), ``expand`` (small anchor only),
            ``prune`` (large anchor only) or ``auto``.
        refine: Compare other ways to make it on calibration tokens that the chain ships, and keep the best
            (:mod:`cbd_hub.chain.refine`): a lower loss, for minutes instead of seconds at 100M parameters.
        tolerance: Largest relative error of the parameter count.
        dtype: ``"auto"`` keeps the anchors' dtype.
        revision: Branch, tag or commit of the chain.
        token: Hub token; None takes it from the usual places.
        cache_dir: Another cache than ``HF_HOME``'s.
        local_files_only: Use the cache alone.
        force_download: Fetch again what is cached.

    Returns:
        An ordinary transformers model in eval mode; ``config.cbd_hub`` tells its origin.

    Warns:
        UserWarning: What ``plan.notes`` says, such as anchors that are not aligned, or a size far from all that were
            measured.

    Raises:
        SizeError: A size that cannot be had; the message names the range and the nearest size.
        ChainNotFoundError: No such chain, or no access to it.
        ManifestError: The manifest is malformed or contradicts itself or its anchors.
        IntegrityError: A file is not what the manifest says.
    """
    opened = Chain.from_pretrained(chain, revision, token, cache_dir, local_files_only, force_download)
    plan = opened.plan(num_parameters, shape=shape, alpha=alpha, method=method, tolerance=tolerance)
    for note in plan.notes:
        warnings.warn(note, stacklevel=2)
    return opened.initialize(plan, refine, dtype=dtype)
