"""Sparse combinations of known vectors: orthogonal matching pursuit, and features of tokens to run it on.

A token that a model has never seen has no embedding, but it has neighbors: in a space that holds new and known tokens
alike, its vector is nearly a weighted sum of a few vectors of known ones. *Orthogonal matching pursuit* finds that
sum greedily: take the known vector (*atom*) that the rest of the target points along most, fit the target by all atoms
taken so far, go on with what the fit leaves over. The weights, applied to the embeddings that the known tokens have in
the model, give the new one (see :mod:`cbd_hub.initialization.transplant`).

The space can be made from text alone: tokens that stand among the same neighbors mean much the same. Row t of a
matrix counts how often each frequent token stands 1 to `window` places left, or right, of token t. Its positive
pointwise mutual information

    max(0, log(n(t, c) N / (n(t) n(c))))

says which neighbors are more frequent than chance, and a truncated singular value decomposition keeps the leading
directions of it.
"""

from collections.abc import Iterable

import torch
from huggingface_hub.utils.tqdm import tqdm
from torch import Tensor

from cbd_hub.errors import RecipeError

__all__ = ["context_features", "matching_pursuit"]

_TOKENS_PER_COUNT = 1 << 20  # tokens whose pairs are in memory at once
_DEPENDENT = 1e-5  # an atom whose part outside the others is shorter than this adds nothing but rounding errors


def matching_pursuit(
    targets: Tensor, atoms: Tensor, k: int, *, chunk: int = 512, progress: bool = False
) -> tuple[Tensor, Tensor]:
    """Writes every target as a combination of at most k atoms: ``targets ~ sum_j coefficients_j atoms[indices_j]``.

    All targets of a chunk are solved at once. The atoms of each are orthogonalized as they are taken (Gram-Schmidt,
    twice, for the rounding), so a step costs no least squares: a triangular system at the end gives the coefficients.
    Where fewer than k atoms reproduce a target, or those left depend on those taken, the other coefficients are 0.

    Args:
        targets: (T, D) float32 or float64.
        atoms: (A, D). Their lengths play no role in which are taken; zero atoms are never taken.
        k: Atoms a target; clipped to D and A.
        chunk: Targets solved together: memory is about ``chunk * (2 A + 2 k D)`` numbers.
        progress: Show a progress bar.

    Returns:
        indices (T, k) int64 into the atoms, and coefficients (T, k) in the targets' dtype.

    Cost: ``2 T A D k`` operations for the choice and ``4 T D k^2`` for the fit.

    Raises:
        RecipeError: There is no atom, k is below 1, or the widths disagree.

    T targets, A atoms, D dimensions.
    """
    if targets.ndim != 2 or atoms.ndim != 2 or targets.shape[1] != atoms.shape[1] or not len(atoms) or k < 1:
        raise RecipeError(
            f"Matching pursuit got targets {tuple(targets.shape)}, atoms {tuple(atoms.shape)} and k = {k}; it needs "
            "(T, D), (A, D) with A of at least 1, and k of at least 1."
        )
    k = min(k, *atoms.shape)
    lengths = atoms.norm(dim=1)
    unit = atoms / lengths.clamp(min=torch.finfo(atoms.dtype).tiny)[:, None]
    parts = targets.split(chunk)
    bar = tqdm(parts, desc="Matching pursuit", disable=not progress, name="cbd_hub")
    solved = [_pursue(part, unit, k) for part in bar if len(part)]
    if not solved:
        return targets.new_zeros(0, k, dtype=torch.int64), targets.new_zeros(0, k)
    indices, coefficients = (torch.cat(column) for column in zip(*solved, strict=True))
    return indices, coefficients / lengths[indices].clamp(min=torch.finfo(atoms.dtype).tiny)


def _pursue(targets: Tensor, unit: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Orthogonal matching pursuit of a chunk of targets (n, D) in atoms (A, D) of length 1 (or 0)."""
    rows = torch.arange(len(targets))
    residual = targets.clone()
    indices = torch.zeros(len(targets), k, dtype=torch.int64)
    basis = targets.new_zeros(len(targets), k, targets.shape[1])
    upper = torch.eye(k, dtype=targets.dtype).repeat(len(targets), 1, 1)  # atoms taken = basis^T upper, a column each
    taken = torch.zeros(len(targets), len(unit), dtype=torch.bool)
    for step in range(k):
        chosen = (residual @ unit.T).abs_().masked_fill_(taken, -1.0).argmax(1)
        indices[:, step], taken[rows, chosen] = chosen, True
        atom, before = unit[chosen], basis[:, :step]
        for _ in range(2):
            inside = torch.einsum("njd,nd->nj", before, atom)
            atom = atom - torch.einsum("njd,nj->nd", before, inside)
            upper[:, :step, step] += inside
        length = atom.norm(dim=1)
        fresh = length > _DEPENDENT
        upper[fresh, step, step] = length[fresh]
        upper[~fresh, :step, step] = 0.0
        basis[fresh, step] = atom[fresh] / length[fresh, None]
        residual = residual - basis[:, step] * (basis[:, step] * residual).sum(1, keepdim=True)
    inside = torch.einsum("njd,nd->nj", basis, targets)
    return indices, torch.linalg.solve_triangular(upper, inside[..., None], upper=True)[..., 0]


def context_features(
    documents: Iterable[Tensor],
    vocab_size: int,
    *,
    dimensions: int = 128,
    window: int = 3,
    contexts: int = 2000,
    smoothing: float = 0.75,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Features of tokens from the tokens that stand beside them: PPMI, reduced by a truncated SVD.

    Args:
        documents: Token ids of each document, (n,) int64. No pair crosses a border.
        vocab_size: V, rows of the result.
        dimensions: D; clipped to what the contexts allow.
        window: Places to the left and to the right that count, each side apart.
        contexts: The most frequent tokens, whose columns are kept.
        smoothing: Power of the contexts' counts; below 1 it takes weight from rare contexts (Levy et al., 2015).
        seed: Decides the random start of the SVD; the same seed gives the same features.

    Returns:
        features (V, D) float32, rows of length 1 (0 where a token has no informative neighbor), and how often each
        token occurs, (V,) int64.

    Cost: about 16 bytes a distinct (token, context) pair, and one sparse SVD. Counting takes about a second a million
    tokens and place of the window.

    Raises:
        RecipeError: The documents hold fewer than two tokens.

    V vocabulary, D dimensions.
    """
    chunks = list(_joined(documents, window))
    counts = torch.stack(
        [torch.bincount(ids[ids >= 0], minlength=vocab_size) for ids in chunks or [torch.tensor([-1])]]
    )
    count = counts.sum(0)
    contexts = min(contexts, int((count > 0).sum()))
    if count.sum() < 2:
        raise RecipeError("The texts hold fewer than two tokens; pass text in the language of the model.")
    column = torch.full((vocab_size + 1,), -1)  # the last entry is that of a border, -1
    column[count.argsort(descending=True, stable=True)[:contexts]] = torch.arange(contexts)

    width = 2 * contexts
    keys, numbers = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    for ids in chunks:
        pairs = []
        for place in range(1, window + 1):
            left, right = ids[:-place], ids[place:]
            pairs.append((right * width + column[left])[(right >= 0) & (column[left] >= 0)])
            pairs.append((left * width + contexts + column[right])[(left >= 0) & (column[right] >= 0)])
        new, times = torch.cat(pairs).unique(return_counts=True)
        keys, place_of = torch.cat([keys, new]).unique(return_inverse=True)
        numbers = torch.zeros(len(keys), dtype=torch.int64).index_add_(0, place_of, torch.cat([numbers, times]))

    row, side = keys // width, keys % width
    n = numbers.double()
    of_row = torch.zeros(vocab_size, dtype=torch.float64).index_add_(0, row, n)
    of_side = torch.zeros(width, dtype=torch.float64).index_add_(0, side, n).pow(smoothing)
    information = (n * of_side.sum() / (of_row[row] * of_side[side])).log()
    kept = information > 0
    places = torch.stack([row[kept], side[kept]])
    matrix = torch.sparse_coo_tensor(
        places, information[kept].float(), (vocab_size, width), check_invariants=True
    ).coalesce()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        left, values, _ = torch.svd_lowrank(matrix, min(dimensions, width, vocab_size), niter=2)
    features = left * values.sqrt()
    return torch.nn.functional.normalize(features, dim=1), count


def _joined(documents: Iterable[Tensor], window: int) -> Iterable[Tensor]:
    """Documents one after another with -1 between them, about a million tokens at a time."""
    border = torch.full((window,), -1)
    waiting: list[Tensor] = []
    for document in documents:
        waiting += [document, border]
        if sum(map(len, waiting)) >= _TOKENS_PER_COUNT:
            yield torch.cat(waiting)
            waiting = []
    if waiting:
        yield torch.cat(waiting)
