"""The paper's losses on logits that anybody can check by hand."""

import math

import pytest
import torch
from cases import mutant
from hypothesis import given
from hypothesis import strategies as st

from losses import dynamic_labels, guide_loss, kl_divergence, target_loss

logits_lists = st.lists(
    st.lists(st.integers(-3, 3).map(float), min_size=4, max_size=4), min_size=1, max_size=6
)  # whole numbers, so that ties happen


def check_labels(labels_of, rows):
    logits = torch.tensor(rows, requires_grad=True)
    labels = labels_of(logits)
    assert labels.tolist() == [row.index(max(row)) for row in rows]  # the first maximum at a tie
    assert labels.dtype == torch.int64 and not labels.requires_grad


@given(logits_lists)
def test_dynamic_labels_are_the_argmax_ties_included_and_carry_no_gradient(rows):
    check_labels(dynamic_labels, rows)


@pytest.mark.parametrize(
    "new", ["guide_logits.argmin(dim=1)", "guide_logits.flip(1).argmax(dim=1).neg() + 3", "guide_logits.softmax(1)"]
)
def test_other_labels_are_rejected(new):
    broken = mutant(dynamic_labels, ("guide_logits.argmax(dim=1)", new))
    with pytest.raises(AssertionError):
        check_labels(broken, [[0.0, 1.0, 1.0, 0.0]])


def softmax(row):
    weights = [math.exp(z) for z in row]
    return [w / sum(weights) for w in weights]


@given(logits_lists, st.integers(0, 3))
def test_equations_4_and_5_are_the_mean_cross_entropy(rows, label):
    expected = sum(-math.log(softmax(row)[label]) for row in rows) / len(rows)
    labels = torch.full((len(rows),), label)
    for loss in (guide_loss, target_loss):
        assert loss(torch.tensor(rows), labels).item() == pytest.approx(expected, rel=1e-5)


def check_kl(kl, p_rows, q_rows):
    expected = [
        sum(a * math.log(a / b) for a, b in zip(softmax(p), softmax(q), strict=True))
        for p, q in zip(p_rows, q_rows, strict=True)
    ]
    actual = kl(torch.tensor(p_rows, dtype=torch.float64), torch.tensor(q_rows, dtype=torch.float64))
    assert actual.tolist() == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.tuples(*[st.lists(st.floats(-5, 5), min_size=4, max_size=4)] * 2), min_size=1, max_size=4))
def test_kl_divergence_is_the_sum_over_classes_for_each_image(pairs):
    check_kl(kl_divergence, [p for p, _ in pairs], [q for _, q in pairs])


def test_a_swapped_kl_is_rejected():
    broken = mutant(kl_divergence, ("def kl_divergence(p_logits, q_logits)", "def kl_divergence(q_logits, p_logits)"))
    with pytest.raises(AssertionError):
        check_kl(broken, [[2.0, 0.0, 0.0, 0.0]], [[0.0, 1.0, 0.0, 0.0]])


def test_gradient_of_the_kl_flows_into_both_arguments():
    p = torch.randn(2, 4, requires_grad=True)
    q = torch.randn(2, 4, requires_grad=True)
    kl_divergence(p, q).sum().backward()
    assert p.grad.abs().sum() > 0 and q.grad.abs().sum() > 0
