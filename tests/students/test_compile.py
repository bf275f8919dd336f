"""A student through torch.compile: what it computes, what it is, and its checkpoints are those of the plain one."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from distill.checkpoint import checkpoint_of
from distill.compiling import compiled
from distill.encoding import encode
from tests.students.test_encoding import gradients
from tests.test_train import SETTINGS, NoisyStudent, dying_at, lines, run

COMPILED = replace(SETTINGS, compile=True)
SIZES = ((16, 20, 12), (15, 11, 12), (6, 7, 9), (7, 6, 5), (16, 20, 11))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),  # of torch's own compiler, on its import
]
really = pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler: no c++ on PATH")


@pytest.fixture(autouse=True)
def _nothing_compiled_yet():
    torch.compiler.reset()
    counters.clear()


@pytest.fixture
def traced(monkeypatch):
    """Traced as it would be compiled, and then run as it is; what cannot be traced whole fails."""
    original = torch.nn.Module.compile

    def trace(self, *, dynamic, options):
        assert options
        original(self, dynamic=dynamic, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch.nn.Module, "compile", trace)


def cut(step, images, texts, length):
    """A step of fewer items whose texts are shorter."""
    return (
        {"pixel_values": step[0]["pixel_values"][:images].clone()},
        {name: tensor[:texts, :length].clone() for name, tensor in step[1].items()},
    )


def trained_on(student, step, micro_batch=None):
    counts = tuple(len(next(iter(inputs.values()))) for inputs in step)
    encoded = encode(student, *step, accelerator=Accelerator(cpu=True), counts=counts, micro_batch=micro_batch)
    out = encoded.embeddings
    (out.images @ out.texts.T * out.scale).logsumexp(1).sum().backward()
    encoded.finish()


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(("micro_batch", "graphs"), [(None, 1), (3, 2)])  # in pieces: once without gradient, once with
@pytest.mark.parametrize("recomputes", [False, True])
def test_batches_of_any_size_share_a_graph(make_config, step, recomputes, micro_batch, graphs):
    student = make_config().train()
    if recomputes:
        student.recompute_activations()
    names = list(student.state_dict())
    with compiled(student, wanted=True):
        assert list(student.state_dict()) == names
        for sizes in SIZES:
            trained_on(student, cut(step, *sizes), micro_batch)
    assert counters["stats"]["unique_graphs"] == graphs
    assert student._compiled_call_impl is None


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("family", ["siglip", "vit", "mobilenet"])
def test_every_family_is_traced_whole(make, step, family):
    student = make(family).train()
    size = 64 if family == "mobilenet" else 32
    with compiled(student, wanted=True):
        for sizes in SIZES[:2]:
            images, texts = cut(step, *sizes)
            pixels = torch.nn.functional.interpolate(images["pixel_values"], size=size)
            texts = student.prepare_texts(["a dog", "two men"]) if family == "siglip" else texts
            trained_on(student, ({"pixel_values": pixels}, texts))
    assert counters["stats"]["unique_graphs"] <= 2  # a batch norm may want its number of pictures


@really
def test_gradients_are_those_of_the_plain_student(make_config, step):
    student = make_config().train()
    for sizes in SIZES[:3]:
        part, found = cut(step, *sizes), []
        for wanted in (False, True):
            student.zero_grad()
            with compiled(student, wanted=wanted):
                out = student(*part)
                (out.images @ out.texts.T * out.scale).logsumexp(1).mean().backward()
            found.append((out, {name: p.grad for name, p in student.named_parameters() if p.grad is not None}))
        (plain, expected), (got, gradients_got) = found
        torch.testing.assert_close(got.images, plain.images, rtol=0, atol=1e-5)
        torch.testing.assert_close(got.texts, plain.texts, rtol=0, atol=1e-5)
        assert gradients_got.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients_got[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
        assert max(gradient.abs().max() for gradient in expected.values()) > 0.01
    assert counters["stats"]["unique_graphs"] == 1


@really
def test_in_pieces_with_dropout_it_draws_the_plain_student_s_numbers(make_towers, step):
    student = make_towers().train()
    found = []
    for wanted in (False, True):
        torch.manual_seed(7)
        with compiled(student, wanted=wanted):
            found.append(gradients(student, step, micro_batch=7))
    (loss, plain), (compiled_loss, got) = found
    assert compiled_loss == pytest.approx(loss, abs=1e-5)
    for name, gradient in plain.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    assert max(gradient.abs().max() for gradient in plain.values()) > 0.01


@really
def test_checkpoints_are_those_of_the_plain_student_and_either_goes_on_with_the_other_s(tmp_path: Path):
    whole = run(tmp_path / "plain")
    assert not counters["stats"]
    by_step = {line["step"]: line["loss"] for line in lines(tmp_path / "plain")}
    for first, then, name in ((COMPILED, SETTINGS, "to-plain"), (SETTINGS, COMPILED, "to-compiled")):
        torch.compiler.reset()
        counters.clear()
        with dying_at(8):
            run(tmp_path / name, settings=first)
        torch.manual_seed(99)
        resumed = run(tmp_path / name, student=NoisyStudent(seed=5), settings=then)
        assert counters["stats"]
        assert resumed._compiled_call_impl is None
        kept = load_file(checkpoint_of(tmp_path / name / "checkpoints", 12) / "model.safetensors")
        assert kept.keys() == whole.state_dict().keys()
        for part, value in whole.state_dict().items():
            torch.testing.assert_close(kept[part], value, rtol=0, atol=1e-4, msg=part)
        for line in lines(tmp_path / name):
            assert line["loss"] == pytest.approx(by_step[line["step"]], abs=1e-4)
