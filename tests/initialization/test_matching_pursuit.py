"""Matching pursuit against planted combinations and a plain loop, and features of tokens against plain counting."""

import math

import pytest
import torch
from torch import Tensor

from cbd_hub.errors import RecipeError
from cbd_hub.initialization.matching_pursuit import context_features, matching_pursuit


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_pursuit(target: Tensor, atoms: Tensor, k: int) -> Tensor:
    """The textbook: choose by correlation, fit by least squares, go on with the residual. Returns (A,) weights."""
    chosen: list[int] = []
    residual = target
    for _ in range(k):
        scores = (atoms @ residual).abs() / atoms.norm(dim=1)
        scores[chosen] = -1
        chosen.append(int(scores.argmax()))
        weights = torch.linalg.lstsq(atoms[chosen].T, target[:, None]).solution[:, 0]
        residual = target - weights @ atoms[chosen]
    return torch.zeros(len(atoms), dtype=target.dtype).index_add(0, torch.tensor(chosen), weights)


def dense(indices: Tensor, coefficients: Tensor, num_atoms: int) -> Tensor:
    return torch.zeros(len(indices), num_atoms, dtype=coefficients.dtype).scatter_add(1, indices, coefficients)


def test_a_planted_combination_is_recovered() -> None:
    atoms = gaussian(100, 64)
    planted = torch.zeros(20, 100, dtype=torch.float64)
    for row in range(20):
        places = torch.randperm(100, generator=torch.Generator().manual_seed(row))[:3]
        planted[row, places] = torch.tensor([1.0, -1.5, 2.0], dtype=torch.float64)
    indices, coefficients = matching_pursuit(planted @ atoms, atoms, 3, chunk=7)
    assert indices.shape == coefficients.shape == (20, 3)
    torch.testing.assert_close(dense(indices, coefficients, 100), planted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("k", [1, 4, 12])
def test_it_equals_the_plain_loop(k: int) -> None:
    atoms, targets = gaussian(30, 12, seed=1) * torch.linspace(0.1, 9, 30).double()[:, None], gaussian(9, 12, seed=2)
    got = dense(*matching_pursuit(targets, atoms, k, chunk=4), 30)
    expected = torch.stack([plain_pursuit(target, atoms, k) for target in targets])
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)


def test_dependent_atoms_and_zero_atoms_take_no_weight() -> None:
    atoms = torch.tensor([[1.0, 0, 0], [2.0, 0, 0], [0, 0, 0], [0, 1.0, 0]], dtype=torch.float64)
    got = dense(*matching_pursuit(torch.tensor([[3.0, 4.0, 5.0]], dtype=torch.float64), atoms, 3), 4)
    torch.testing.assert_close(got @ atoms, torch.tensor([[3.0, 4.0, 0.0]], dtype=torch.float64))
    assert got.isfinite().all() and got[0, 2] == 0 and (got[0, :2] == 0).sum() == 1


def test_k_is_clipped_to_the_dimensions_and_no_target_is_fine() -> None:
    indices, coefficients = matching_pursuit(gaussian(2, 5), gaussian(9, 5, seed=3), 64)
    assert indices.shape == (2, 5)
    torch.testing.assert_close(dense(indices, coefficients, 9) @ gaussian(9, 5, seed=3), gaussian(2, 5))
    assert matching_pursuit(gaussian(0, 5), gaussian(9, 5), 3)[0].shape == (0, 3)


@pytest.mark.parametrize(("atoms", "k"), [((0, 5), 1), ((3, 4), 1), ((3, 5), 0)])
def test_bad_input_is_refused(atoms: tuple[int, int], k: int) -> None:
    with pytest.raises(RecipeError, match="Matching pursuit got targets"):
        matching_pursuit(gaussian(2, 5), gaussian(*atoms), k)


def plain_information(documents: list[list[int]], vocab_size: int, window: int) -> Tensor:
    """PPMI (V, 2 V) of tokens and their neighbors, counted one by one; unsmoothed."""
    counts = torch.zeros(vocab_size, 2 * vocab_size, dtype=torch.float64)
    for document in documents:
        for place, token in enumerate(document):
            for other in range(max(0, place - window), min(len(document), place + window + 1)):
                if other != place:
                    counts[token, document[other] + (vocab_size if other > place else 0)] += 1
    expected = counts.sum(1, keepdim=True) * counts.sum(0) / counts.sum()
    return (counts / expected).log().nan_to_num(0.0, 0.0, -math.inf).clamp(min=0)


def test_features_have_the_angles_of_plainly_counted_information() -> None:
    documents = [torch.randint(7, (n,), generator=torch.Generator().manual_seed(n)) for n in (40, 3, 1, 60)]
    features, counts = context_features(documents, 8, dimensions=99, window=2, smoothing=1.0)
    assert counts.tolist() == torch.bincount(torch.cat(documents), minlength=8).tolist()
    assert (features[7] == 0).all()
    left, values, _ = torch.linalg.svd(plain_information([d.tolist() for d in documents], 8, 2), full_matrices=False)
    expected = torch.nn.functional.normalize(left * values.sqrt(), dim=1)[:7].float()
    torch.testing.assert_close(features[:7] @ features[:7].T, expected @ expected.T, atol=1e-4, rtol=0)


def test_tokens_of_the_same_contexts_are_alike_and_a_seed_decides() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randint(2, (3000,), generator=generator) + 2 * (torch.arange(3000) % 5)]).flatten()
    one, _ = context_features([ids], 10, dimensions=6)
    other, _ = context_features([ids], 10, dimensions=6)
    assert torch.equal(one, other)
    alike = one @ one.T
    assert alike[0, 1] > 0.7 and alike[4, 5] > 0.7  # 2 i and 2 i + 1 are drawn for each other
    assert alike[0, 2:].max() < 0.5


def test_documents_without_tokens_are_refused() -> None:
    with pytest.raises(RecipeError, match="fewer than two tokens"):
        context_features([torch.tensor([], dtype=torch.int64)], 8)
