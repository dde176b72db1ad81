"""The cross-vocabulary loss against a plain formula over byte strings."""

import math
from functools import cache
from typing import get_args

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from tiny_text import make_text
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cbd_hub.errors import RecipeError
from cbd_hub.losses.cross_vocabulary import CrossTerms, cross_vocabulary_loss
from cbd_hub.losses.distillation import distillation_loss
from cbd_hub.losses.divergences import Divergence
from cbd_hub.losses.heads import hidden_and_head
from cbd_hub.losses.names import DivergenceName
from cbd_hub.text.packing import train_tokenizer
from cbd_hub.text.token_groups import TokenAligner
from cbd_hub.text.vocabulary import Pairs, Vocabulary

DIVERGENCES = get_args(DivergenceName)
FLOOR = torch.finfo(torch.float32).tiny
TEXTS = [make_text(1, 2) + "In 1945 and 2024, 😀 漢字.", "Winter is cold; the river freezes over. " * 3]


@cache
def tokenizer(size: int) -> PreTrainedTokenizerFast:
    # The student's has no token with a space in front, the teacher's none for winter: groups of several on both sides.
    texts = {300: "".join(TEXTS).replace(" ", ""), 500: make_text(3, 30) + make_text(77, 9) + "1945 2024 " * 9}
    return train_tokenizer([{"text": texts[size]}], size)


def model(family: str, size: int) -> PreTrainedModel:
    config = tiny_config(family, vocab_size=size, max_position_embeddings=256)
    return tiny_model(config, torch.float64, seed=size)


class Case:
    """A student (Llama) and a teacher (GPT-2) that read one batch."""

    def __init__(self, student_size: int = 300, teacher_size: int = 500, padding: tuple[int, int] = (0, 0)) -> None:
        ours, theirs = tokenizer(student_size), tokenizer(teacher_size)
        ids = [i for text in TEXTS for i in [*ours(text)["input_ids"], ours.eos_token_id]]
        self.ids = torch.tensor(ids[: len(ids) // 2 * 2]).view(2, -1)[:, :48]
        self.labels = self.ids.clone()
        self.labels[0, 9:12] = -100
        self.vocabularies = Vocabulary.of(ours), Vocabulary.of(theirs)
        self.pairs = Pairs.between(*self.vocabularies)
        batch = TokenAligner(ours, theirs).align(self.ids, self.labels)
        self.teacher_ids, self.groups = batch["teacher_input_ids"], batch["groups"]
        with torch.no_grad():
            self.hidden, self.head = hidden_and_head(model("llama", len(ours) + padding[0]), self.ids)
            self.teacher, self.teacher_head = hidden_and_head(
                model("gpt2", len(theirs) + padding[1]), self.teacher_ids, batch["teacher_attention_mask"]
            )
        self.head.bias = nn.Parameter(torch.linspace(-1, 1, len(self.head.weight), dtype=torch.float64))
        self.inputs = self.hidden.requires_grad_(), self.head.weight.requires_grad_(), self.head.bias

    def loss(self, rows: slice = slice(None), **options: object) -> CrossTerms:
        inside = torch.isin(self.groups[:, 0], torch.arange(2)[rows])
        groups = self.groups[inside] - torch.tensor([rows.start or 0, 0, 0, 0, 0])
        return cross_vocabulary_loss(
            self.hidden[rows], self.head, self.teacher[rows], self.teacher_head, self.labels[rows], self.ids[rows],
            self.teacher_ids[rows], groups, self.pairs, **options,
        )  # fmt: skip


def outcomes(
    log_p: Tensor, ids: list[int], tokens: tuple[bytes | None, ...], keys: dict[int, object], start: int, several: bool
) -> tuple[dict[object, Tensor], list[Tensor]]:
    """Mass of every outcome, and the probabilities of the tokens without a partner."""
    p = log_p[start].exp()
    alone = [p[index] for index in range(len(p)) if index not in keys]
    masses = {key: p[index] for index, key in keys.items()}
    masses["rest"] = sum(alone, p.new_zeros(()))
    if several:
        group = math.prod(log_p[start + step, token].exp() for step, token in enumerate(ids))
        key = keys.get(ids[0], "rest")
        masses[key] = masses[key] - group
        masses["G"] = group
    return masses, alone


def plain(case: Case, divergence: str, T: float, ce: float, kl: float, uld: float) -> tuple[Tensor, Tensor, Tensor]:
    z = case.head(case.hidden)
    log_q = torch.log_softmax(z / T, -1)
    log_p = torch.log_softmax(case.teacher_head(case.teacher) / T, -1)
    (ours, theirs), measure = case.vocabularies, Divergence.named(divergence, 0.2)
    spell = {index: token for token, index in ours.ids.items()}, {index: token for token, index in theirs.ids.items()}
    common = set(spell[0].values()) & set(spell[1].values())
    keys = [{i: token for i, token in side.items() if token in common} for side in spell]
    keys[0][ours.eos] = keys[1][theirs.eos] = "eos"
    distance, gap = z.new_zeros(()), z.new_zeros(())
    for row, s, n, t, m in case.groups.tolist():
        several = n > 1 or m > 1
        ids = case.ids[row, s + 1 : s + 1 + n].tolist(), case.teacher_ids[row, t + 1 : t + 1 + m].tolist()
        q, alone = outcomes(log_q[row], ids[0], ours.tokens, keys[0], s, several)
        p, others = outcomes(log_p[row], ids[1], theirs.tokens, keys[1], t, several)
        a, b = (torch.stack([side[key] for key in p]).clamp(min=FLOOR).log() for side in (p, q))
        distance = distance + T**2 * measure.value(a[None], b[None])
        pad = max(len(alone), len(others))
        x, y = (sorted(side + [z.new_zeros(())] * (pad - len(side)), reverse=True) for side in (alone, others))
        gap = gap + sum(((i - j).abs() for i, j in zip(x, y, strict=True)), z.new_zeros(()))
    valid = case.labels[:, 1:] != -100
    entropy = nn.functional.cross_entropy(z[:, :-1][valid], case.labels[:, 1:][valid])
    items = int(valid.sum())
    return ce * entropy + (kl * distance + uld * gap) / items, distance / items, gap / items


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equals_the_plain_formula(divergence: str, temperature: float) -> None:
    case = Case()
    weights = {"ce": 0.7, "kl": 1.3, "uld": 0.9}
    terms = case.loss(**weights, divergence=divergence, skew=0.2, temperature=temperature, chunk_tokens=7)
    loss, kl, uld = plain(case, divergence, temperature, **weights)
    assert (case.groups[:, [2, 4]] > 1).any(0).all()
    assert uld > 0
    for got, expected in ((terms.loss, loss), (terms.kl, kl), (terms.uld, uld)):
        torch.testing.assert_close(got.detach(), expected.detach(), rtol=1e-5, atol=1e-9)
    for got, expected in zip(*(torch.autograd.grad(x, case.inputs) for x in (terms.loss, loss)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)


def gradients(case: Case, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, case.inputs))


@pytest.mark.parametrize("chunk_tokens", [1, 2, 5, 1000])
def test_chunks_of_any_length_make_the_same(chunk_tokens: int) -> None:
    case, one = Case(), {"uld": 0.5, "temperature": 2.0}
    assert case.groups[:, 2].max() > 2  # longer than a chunk
    got, expected = case.loss(chunk_tokens=chunk_tokens, **one), case.loss(chunk_tokens=48, **one)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradients(case, got.loss), gradients(case, expected.loss))


def test_a_head_that_is_not_plain_is_walked_alike() -> None:
    case = Case()
    expected = case.loss(uld=0.5, chunk_tokens=9)
    expected_gradients = gradients(case, expected.loss)
    linear = case.head
    case.head = lambda hidden: linear(hidden)
    got = case.loss(uld=0.5, chunk_tokens=9)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradients(case, got.loss), expected_gradients)


def test_tied_and_scaled_gradients() -> None:
    """The head's weight is an embedding too, and the loss is weighed behind the function."""
    case = Case()
    found = []
    for which in ("plain", "own"):
        weight = case.head.weight
        case.hidden = nn.functional.embedding(case.ids, weight)
        loss = case.loss(uld=0.5).loss if which == "own" else plain(case, "forward_kl", 1.0, 1.0, 1.0, 0.5)[0]
        found.append(torch.autograd.grad(3 * loss, weight)[0])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-8)


def test_a_frozen_head_and_no_gradients_at_all() -> None:
    case = Case()
    expected = case.loss()
    with torch.no_grad():
        torch.testing.assert_close(case.loss(), expected)
    case.head.requires_grad_(False)
    (got,) = torch.autograd.grad(case.loss().loss, case.hidden)
    torch.testing.assert_close(got, torch.autograd.grad(expected.loss, case.hidden)[0])


def test_under_autocast_it_is_rounded_and_no_more() -> None:
    case = Case()
    case.head.float()
    case.teacher_head.to(torch.float32)
    case.teacher, case.hidden = case.teacher.float(), case.hidden.detach().float().requires_grad_()
    case.inputs = case.hidden, case.head.weight, case.head.bias
    expected = case.loss()
    with torch.autocast("cpu", torch.bfloat16):
        got = case.loss()
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-2, atol=0)
    for a, b in zip(gradients(case, got.loss), gradients(case, expected.loss), strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.05 * b.norm()
    case.teacher_head.to(torch.float64)


def test_each_head_runs_once_a_position() -> None:
    case, rows = Case(), []
    head = case.teacher_head
    case.teacher_head = lambda hidden: (rows.append(len(hidden)), head(hidden))[1]
    case.loss(chunk_tokens=9).loss.backward()
    assert sum(rows) == case.groups[:, 4].sum() > len(case.groups)


@pytest.mark.parametrize("padding", [(13, 0), (0, 7), (13, 7)])
def test_padded_logits_belong_to_the_rest(padding: tuple[int, int]) -> None:
    case, options = Case(padding=padding), {"uld": 0.5, "temperature": 2.0}
    assert case.head.out_features - 300 == padding[0]
    terms, (loss, kl, uld) = case.loss(**options), plain(case, "forward_kl", 2.0, 1.0, 1.0, 0.5)
    torch.testing.assert_close((terms.loss, terms.kl, terms.uld), (loss, kl, uld), rtol=1e-5, atol=1e-9)
    expected = gradients(case, loss)
    torch.testing.assert_close(gradients(case, terms.loss), expected, rtol=1e-5, atol=1e-8)
    if padding[0]:
        assert expected[1][300:].any(1).all()  # and they are pushed down, or up, as a part of it


@pytest.mark.parametrize("padding", [(13, 13), (13, 7)])
def test_one_padded_vocabulary(padding: tuple[int, int]) -> None:
    """Padding of different sizes meets as the rest; the tokens meet one by one."""
    case = Case(500, 500, padding)
    terms, size = case.loss(ce=0.0), len(case.vocabularies[0])
    log_q, log_p = case.head(case.hidden).log_softmax(-1), case.teacher_head(case.teacher).log_softmax(-1)
    q, p = (torch.cat([x[..., :size], x[..., size:].logsumexp(-1, keepdim=True)], -1) for x in (log_q, log_p))
    valid = case.labels[:, 1:] != -100
    expected = ((p.exp() * (p - q)).sum(-1)[:, :-1][valid]).sum() / valid.sum()
    torch.testing.assert_close(terms.kl, expected.detach(), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(gradients(case, terms.loss), gradients(case, expected), rtol=1e-5, atol=1e-8)


def test_a_rest_that_only_the_teacher_has_adds_a_constant() -> None:
    torch.manual_seed(0)
    head, teacher_head = nn.Linear(4, 6, dtype=torch.float64), nn.Linear(4, 9, dtype=torch.float64)
    hidden = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 5, 4, dtype=torch.float64)
    ids, place = torch.randint(6, (1, 5)), torch.arange(4)
    groups = torch.stack([place * 0, place, place * 0 + 1, place, place * 0 + 1], 1)
    pairs = Pairs(torch.arange(6), torch.arange(2, 8), False)
    terms = cross_vocabulary_loss(
        hidden, head, teacher, teacher_head, ids, ids, ids + 2, groups, pairs, ce=0, num_items=1
    )
    p, log_q = teacher_head(teacher)[0, :4].softmax(-1), head(hidden)[0, :4].log_softmax(-1)
    rest = p[:, [0, 1, 8]].sum(-1)
    without = (p[:, 2:8] * (p[:, 2:8].log() - log_q)).sum()
    constant = (rest * (rest.log() - math.log(FLOOR))).sum()
    assert constant > 10
    torch.testing.assert_close(terms.loss, without + constant)
    inputs = hidden, head.weight, head.bias
    torch.testing.assert_close(*(torch.autograd.grad(x, inputs) for x in (terms.loss, without)))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_one_vocabulary_is_plain_distillation(divergence: str) -> None:
    case = Case(500, 500)
    assert case.pairs.identical
    options = {"divergence": divergence, "temperature": 2.0, "ce": 0.0}
    got = case.loss(**options)
    plain = distillation_loss(case.hidden, case.head, case.teacher, case.teacher_head, case.labels, **options)
    torch.testing.assert_close(got.kl, plain.kl, rtol=1e-5, atol=1e-8)
    (a,), (b,) = (torch.autograd.grad(x.loss, case.hidden) for x in (got, plain))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_without_a_group_it_is_cross_entropy() -> None:
    case = Case()
    case.groups = case.groups[:0]
    terms = case.loss(ce=2.0, uld=1.0)
    assert terms.kl == terms.uld == 0
    torch.testing.assert_close(terms.loss, plain(case, "forward_kl", 1.0, 2.0, 1.0, 1.0)[0])
    (gradient,) = torch.autograd.grad(terms.loss, case.hidden)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_nothing_predicted_is_zero_with_gradients() -> None:
    case = Case()
    case.groups, case.labels = case.groups[:0], torch.full_like(case.labels, -100)
    terms = case.loss()
    (gradient,) = torch.autograd.grad(terms.loss, case.hidden)
    assert terms.loss == 0 and terms.num_tokens == 0 and not gradient.any()


def test_micro_batches_sum_to_the_batch() -> None:
    case = Case()
    whole = case.loss(uld=0.5)
    parts = [case.loss(slice(row, row + 1), uld=0.5, num_items=whole.num_tokens) for row in range(2)]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    got, expected = (torch.autograd.grad(x, case.hidden)[0] for x in (sum(p.loss for p in parts), whole.loss))
    torch.testing.assert_close(got, expected)


def test_a_group_that_is_not_predicted_is_refused() -> None:
    case = Case()
    case.labels[:] = -100
    with pytest.raises(RecipeError, match="same labels"):
        case.loss()


class Largest(TorchDispatchMode):
    """Records the elements of the largest tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            self.numel = max(self.numel, tensor.numel() if isinstance(tensor, Tensor) else 0)
        return out


def test_logits_never_stand_whole() -> None:
    tokens, size = 96, 50_000
    head, hidden = nn.Linear(4, size, bias=False), torch.randn(1, tokens, 4, requires_grad=True)
    ids = torch.randint(size, (1, tokens))
    place = torch.arange(tokens - 1)
    groups = torch.stack([place * 0, place, place * 0 + 1, place, place * 0 + 1], 1)
    pairs = Pairs(torch.arange(size - 5), torch.arange(5, size), False)
    with Largest() as largest:
        cross_vocabulary_loss(
            hidden, head, hidden, head, ids, ids, ids, groups, pairs, uld=1.0, chunk_tokens=16
        ).loss.backward()
    assert 16 * (size - 5) <= largest.numel <= 16 * size < tokens * size / 3
