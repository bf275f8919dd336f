"""The fast dense layer against ``nn.Linear``, and that it never serves a weight that is gone."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from teachers import dense as module
from teachers.dense import dense

needs_operator = pytest.mark.skipif(not module._OPERATOR_IS_THERE, reason="torch was built without oneDNN")


def rows_and_layer(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return torch.randn(3, 7, 24, dtype=dtype), nn.Linear(24, 40, bias=bias).to(dtype)


@needs_operator
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_new", "relu", "quick_gelu"])
def test_equals_the_layer_and_its_activation(dtype, bias, activation, monkeypatch):
    rows, layer = rows_and_layer(dtype, bias)
    act = None if activation is None else ACT2FN[activation]
    used = []
    monkeypatch.setattr(module, "_laid_out", lambda weight, made=module._laid_out: used.append(weight) or made(weight))
    with torch.no_grad():
        got = dense(layer, rows, act)
        expected = layer(rows) if act is None else act(layer(rows))
    assert got.shape == (3, 7, 40)
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(got, expected, **close)
    assert used[0] is layer.weight


@needs_operator
def test_a_weight_that_changed_is_laid_out_again():
    rows, layer = rows_and_layer()
    with torch.no_grad():
        before = dense(layer, rows)
        layer.weight.mul_(2)  # as an optimizer does
        twice = dense(layer, rows)
        torch.testing.assert_close(twice, layer(rows), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(twice, before)
        layer.load_state_dict({name: value * 3 for name, value in copy.deepcopy(layer.state_dict()).items()})
        torch.testing.assert_close(dense(layer, rows), layer(rows), atol=1e-5, rtol=1e-5)
        layer.to(torch.bfloat16)  # other data under the same parameter
        torch.testing.assert_close(dense(layer, rows.bfloat16()), layer(rows.bfloat16()), atol=2e-2, rtol=2e-2)


@needs_operator
def test_a_layout_goes_with_its_weight():
    rows, layer = rows_and_layer()
    before = len(module._packed)
    with torch.no_grad():
        dense(layer, rows)
    assert len(module._packed) == before + 1
    del layer
    gc.collect()
    assert len(module._packed) == before


def test_gradient_hooks_and_wrappers_take_the_layer_itself(monkeypatch):
    def never(_weight):
        raise AssertionError("the fast way was taken")

    monkeypatch.setattr(module, "_laid_out", never)
    rows, layer = rows_and_layer()
    dense(layer, rows).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        seen = []
        handle = layer.register_forward_hook(lambda _module, _inputs, out: seen.append(out.shape))
        dense(layer, rows)
        assert seen == [(3, 7, 40)]
        handle.remove()

        class Wrapped(nn.Linear):
            def forward(self, rows):
                return super().forward(rows) + 1

        wrapped = Wrapped(24, 40)
        torch.testing.assert_close(dense(wrapped, rows), wrapped(rows))
        assert dense(layer, rows.double()[:0].float()).shape == (0, 7, 40)  # no rows
        half = layer.to(torch.float64)
        torch.testing.assert_close(dense(half, rows.double()), half(rows.double()))
