"""A student starts as a subset of its teacher, refitted only where that lowers its validation loss."""

import torch
from datasets import Dataset
from tiny_models import tiny_config, tiny_model

from cbd_hub.alignment.ranking import rank
from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.build.students import cut_student, refit_if_better
from cbd_hub.evaluation.held_out import evaluate_loss
from cbd_hub.interpolation.materialize import cut

TEACHER = tiny_model(tiny_config("llama"))
AXIS_MAP = axis_map_for(TEACHER.config)
LARGE = AXIS_MAP.sizes(TEACHER.config)
SMALL = {**LARGE, "ffn": LARGE["ffn"] // 2}
GENERATOR = torch.Generator().manual_seed(0)
BLOCKS = torch.randint(0, TEACHER.config.vocab_size, (16, 24), generator=GENERATOR)
VALIDATION = Dataset.from_dict(
    {"input_ids": torch.randint(0, TEACHER.config.vocab_size, (8, 24), generator=GENERATOR).tolist()}
)
INDEX_MAP = rank(TEACHER, AXIS_MAP, LARGE, SMALL, BLOCKS, False, False)


def test_the_loss_of_the_plain_subset_is_returned_and_never_exceeded() -> None:
    plain = cut(TEACHER, AXIS_MAP, LARGE, SMALL, INDEX_MAP)
    student, cut_loss = cut_student(TEACHER, AXIS_MAP, SMALL, INDEX_MAP, BLOCKS, VALIDATION, progress=False)
    assert cut_loss == evaluate_loss(plain, VALIDATION).loss
    assert evaluate_loss(student, VALIDATION).loss <= cut_loss


def test_without_text_the_student_is_the_subset() -> None:
    plain = cut(TEACHER, AXIS_MAP, LARGE, SMALL, INDEX_MAP).state_dict()
    student, cut_loss = cut_student(TEACHER, AXIS_MAP, SMALL, INDEX_MAP, None, None)
    assert cut_loss is None
    assert all(torch.equal(value, plain[name]) for name, value in student.state_dict().items())


def test_a_refit_that_raises_the_loss_is_taken_back() -> None:
    """On the student's own greedy text a fit to a teacher of noise cannot help; its weights come back then."""
    student = cut(TEACHER, AXIS_MAP, LARGE, SMALL, INDEX_MAP)
    with torch.no_grad():
        greedy = student(BLOCKS).logits.argmax(-1)
    own = Dataset.from_dict({"input_ids": torch.cat([BLOCKS[:, :1], greedy[:, :-1]], 1).tolist()})
    weights = {name: p.detach().clone() for name, p in student.named_parameters()}
    before = evaluate_loss(student, own).loss
    taken_back = 0
    for seed in range(1, 5):
        student.load_state_dict(weights, strict=False)
        noise = tiny_model(tiny_config("llama"), seed=seed)
        assert refit_if_better(student, noise, AXIS_MAP, INDEX_MAP, BLOCKS, own, progress=False) == before
        same = all(torch.equal(p, weights[name]) for name, p in student.named_parameters())
        assert same or evaluate_loss(student, own).loss < before
        taken_back += same
    assert taken_back
