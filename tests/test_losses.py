"""The paper's losses on logits that anybody can check by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from losses import dynamic_labels, guide_loss, kl_divergence, target_loss

logits_lists = st.lists(
    st.lists(st.integers(-3, 3).map(float), min_size=4, max_size=4), min_size=1, max_size=6
)  # whole numbers, so that ties happen


def check_labels(rows):
    logits = torch.tensor(rows, requires_grad=True)
    labels = dynamic_labels(logits)
    assert labels.tolist() == [row.index(max(row)) for row in rows]  # the first maximum at a tie
    assert labels.dtype == torch.int64 and not labels.requires_grad


@given(logits_lists)
def test_dynamic_labels_are_the_argmax_ties_included_and_carry_no_gradient(rows):
    check_labels(rows)


def softmax(row):
    weights = [math.exp(z) for z in row]
    return [w / sum(weights) for w in weights]


@given(logits_lists, st.integers(0, 3))
def test_equations_4_and_5_are_the_mean_cross_entropy(rows, label):
    expected = sum(-math.log(softmax(row)[label]) for row in rows) / len(rows)
    for loss in (guide_loss, target_loss):
        assert loss(torch.tensor(rows), torch.full((len(rows),), label)).item() == pytest.approx(expected, rel=1e-5)


def check_kl(pairs):
    expected = [sum(a * math.log(a / b) for a, b in zip(softmax(p), softmax(q), strict=True)) for p, q in pairs]
    p, q = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    assert kl_divergence(p, q).tolist() == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.tuples(*[st.lists(st.floats(-5, 5), min_size=4, max_size=4)] * 2), min_size=1, max_size=4))
def test_kl_divergence_is_the_sum_over_classes_for_each_image(pairs):
    check_kl(pairs)


def test_the_kl_of_bf16_logits_under_autocast_is_that_of_the_same_float32_logits():
    p = torch.randn(64, 10, generator=torch.Generator().manual_seed(0)).bfloat16()
    q = (p + 0.01 * torch.randn(64, 10, generator=torch.Generator().manual_seed(1))).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        kl = kl_divergence(p, q)
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl, kl_divergence(p.float(), q.float()))
    assert kl_divergence(p.double(), q.double()).dtype == torch.float64


def test_gradient_of_the_kl_flows_into_both_arguments():
    p, q = torch.tensor([[2.0, 0.0]], requires_grad=True), torch.tensor([[0.0, 1.0]], requires_grad=True)
    kl_divergence(p, q).sum().backward()
    assert p.grad.abs().sum() > 0 and q.grad.abs().sum() > 0
