"""The chunked losses against the plain formulas, in value and gradient."""

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_config, tiny_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cbd_hub.errors import RecipeError
from cbd_hub.losses.distillation import distillation_loss
from cbd_hub.losses.divergences import Divergence
from cbd_hub.losses.heads import hidden_and_head
from cbd_hub.losses.names import DivergenceName

B, S, HS, HT, V = 4, 9, 16, 24, 61
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
DIVERGENCES = get_args(DivergenceName)


def relative(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach(), expected.detach()
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def make_batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, nn.Linear, Tensor]:
    """Student hidden (a leaf), teacher hidden, teacher head and labels with some positions masked."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(B, S, HS, generator=generator, dtype=dtype, requires_grad=True)
    teacher = torch.randn(B, S, HT, generator=generator, dtype=dtype)
    teacher_head = make_head(HT, dtype=dtype, seed=1)
    labels = torch.randint(V, (B, S), generator=generator)
    labels[0, 3:6] = labels[1, 0] = labels[2, -1] = labels[3, 1:] = -100
    return student, teacher, teacher_head, labels


def make_head(width: int, bias: bool = True, dtype: torch.dtype = torch.float64, seed: int = 2) -> nn.Linear:
    head = nn.Linear(width, V, bias=bias, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype) * 0.3)
    return head


def plain_loss(
    student: Tensor,
    head: Callable[[Tensor], Tensor],
    teacher: Tensor,
    teacher_head: Callable[[Tensor], Tensor],
    labels: Tensor,
    ce: float = 1.0,
    kl: float = 1.0,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    skew: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor]:
    """The textbook: all logits at once."""
    z, t, y = head(student)[:, :-1], teacher_head(teacher)[:, :-1].detach(), labels[:, 1:]
    valid = y != -100
    entropy = F.cross_entropy(z[valid], y[valid])
    p, q = torch.softmax(t / temperature, -1), torch.softmax(z / temperature, -1)
    distance = temperature**2 * plain_divergence(p, q, divergence, skew)[valid].mean()
    return ce * entropy + kl * distance, entropy, distance


def plain_divergence(p: Tensor, q: Tensor, name: str, skew: float) -> Tensor:
    """As the papers write them, of probabilities (..., V)."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    if name == "js":
        return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "skewed_kl": lambda: kl(p, skew * p + (1 - skew) * q),
        "skewed_reverse_kl": lambda: kl(q, (1 - skew) * p + skew * q),
    }[name]()


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


class RowsOfLogits(TorchDispatchMode):
    """Records the rows of every (..., V) tensor, whichever operation made it, but transposed head weights."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.ndim > 1 and tensor.shape[-1] == V:
                self.rows |= {tensor.numel() // V} - {HS, HT}
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fast", [True, False])
def test_equals_the_plain_formula(
    dtype: torch.dtype, divergence: str, temperature: float, bias: bool, fast: bool
) -> None:
    student, teacher, teacher_head, labels = make_batch(dtype)
    head = make_head(HS, bias, dtype)
    weights = {"ce": 0.7, "kl": 1.3, "temperature": temperature, "divergence": divergence, "skew": 0.2}
    used = head if fast else nn.Sequential(head)  # any module but a plain Linear takes the general path
    terms = distillation_loss(student, used, teacher, teacher_head, labels, **weights, chunk_tokens=5)
    loss, ce, kl = plain_loss(student, head, teacher, teacher_head, labels, **weights)

    for got, expected in ((terms.loss, loss), (terms.ce, ce), (terms.kl, kl)):
        assert relative(got, expected) < TOLERANCE[dtype]
    inputs = (student, *head.parameters())
    for got, expected in zip(gradients(terms.loss, *inputs), gradients(loss, *inputs), strict=True):
        assert got.dtype == expected.dtype
        assert relative(got, expected) < TOLERANCE[dtype]
    assert terms.num_tokens == int((labels[:, 1:] != -100).sum())
    assert not terms.ce.requires_grad and not terms.kl.requires_grad


@pytest.mark.parametrize("chunk_tokens", [1, 7, 512])
def test_the_chunk_size_changes_nothing(chunk_tokens: int) -> None:
    student, teacher, teacher_head, labels = make_batch()
    head = make_head(HS)
    terms = distillation_loss(student, head, teacher, teacher_head, labels, chunk_tokens=chunk_tokens)
    loss, *_ = plain_loss(student, head, teacher, teacher_head, labels)
    (got,), (expected,) = gradients(terms.loss, head.weight), gradients(loss, head.weight)
    assert relative(got, expected) < 1e-10


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradients_are_those_of_finite_differences(fast: bool, divergence: str, temperature: float) -> None:
    generator = torch.Generator().manual_seed(7)
    student, teacher = (torch.randn(2, 4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    head, teacher_head = nn.Linear(3, 7, dtype=torch.float64), nn.Linear(3, 7, dtype=torch.float64)
    labels = torch.tensor([[1, 2, -100, 4], [0, 6, 5, -100]])
    used = head if fast else nn.Sequential(head)

    def loss(*inputs: Tensor) -> Tensor:  # gradcheck alters the parameters in place
        return distillation_loss(
            inputs[0],
            used,
            teacher,
            teacher_head,
            labels,
            divergence=divergence,
            temperature=temperature,
            chunk_tokens=2,
        ).loss

    assert torch.autograd.gradcheck(loss, (student.requires_grad_(), *head.parameters()))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_sure_and_opposed_distributions_stay_finite(fast: bool, divergence: str) -> None:
    """Probabilities that float32 cannot hold: e^-500 for the other's favorite, for a third word too."""
    head, teacher_head = nn.Linear(V, V, bias=False), nn.Linear(V, V, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.eye(V))
        teacher_head.weight.copy_(torch.eye(V))
    student, teacher = torch.zeros(1, 3, V), torch.zeros(1, 3, V)
    student[..., 0] = teacher[..., 1] = 500.0
    terms = distillation_loss(
        student.requires_grad_(),
        head if fast else nn.Sequential(head),
        teacher,
        teacher_head,
        torch.zeros(1, 3, dtype=torch.long),
        divergence=divergence,
    )
    terms.loss.backward()
    expected = {"forward_kl": 500, "reverse_kl": 500, "js": math.log(2)}.get(divergence, -math.log(0.1))
    assert terms.kl.item() == pytest.approx(expected, rel=1e-5)
    assert student.grad.isfinite().all() and head.weight.grad.isfinite().all()


def test_the_skewed_divergences_without_skew_are_the_plain_ones() -> None:
    student, teacher, teacher_head, labels = make_batch()
    batch = (student, make_head(HS), teacher, teacher_head, labels)
    forward, reverse = (distillation_loss(*batch, divergence=name).kl for name in ("forward_kl", "reverse_kl"))
    assert torch.equal(distillation_loss(*batch, divergence="skewed_kl", skew=0).kl, forward)
    assert torch.equal(distillation_loss(*batch, divergence="skewed_reverse_kl", skew=0).kl, reverse)
    assert not torch.equal(forward, reverse)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradient_flows_into_a_tied_embedding(family: str, divergence: str) -> None:
    model = tiny_model(tiny_config(family, tie_word_embeddings=True), torch.float64)
    teacher = tiny_model(tiny_config(family), torch.float64, seed=1)
    ids = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))
    embedding = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is embedding
    distillation_loss(
        *hidden_and_head(model, ids), *hidden_and_head(teacher, ids), ids, divergence=divergence, chunk_tokens=4
    ).loss.backward()
    logits = (model(ids).logits, nn.Identity(), teacher(ids).logits, nn.Identity())
    loss, *_ = plain_loss(*logits, ids, divergence=divergence)
    parameters = list(model.parameters())
    assert any(parameter is embedding for parameter in parameters)
    for parameter, expected in zip(parameters, gradients(loss, *parameters), strict=True):
        assert relative(parameter.grad, expected) < 1e-10
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_frozen_head_gets_no_gradient_and_passes_it_on() -> None:
    student, teacher, teacher_head, labels = make_batch()
    head = make_head(HS).requires_grad_(False)
    distillation_loss(student, head, teacher, teacher_head, labels).loss.backward()
    loss, *_ = plain_loss(student, head, teacher, teacher_head, labels)
    assert relative(student.grad, gradients(loss, student)[0]) < 1e-10
    assert head.weight.grad is None and head.bias.grad is None


@pytest.mark.parametrize("fast", [True, False])
def test_gradient_accumulation_changes_nothing(fast: bool) -> None:
    """1, 4 and 8 micro batches of unequal numbers of valid tokens give one gradient (num_items is passed)."""
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(8, S, HS, generator=generator, dtype=torch.float64)
    teacher = torch.randn(8, S, HT, generator=generator, dtype=torch.float64)
    labels = torch.randint(V, (8, S), generator=generator)
    for row in range(8):
        labels[row, S - row :] = -100
    num_items = (labels[:, 1:] != -100).sum()
    body, teacher_head = nn.Linear(HS, HS, dtype=torch.float64), make_head(HT, seed=1)
    head = make_head(HS)
    used = head if fast else nn.Sequential(head)

    found = []
    for micro_batches in (1, 4, 8):
        parameters = [*body.parameters(), *head.parameters()]
        for parameter in parameters:
            parameter.grad = None
        for s, t, y in zip(*(x.chunk(micro_batches) for x in (student, teacher, labels)), strict=True):
            distillation_loss(
                body(s), used, t, teacher_head, y, temperature=2.0, num_items=num_items, chunk_tokens=6
            ).loss.backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
    assert relative(found[1], found[0]) < 1e-12
    assert relative(found[2], found[0]) < 1e-12


@pytest.mark.parametrize("fast", [True, False])
def test_a_fully_masked_batch_is_zero_with_finite_gradients(fast: bool) -> None:
    student, teacher, teacher_head, labels = make_batch()
    head = make_head(HS)
    terms = distillation_loss(
        student, head if fast else nn.Sequential(head), teacher, teacher_head, torch.full_like(labels, -100)
    )
    terms.loss.backward()
    assert terms.loss.item() == terms.ce.item() == terms.kl.item() == terms.num_tokens == 0
    for gradient in (student.grad, head.weight.grad, head.bias.grad):
        assert gradient.count_nonzero() == 0  # NaN counts as nonzero


def test_cross_entropy_and_kl_are_of_one_magnitude() -> None:
    """Both are summed over the vocabulary: near ln(V) for a flat student, a sure teacher and 50,000 words."""
    vocabulary = 50_000
    student, teacher = torch.zeros(1, 4, 2), torch.ones(1, 4, 2)
    head, teacher_head = nn.Linear(2, vocabulary, bias=False), nn.Linear(2, vocabulary, bias=False)
    with torch.no_grad():
        teacher_head.weight.zero_()
        teacher_head.weight[7] = 50.0
    terms = distillation_loss(student, head, teacher, teacher_head, torch.full((1, 4), 7))
    assert terms.ce.item() == pytest.approx(math.log(vocabulary), rel=1e-5)
    assert terms.kl.item() == pytest.approx(terms.ce.item(), rel=1e-4)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergence_from_oneself_is_zero_and_leaves_only_cross_entropy(fast: bool, divergence: str) -> None:
    student, _, _, labels = make_batch()
    head = make_head(HS)
    used = head if fast else nn.Sequential(head)
    terms = distillation_loss(student, used, student, head, labels, divergence=divergence)
    assert abs(terms.kl.item()) < 1e-12
    alone = distillation_loss(student, head, None, None, labels)
    assert terms.loss.item() == pytest.approx(alone.loss.item(), abs=1e-12)
    assert relative(gradients(terms.loss, student)[0], gradients(alone.loss, student)[0]) < 1e-12
    assert alone.kl.item() == 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("head_kind", ["plain", "hooked", "sequential"])
def test_full_logits_never_exist(head_kind: str, divergence: str) -> None:
    student, teacher, teacher_head, labels = make_batch()
    linear = make_head(HS)
    head: nn.Module = nn.Sequential(linear) if head_kind == "sequential" else linear
    called: list[int] = []
    teacher_head.register_forward_hook(lambda module, args, out: called.append(len(out)))
    if head_kind == "hooked":
        head.register_forward_hook(lambda module, args, out: called.append(len(out)))
    with RowsOfLogits() as seen:
        terms = distillation_loss(
            student,
            head,
            teacher,
            teacher_head,
            labels,
            divergence=divergence,
            temperature=2.0,
            chunk_tokens=5,
        )
        terms.loss.backward()
    assert terms.num_tokens not in (HS, HT)
    assert max(seen.rows) == 5
    assert max(called) == 5


def test_only_valid_positions_reach_the_heads() -> None:
    student, teacher, teacher_head, labels = make_batch()
    head = make_head(HS)
    rows = {"student": 0, "teacher": 0}

    def count(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
            rows[name] += len(out)

        return hook

    head.register_forward_hook(count("student"))
    teacher_head.register_forward_hook(count("teacher"))
    with torch.no_grad():
        terms = distillation_loss(student, head, teacher, teacher_head, labels, chunk_tokens=5)
    assert rows == {"student": terms.num_tokens, "teacher": terms.num_tokens}


def test_arithmetic_is_float32_under_bfloat16() -> None:
    """With the logits alike, a bfloat16 model's loss equals the float32 formula on those logits."""
    student, teacher, teacher_head, labels = make_batch(torch.float32)
    head = make_head(HS, dtype=torch.float32)
    s, t = student.detach().bfloat16().requires_grad_(), teacher.bfloat16()
    head, teacher_head = head.bfloat16(), teacher_head.bfloat16()
    terms = distillation_loss(s, head, t, teacher_head, labels, chunk_tokens=5)
    expected, *_ = plain_loss(head(s).float(), nn.Identity(), teacher_head(t).float(), nn.Identity(), labels)
    assert terms.loss.dtype == torch.float32
    assert relative(terms.loss, expected) < 1e-5
    terms.loss.backward()
    assert s.grad.dtype == head.weight.grad.dtype == torch.bfloat16
    expected = gradients(plain_loss(student, head.float(), teacher, teacher_head.float(), labels)[0], student)[0]
    assert relative(s.grad.float(), expected) < 0.05


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_works_under_autocast(divergence: str) -> None:
    student, teacher, teacher_head, labels = make_batch(torch.float32)
    head = make_head(HS, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        terms = distillation_loss(student, head, teacher, teacher_head, labels, divergence=divergence, chunk_tokens=5)
    terms.loss.backward()
    loss, *_ = plain_loss(student, head, teacher, teacher_head, labels, divergence=divergence)
    assert terms.loss.dtype == torch.float32
    assert relative(terms.loss, loss) < 0.02
    assert relative(student.grad, gradients(loss, student)[0]) < 0.05


@pytest.mark.parametrize("fast", [True, False])
def test_vocabularies_must_agree(fast: bool) -> None:
    student, teacher, _, labels = make_batch()
    head = make_head(HS)
    padded = nn.Linear(HT, V + 3, dtype=torch.float64)
    with pytest.raises(RecipeError, match=r"61 entries, the teacher's 64.*resize"):
        distillation_loss(student, head if fast else nn.Sequential(head), teacher, padded, labels)


def test_wrong_arguments_are_refused() -> None:
    student, teacher, teacher_head, labels = make_batch()
    head = make_head(HS)
    with pytest.raises(RecipeError, match="go together"):
        distillation_loss(student, head, teacher, None, labels)
    with pytest.raises(RecipeError, match=r"teacher_hidden \(4, 8, 24\) and labels \(4, 9\)"):
        distillation_loss(student, head, teacher[:, 1:], teacher_head, labels)
    with pytest.raises(RecipeError, match="temperature must be above 0"):
        distillation_loss(student, head, teacher, teacher_head, labels, temperature=0.0)
    batch = (student, head, teacher, teacher_head, labels)
    with pytest.raises(RecipeError, match=r"'revers_kl'. Did you mean 'reverse_kl'\? Use one of forward_kl, "):
        distillation_loss(*batch, divergence="revers_kl")  # type: ignore[arg-type]
    for skew in (-0.1, 1.0, math.nan):
        with pytest.raises(RecipeError, match=rf"skew must be at least 0 and below 1 .* got {skew}"):
            distillation_loss(*batch, divergence="skewed_kl", skew=skew)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_stay_below_their_bounds(name: str) -> None:
    """Jensen-Shannon below ln 2, the skewed ones below -ln(skew), where plain KL grows without one."""
    generator = torch.Generator().manual_seed(0)
    log_p, log_q = (torch.log_softmax(100 * torch.randn(1, V, generator=generator), -1) for _ in range(2))
    value = Divergence.named(name, skew=0.25).value(log_p, log_q).item()
    bound = {"js": math.log(2), "skewed_kl": math.log(4), "skewed_reverse_kl": math.log(4)}.get(name)
    assert (0 < value <= bound * (1 + 1e-6)) if bound else value > 10
