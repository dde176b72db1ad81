"""A chain as its user meets it: opened, planned, and made into models.

Nothing but the manifest is read until a plan stands, and neither torch nor transformers is imported: they come with
:mod:`cbd_hub.chain.assemble`, which carries a plan out.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbd_hub.axes.sizing import format_count
from cbd_hub.errors import ChainNotFoundError, IntegrityError
from cbd_hub.hub.read import Location, checked_file, copy_chain
from cbd_hub.interpolation.plan import Plan, make_plan
from cbd_hub.manifest import manifest as manifests
from cbd_hub.manifest.index_maps import IndexMap, load_index_maps
from cbd_hub.manifest.manifest import Anchor, Manifest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from cbd_hub.hub.publish import Published
    from cbd_hub.interpolation.checkpoints import Digest

__all__ = ["SHIPPED", "Chain", "ChainAnchor", "from_chain"]

SHIPPED = "quickstart"
"""Name of the small chain that comes with the package; a folder of that name comes before it."""


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

    def load(self, dtype: "str | torch.dtype" = "auto") -> "PreTrainedModel":
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
        return cls.open(Location(str(chain), revision, "", token, cache_dir, local_files_only, force_download))

    @classmethod
    def open(cls, location: Location) -> "Chain":
        """Reads the manifest of a chain; no weights.

        Args:
            location: Where the chain is.

        Raises:
            ChainNotFoundError: As :meth:`from_pretrained`.
            ManifestError: As there.
        """
        if location.place == SHIPPED and not location.is_local:
            location = Location(str(Path(__file__).parents[1] / "demo"))
        if Path(location.place).expanduser().is_file():
            raise ChainNotFoundError(
                f"{location.place} is a file; name the folder that holds {manifests.MANIFEST_NAME}"
            )
        path = location.file(manifests.MANIFEST_NAME)
        location.verify(path)
        return cls(location.pinned(path), manifests.read_manifest(path))

    @property
    def anchors(self) -> list[ChainAnchor]:
        """The anchors, largest first."""
        return [ChainAnchor(self, entry) for entry in self.manifest.anchors]

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        """The chain's tokenizer.

        Raises:
            IntegrityError: A tokenizer file differs from the manifest, or there is none.
        """
        if not self.manifest.tokenizer:
            raise IntegrityError(f"the chain {self.manifest.name!r} ships no tokenizer")
        from cbd_hub.hub.untrusted import read_tokenizer

        return read_tokenizer(
            self.tokenizer_files, self.manifest.name if self.location.is_local else self.location.place
        )

    @property
    def tokenizer_files(self) -> dict[str, Path]:
        """Name → local path of the tokenizer's files, as the source had them.

        Raises:
            IntegrityError: A file differs from the manifest.
        """
        return {name: checked_file(self.location, name, entry) for name, entry in self.manifest.tokenizer.items()}

    @cached_property
    def index_maps(self) -> dict[str, IndexMap]:
        """How each anchor's units correspond to its larger neighbor's, by the smaller one's name."""
        entry = self.manifest.index_maps
        path = checked_file(self.location, manifests.INDEX_MAPS_NAME, entry) if entry else None
        return load_index_maps(self.manifest, path)

    @cached_property
    def checksums(self) -> "dict[str, dict[str, Digest]]":
        """Anchor → tensor → digest; empty where the chain ships none.

        Raises:
            IntegrityError: The file is not what the manifest says, or malformed.
        """
        from cbd_hub.hub.sources import read_checksums

        return read_checksums(self.manifest, self.location)

    def plan(
        self,
        num_parameters: int | str | None = None,
        *,
        shape: Mapping[str, int] | None = None,
        alpha: float | str = "auto",
        method: str = "auto",
        tolerance: float = 0.01,
        memory: int | str | None = None,
        quant: str = "bf16",
    ) -> Plan:
        """Decides how a model is made, without reading a weight: see :func:`cbd_hub.interpolation.plan.make_plan`.

        Raises:
            SizeError: A size that the chain cannot reach; the message names the range and the nearest size.
            IntegrityError: The chain's index files are not what the manifest says.
        """
        return make_plan(
            self.manifest, self.index_maps, num_parameters, shape, alpha, method, tolerance, memory, quant
        )

    def __call__(
        self,
        num_parameters: int | str | None = None,
        *,
        refine: bool = False,
        dtype: "str | torch.dtype" = "auto",
        progress: bool = True,
        **options: Any,
    ) -> "PreTrainedModel":
        """Makes a model: ``Chain.from_pretrained("org/chain")("138M")``.

        Args:
            num_parameters: As of :meth:`plan`.
            refine: As of :meth:`initialize`.
            dtype: As there.
            progress: As there.
            **options: Further arguments of :meth:`plan`.

        Warns:
            UserWarning: What the plan's notes say.

        Raises:
            SizeError: As of :meth:`plan`.
            IntegrityError: As of :meth:`initialize`.
        """
        plan = self.plan(num_parameters, **options)
        for note in plan.notes:
            warnings.warn(note, stacklevel=2)
        return self.initialize(plan, refine, dtype=dtype, progress=progress)

    def __repr__(self) -> str:
        """One line: where it is, and its sizes."""
        sizes = ", ".join(format_count(anchor.num_parameters) for anchor in self.manifest.anchors)
        return f"Chain({self.location.place!r}: {self.manifest.architecture}, {sizes})"

    @cached_property
    def calibration(self) -> "torch.Tensor | None":
        """The token ids (N, S) that the chain ships for ``refine``; None where it ships none.

        Raises:
            IntegrityError: The file is not what the manifest says.
        """
        if self.manifest.calibration is None:
            return None
        from cbd_hub.chain.refine import load_calibration

        path = checked_file(self.location, manifests.CALIBRATION_NAME, self.manifest.calibration)
        return load_calibration(self.manifest, path)

    def initialize(
        self, plan: Plan, refine: bool = False, *, dtype: "str | torch.dtype" = "auto", progress: bool = True
    ) -> "PreTrainedModel":
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
        from cbd_hub.chain.assemble import assemble

        return assemble(self, plan, refine, dtype, progress)

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
    ) -> "Published":
        """Publishes the chain: a repository for each anchor, one for the chain, and a Collection.

        The arguments are those of :func:`cbd_hub.hub.publish.publish`. Pushing again uploads only what changed.

        Raises:
            PublishError: No permission, a repository that holds something else, or a connection that broke. The
                manifest that was published last stays valid, and the next push finishes the work.
            IntegrityError: A file of the chain is not what the manifest says; nothing was uploaded.
        """
        from cbd_hub.hub.publish import publish

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


def from_chain(
    chain: str | Path,
    num_parameters: int | str | None = None,
    *,
    shape: Mapping[str, int] | None = None,
    alpha: float | str = "auto",
    method: str = "auto",
    refine: bool = False,
    tolerance: float = 0.01,
    memory: int | str | None = None,
    quant: str = "bf16",
    dtype: "str | torch.dtype" = "auto",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    **loading: Any,
) -> "PreTrainedModel":
    """Makes a model of any size from a chain: no training, no teacher.

    The two anchors next to the size are interpolated, ``alpha * small + (1 - alpha) * large`` wherever both have a
    unit, the large anchor's value elsewhere (Chain-based Distillation, arXiv 2605.07783, with masked averaging). What
    units that only the large anchor has write is weighted ``1 - alpha**2``.

    Args:
        chain: A Hub repo id, or a folder that holds ``chain.json``; ``"quickstart"`` is a small one (300k to 745k)
            that comes with the package.
        num_parameters: Size, as an int or a string such as ``"138M"``; tied weights counted once.
        shape: Or the shape, in the architecture's own config fields.
        memory: Or the most bytes that its weights may take on disk, such as ``"512MB"``; exactly one of the three.
        quant: As what, for `memory`: ``bf16``, ``q8_0`` or ``q4_k_m``.
        alpha: Weight of the small anchor, 0..1; ``"auto"`` is 1 - r, r being the position between the anchors.
        method: ``bezier`` (along the pair's learned curve), ``interpolate`` (the straight line), ``paper`` (zero
            filling, exactly the paper's), ``expand`` (small anchor only),
            ``prune`` (large anchor only) or ``auto``.
        refine: Compare other ways to make it on calibration tokens that the chain ships, and keep the best
            (:mod:`cbd_hub.chain.refine`): a lower loss, for minutes instead of seconds at 100M parameters.
        tolerance: Largest relative error of the parameter count.
        dtype: A torch dtype or its name (``bf16``, ``fp16`` and ``fp32`` too); ``"auto"`` keeps the anchors'.
        revision: Branch, tag or commit of the chain.
        token: Hub token; None takes it from the usual places.
        cache_dir: Another cache than ``HF_HOME``'s.
        local_files_only: Use the cache alone.
        force_download: Fetch again what is cached.
        **loading: ``device_map``, ``attn_implementation``, ``quantization_config`` and the like, as transformers'
            ``from_pretrained`` takes them: the made model is then written to a temporary folder and loaded from it.
            ``torch_dtype`` is the older name of `dtype`.

    Returns:
        An ordinary transformers model in eval mode; ``config.cbd_hub`` records its origin.

    Warns:
        UserWarning: What ``plan.notes`` says, such as anchors that are not aligned, or a size far from all that were
            measured.

    Raises:
        SizeError: A size that the chain cannot reach; the message names the range and the nearest size.
        TypeError: An argument that neither this function nor ``from_pretrained`` knows.
        ChainNotFoundError: No such chain, or no access to it.
        ManifestError: The manifest is malformed or contradicts itself or its anchors.
        IntegrityError: A file is not what the manifest says.
    """
    if "torch_dtype" in loading:
        warnings.warn("torch_dtype is the older name of dtype", FutureWarning, stacklevel=2)
        dtype = loading.pop("torch_dtype")
    opened = Chain.open(Location(str(chain), revision, "", token, cache_dir, local_files_only, force_download))
    plan = opened.plan(
        num_parameters, shape=shape, alpha=alpha, method=method, tolerance=tolerance, memory=memory, quant=quant
    )
    for note in plan.notes:
        warnings.warn(note, stacklevel=2)
    model = opened.initialize(plan, refine, dtype=dtype)
    if not loading:
        return model
    from cbd_hub.hub.load import load_again

    return load_again(model, **loading)
