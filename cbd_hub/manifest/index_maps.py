"""How the units of neighbors correspond: the orders and energies of every pair, and their file.

See :mod:`cbd_hub.manifest.manifest` for what an order is. Everything is checked when it is read: orders for being
permutations of the right units, energies for being finite, pairs for being complete.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from cbd_hub.errors import IntegrityError
from cbd_hub.manifest.manifest import Anchor, Manifest

__all__ = ["IndexMap", "load_index_maps", "read_index_map", "save_index_maps"]


@dataclass(frozen=True)
class IndexMap:
    """How the units of an anchor correspond to those of its larger neighbor."""

    layers: np.ndarray
    """(layers of the parent,) the parent's layers: first the kept ones, ascending, then the others."""
    orders: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Axis → order of the parent's units; (units,) for ``hidden``, (layers of the parent, units) for others."""
    energy: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Norm gain → share of every hidden unit in the mean square of the norm's input, times the number of units, so
    that it averages 1: (units,), or (layers of the parent, units) for a norm in every layer."""

    def layers_of(self, count: int) -> list[int]:
        """Returns the parent's layers, ascending, that a model of ``count`` layers is made from."""
        return sorted(int(layer) for layer in self.layers[:count])

    def order(self, axis: str, layer: int | None, size: int) -> np.ndarray:
        """Returns the order of the parent's units on an axis (of one layer): int64, (size,)."""
        order = self.orders.get(axis)
        if order is None:
            return np.arange(size, dtype=np.int64)
        return (order if order.ndim == 1 else order[layer]).astype(np.int64)


def save_index_maps(maps: Mapping[str, IndexMap], path: Path) -> None:
    """Writes the orders and energies of all pairs, keyed by the smaller anchor's name, as one safetensors file."""
    tensors = {}
    for name, index_map in maps.items():
        for axis, order in index_map.orders.items():
            tensors[f"{name}/order/{axis}"] = np.ascontiguousarray(order, dtype=np.int32)
        for gain, energy in index_map.energy.items():
            tensors[f"{name}/energy/{gain}"] = np.ascontiguousarray(energy, dtype=np.float32)
    save_file(dict(sorted(tensors.items())), path)


def load_index_maps(manifest: Manifest, path: Path | None) -> dict[str, IndexMap]:
    """Reads the index maps of all pairs, keyed by the smaller anchor's name.

    Args:
        manifest: The chain's manifest.
        path: ``index_maps.safetensors``, already checked against the manifest's hash; None when there is none.

    Raises:
        IntegrityError: The file is damaged, what it holds is no order of the units it is for, or the order of an
            axis on which two neighbors differ is missing (hidden units of the PCA basis are in order already).
    """
    try:
        tensors = load_file(path) if path else {}
    except (SafetensorError, OSError, TypeError, AttributeError) as error:  # the last two: a dtype numpy does not have
        raise IntegrityError(f"{path} cannot be read: {error}") from None
    axis_map, maps = manifest.resolved_axis_map, {}
    for large, small in zip(manifest.anchors, manifest.anchors[1:], strict=False):
        sizes = axis_map.sizes(large.shape)
        layers = np.array(small.layer_order if small.layer_order else range(sizes["layers"]), dtype=np.int64)
        orders, energy = {}, {}
        for key in [k for k in tensors if k.startswith(f"{small.name}/")]:
            _, kind, what = key.split("/", 2) if key.count("/") >= 2 else (key, "", "")
            value = tensors.pop(key)
            if kind == "order" and what in sizes and what not in ("layers", *axis_map.frozen):
                _check_order(key, value, what, sizes)
                orders[what] = value
            elif kind == "energy" and what in axis_map.norms:
                _check_energy(key, value, what, sizes)
                energy[what] = value
            else:
                raise IntegrityError(f"{path} holds {key!r}, which the axis map does not know")
        _check_complete(manifest, small, sizes, orders)
        maps[small.name] = IndexMap(layers, orders, energy)
    if tensors:
        raise IntegrityError(f"{path} holds {next(iter(tensors))!r}, which belongs to no anchor of the chain")
    return maps


def _check_complete(manifest: Manifest, small: Anchor, large: Mapping[str, int], orders: Mapping[str, Any]) -> None:
    """Refuses a pair that does not say which units it kept: a guess would make a model of mismatched weights."""
    own = {"layers"} | ({"hidden"} if manifest.basis == "pca" else set())  # those in the manifest; those in order
    for axis, size in manifest.sizes(small).items():
        if size != large[axis] and axis not in own and axis not in orders:
            raise IntegrityError(f"the index maps do not say which {axis} units anchor {small.name!r} keeps")


def read_index_map(layers: Sequence[int], path: Path) -> IndexMap:
    """Reads back the one index map that :func:`save_index_maps` wrote for a pair (a build's own record)."""
    orders: dict[str, np.ndarray] = {}
    energy: dict[str, np.ndarray] = {}
    for key, value in load_file(path).items():
        _, kind, what = key.split("/", 2)
        (orders if kind == "order" else energy)[what] = value
    return IndexMap(np.array(layers, dtype=np.int64), orders, energy)


def _check_order(key: str, order: np.ndarray, axis: str, sizes: Mapping[str, int]) -> None:
    shape = (sizes["hidden"],) if axis == "hidden" else (sizes["layers"], sizes[axis])
    if order.dtype != np.int32 or order.shape != shape or not (np.sort(order) == np.arange(shape[-1])).all():
        raise IntegrityError(f"{key!r} must be int32 {shape}, each row a permutation of its {shape[-1]} {axis} units")


def _check_energy(key: str, energy: np.ndarray, gain: str, sizes: Mapping[str, int]) -> None:
    shape = (sizes["layers"], sizes["hidden"]) if "*" in gain else (sizes["hidden"],)
    if energy.dtype != np.float32 or energy.shape != shape or not np.isfinite(energy).all() or (energy < 0).any():
        raise IntegrityError(f"{key!r} must be float32 {shape}, finite and not negative")
