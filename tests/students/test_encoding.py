"""Gradient caching and checkpointing on real towers: the gradients of one plain pass, at less memory."""

from __future__ import annotations

import math
import weakref
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

from distill.encoding import encode
from distill.losses import Contrastive
from distill.protocols import Embeddings, Recomputable, Scored
from distill.sampler import share_of
from students import DualEncoder
from students.reading import tower_of
from tests.students.small_texts import N_IMAGES, N_TEXTS, TOWER


def loss_of(out: Embeddings) -> torch.Tensor:
    similarity = out.images @ out.texts.T
    positive = torch.eye(N_IMAGES, N_TEXTS).bool()
    return Contrastive()(
        Scored(similarity, torch.full_like(similarity, math.nan), positive, torch.ones_like(positive), out.scale)
    )


def gradients(student, step, **options):
    student.zero_grad()
    encoded = encode(student, *step, accelerator=Accelerator(cpu=True), counts=(N_IMAGES, N_TEXTS), **options)
    loss = loss_of(encoded.embeddings)
    loss.backward()
    encoded.finish()
    return loss.item(), {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("micro_batch", [4, 7, 19])
def test_gradients_are_those_of_one_pass(make_config, step, family, micro_batch):
    student = make_config(family).train()
    loss, plain = gradients(student, step)
    cached_loss, cached = gradients(student, step, micro_batch=micro_batch)
    assert cached_loss == pytest.approx(loss, abs=1e-6)
    assert cached.keys() == plain.keys()
    assert any("logit_scale" in name for name in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(cached[name], gradient, rtol=1e-5, atol=1e-5)
    assert max(gradient.abs().max() for gradient in plain.values()) > 0.01  # else 1e-5 says nothing


class Noisy(torch.nn.Module):
    """Dropout on the vectors: the student's random numbers reach the gradient."""

    def __init__(self, student):
        super().__init__()
        self.student, self.dropout = student, torch.nn.Dropout(0.4)

    def forward(self, images, texts, *, attention_pairs=None):
        out = self.student(images, texts)
        images, texts = (None if one is None else self.dropout(one) for one in (out.images, out.texts))
        return Embeddings(images, texts, out.scale)


def test_a_piece_draws_the_same_random_numbers_both_times(make_config, step):
    student = Noisy(make_config()).train()
    torch.manual_seed(7)
    loss, cached = gradients(student, step, micro_batch=8)
    after = torch.get_rng_state()
    torch.manual_seed(7)
    student.zero_grad()
    found = []
    for place in range(3):  # 20 texts in pieces of at most 8, each with its share of the images
        parts = [{name: tensor[share_of(len(tensor), place, 3)] for name, tensor in inputs.items()} for inputs in step]
        found.append(student(*parts))
    images, texts = (torch.cat([getattr(out, side) for out in found]) for side in ("images", "texts"))
    in_one_graph = loss_of(Embeddings(images, texts, found[0].scale))
    in_one_graph.backward()
    assert loss == in_one_graph.item()
    assert torch.equal(after, torch.get_rng_state())
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(cached[name], parameter.grad, rtol=0, atol=1e-6, msg=name)


class _Saved:
    def __init__(self, tensor):
        self.tensor = tensor


def peak_saved_bytes(student, run) -> int:
    """Most bytes that autograd held for a backward pass at one time, weights apart; each storage counted once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in student.parameters()}
    held: dict[int, list[int]] = {}
    now = peak = 0

    def release(storage: int) -> None:
        nonlocal now
        held[storage][1] -= 1
        if not held[storage][1]:
            now -= held.pop(storage)[0]

    def pack(tensor):
        nonlocal now, peak
        storage = tensor.untyped_storage().data_ptr()
        if tensor.is_leaf or storage in weights:  # these are there anyway
            return tensor
        if storage not in held:
            held[storage] = [tensor.untyped_storage().nbytes(), 0]
            now += held[storage][0]
        held[storage][1] += 1
        peak = max(peak, now)
        saved = _Saved(tensor)
        weakref.finalize(saved, release, storage)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: getattr(saved, "tensor", saved)):
        run()
    return peak


def peak_bytes(run) -> int:
    """Most bytes of tensors made while ``run`` runs that were there at one time, whoever held them."""
    now = peak = 0
    held: set[int] = set()

    def release(key: int, size: int) -> None:
        nonlocal now
        now -= size
        held.discard(key)

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal now, peak
            made = function(*args, **(kwargs or {}))
            given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
            for tensor in tree_leaves(made):
                if torch.is_tensor(tensor):
                    storage = tensor.untyped_storage()
                    key = storage.data_ptr()
                    if key not in held and key not in given:
                        held.add(key)
                        now += storage.nbytes()
                        peak = max(peak, now)
                        weakref.finalize(storage, release, key, storage.nbytes())
            return made

    with Counting():
        run()
    return peak


def test_a_batch_of_four_pieces_holds_a_quarter_of_the_activations(make_config, step):
    student = make_config().train()
    images, texts = step[0], {name: tensor[:16] for name, tensor in step[1].items()}

    def run(micro_batch):
        encoded = encode(
            student, images, texts, accelerator=Accelerator(cpu=True), counts=(16, 16), micro_batch=micro_batch
        )
        out = encoded.embeddings
        (out.images @ out.texts.T * out.scale).logsumexp(1).sum().backward()
        encoded.finish()

    whole, cached = (peak_saved_bytes(student, partial(run, size)) for size in (None, 4))
    assert whole > 1_000_000
    assert cached == pytest.approx(whole / 4, rel=0.05)


def test_a_frozen_side_takes_no_second_gradient(make_config, step):
    student = make_config().train()
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("text" in name)
    loss, cached = gradients(student, step, micro_batch=8)
    again, plain = gradients(student, step)
    assert cached.keys() == plain.keys()
    assert cached
    for name, gradient in plain.items():
        torch.testing.assert_close(cached[name], gradient, rtol=0, atol=1e-5, msg=name)


def test_maps_and_pieces_are_refused(make_config, step):
    pairs = (torch.arange(3), torch.arange(3))
    with pytest.raises(ValueError, match="leave micro_batch out"):
        gradients(make_config(), step, micro_batch=4, attention_pairs=pairs)


@pytest.mark.parametrize("micro_batch", [None, 7])
@pytest.mark.parametrize("family", ["clip", "siglip", "vit"])  # ViT and BERT draw dropout in every layer
def test_recomputed_activations_give_the_same_gradients(make, step, family, micro_batch):
    found = []
    for recomputes in (False, True):
        student = make(family).train()
        calls = {"image": count_layers(student, "image"), "text": count_layers(student, "text")}
        if recomputes:
            assert isinstance(student, Recomputable)
            assert student.recompute_activations() == {"image", "text"}
        torch.manual_seed(3)
        found.append((*gradients(student, step, micro_batch=micro_batch), torch.get_rng_state()))
        again = 1 if micro_batch is None else 6  # 20 texts in 3 pieces, each encoded twice
        for side in calls:
            assert len(calls[side]) == again + (recomputes and again // (1 if micro_batch is None else 2))
    (loss, kept, after), (recomputed_loss, recomputed, recomputed_after) = found
    assert recomputed_loss == loss
    assert torch.equal(after, recomputed_after)
    assert recomputed.keys() == kept.keys()
    for name, gradient in kept.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=0, atol=1e-6, msg=name)
    assert max(gradient.abs().max() for gradient in kept.values()) > 0.01  # else 1e-6 says nothing


def count_layers(student, side):
    """A list that grows by one each time the side's first layer runs."""
    calls = []
    tower = tower_of(student.model, side)
    layer = next(module for module in tower.modules() if isinstance(module, GradientCheckpointingLayer))
    for module in layer.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_hook(lambda *_: calls.append(1))
            return calls
    raise AssertionError("a layer without a norm")


def test_recomputing_a_deep_tower_holds_a_fraction_of_the_activations(tokenizer, step):
    def peaks(*, recomputes):
        torch.manual_seed(0)
        deep = {**TOWER, "num_hidden_layers": 12}
        student = DualEncoder.from_config(
            vision={**deep, "patch_size": 8},
            text={**deep, "max_position_embeddings": 16},
            projection_dim=24,
            tokenizer=tokenizer,
            image_size=32,
        ).train()
        if recomputes:
            student.recompute_activations()
        gradients(student, step)  # so that the gradients are there already
        run = partial(gradients, student, step)
        return peak_saved_bytes(student, run), peak_bytes(run)

    (saved, held), (saved_again, held_again) = peaks(recomputes=False), peaks(recomputes=True)
    assert held > 5_000_000
    assert saved_again < 0.2 * saved
    assert held_again < 0.25 * held  # with the activations of one layer, while it is run again


def test_towers_that_train_and_can_are_recomputed(make, step):
    half = make("mobilenet")
    assert half.recompute_activations() == {"text"}
    frozen = make("clip", freeze={"text"}).train()
    calls = count_layers(frozen, "text")
    assert frozen.recompute_activations() == {"image"}
    gradients(frozen, step)
    assert len(calls) == 1
    for student, words in (
        (make("mobilenet", freeze={"text"}), r"image tower \(mobilenet_v2\) cannot, text tower \(bert\) is frozen"),
        (make("clip", freeze={"image", "text"}), "image tower .* is frozen, text tower .* is frozen"),
    ):
        with pytest.raises(ValueError, match=words):
            student.recompute_activations()
