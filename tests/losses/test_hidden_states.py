"""The distance between hidden states against the plain formula."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cbd_hub.errors import RecipeError
from cbd_hub.losses.hidden_states import hidden_state_loss

B, S, HS, HT = 4, 9, 16, 24


def relative(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach(), expected.detach()
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def make_states() -> tuple[list[Tensor], list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(5)
    student = [torch.randn(B, S, HS, generator=generator, requires_grad=True) for _ in range(3)]
    teacher = [torch.randn(B, S, HT, generator=generator) for _ in range(3)]
    return student, teacher, torch.randperm(HT, generator=generator)[:HS]


def test_hidden_state_loss_equals_the_plain_formula() -> None:
    student, teacher, kept = make_states()
    mask = torch.ones(B, S, dtype=torch.long)
    mask[1, 4:] = 0
    pairs = [(s[mask == 1], t[..., kept][mask == 1]) for s, t in zip(student, teacher, strict=True)]
    mse = torch.stack([((s - t) ** 2).sum(-1) / (t**2).sum(-1) for s, t in pairs]).mean()
    cosine = torch.stack([1 - F.cosine_similarity(s, t, dim=-1) for s, t in pairs]).mean()
    for kind, expected in (("mse", mse), ("cosine", cosine)):
        got = hidden_state_loss(student, teacher, kept, mask, kind=kind)
        assert relative(got, expected) < 1e-5
        expected_gradients = torch.autograd.grad(expected, student, retain_graph=True)
        for a, b in zip(torch.autograd.grad(got, student, retain_graph=True), expected_gradients, strict=True):
            assert relative(a, b) < 1e-4
    double = hidden_state_loss(student, teacher, kept, mask, num_items=2 * int(mask.sum()))
    assert relative(2 * double, mse) < 1e-5


def test_hidden_state_loss_of_the_kept_teacher_is_zero() -> None:
    _, teacher, kept = make_states()
    exact = [t[..., kept] for t in teacher]
    assert hidden_state_loss(exact, teacher, kept).item() == 0
    assert hidden_state_loss([3 * t for t in exact], teacher, kept, kind="cosine").item() == pytest.approx(0, abs=1e-6)


def test_one_huge_position_does_not_rule_the_hidden_state_loss() -> None:
    student, teacher, kept = make_states()
    scaled_student, scaled_teacher = [s.detach().clone() for s in student], [t.clone() for t in teacher]
    for states in (scaled_student, scaled_teacher):
        for state in states:
            state[:, 0] *= 1000
    plain = hidden_state_loss(student, teacher, kept)
    assert hidden_state_loss(scaled_student, scaled_teacher, kept).item() == pytest.approx(plain.item(), rel=1e-4)


def test_hidden_state_loss_of_a_masked_batch_is_zero() -> None:
    student, teacher, kept = make_states()
    loss = hidden_state_loss(student, teacher, kept, torch.zeros(B, S))
    loss.backward()
    assert loss.item() == 0
    assert all(state.grad.count_nonzero() == 0 for state in student)


def test_hidden_state_loss_refuses_what_does_not_match() -> None:
    student, teacher, kept = make_states()
    with pytest.raises(RecipeError, match="3 student and 2 teacher"):
        hidden_state_loss(student, teacher[:2], kept)
    with pytest.raises(RecipeError, match="0 student and 0 teacher"):
        hidden_state_loss([], [])
    with pytest.raises(RecipeError, match=r"\(4, 9, 16\) meets a teacher state \(4, 9, 24\)"):
        hidden_state_loss(student, teacher)
    with pytest.raises(RecipeError, match="'l1'; use 'mse' or 'cosine'"):
        hidden_state_loss(student, teacher, kept, kind="l1")  # type: ignore[arg-type]
