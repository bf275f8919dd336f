"""Each convention against the toolkit whose name it bears, or its formula where the toolkit is no test dependency."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, kl_div, log_softmax, mse_loss, softmax

from distill.losses import (
    ADRMSE,
    KL,
    ApproxNDCG,
    Contrastive,
    EmbeddingMatch,
    Hinge,
    LambdaRank,
    ListMLE,
    MarginMSE,
    Pearson,
    RankNet,
    SoftmaxCE,
    listwise,
    logits,
    margin,
    pairwise,
)
from distill.protocols import Scored
from tests.losses.batches import draw, full_rows


def gradient(value, leaf):
    return torch.autograd.grad(value, leaf, retain_graph=True)[0]


def same(ours, theirs, leaf, **tolerance):
    assert theirs > 1e-3
    torch.testing.assert_close(ours, theirs, **tolerance)
    torch.testing.assert_close(gradient(ours, leaf), gradient(theirs, leaf), **tolerance)


# --- sentence-transformers --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def st():
    """Its losses for embeddings and for cross-encoders."""
    pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers is a test dependency: pip install -e .[dev]"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what another package says while it is imported is no concern of ours
        from sentence_transformers.cross_encoder import losses as of_pairs
        from sentence_transformers.sentence_transformer import losses as of_embeddings
    return of_embeddings, of_pairs


def embeddings(seed=0, negatives=3):
    """A query, a positive and negatives for each of five rows, and our view of the same batch."""
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(5, 6, generator=g, dtype=torch.float64).requires_grad_()
    items = [torch.randn(5, 6, generator=g, dtype=torch.float64) for _ in range(1 + negatives)]
    teacher = torch.randn(5, 1 + negatives, generator=g, dtype=torch.float64) * 4
    positive = torch.zeros_like(teacher, dtype=torch.bool)
    positive[:, 0] = True
    student = torch.stack([(query * item).sum(dim=1) for item in items], dim=1)
    return query, [query, *items], Scored(student, teacher, positive, positive | True, torch.tensor(20.0))


@pytest.mark.parametrize("negatives", [1, 4])
def test_margin_mse_of_sentence_transformers(st, negatives):
    query, given, scored = embeddings(negatives=negatives)
    loss = st[0].MarginMSELoss(None)
    ours = MarginMSE(convention="sentence_transformers")
    same(ours(scored), loss.compute_loss_from_embeddings(given, scored.teacher), query)
    margins = scored.teacher[:, :1] - scored.teacher[:, 1:]
    same(ours(scored), loss.compute_loss_from_embeddings(given, margins), query)


@pytest.mark.parametrize(("student", "teacher"), [(1.0, 1.0), (0.5, 3.0), (2.0, 2.0)])
def test_kl_of_sentence_transformers(st, student, teacher):
    query, given, scored = embeddings(1)
    loss = st[0].DistillKLDivLoss(None, student_temperature=student, teacher_temperature=teacher)
    ours = KL(convention="sentence_transformers", temperature=student, teacher_temperature=teacher)
    same(ours(scored), loss.compute_loss_from_embeddings(given, scored.teacher), query)


@pytest.mark.parametrize("distance", ["cosine", "mse", "l2"])
def test_embeddings_of_sentence_transformers(st, distance):
    query, given, scored = embeddings(2)
    loss = st[0].EmbedDistillLoss(None, distance_metric=distance)
    theirs = loss.compute_loss_from_embeddings([query, query], given[1:3])
    extras = {"student_images": query, "student_texts": query, "teacher_images": given[1], "teacher_texts": given[2]}
    ours = EmbeddingMatch(distance=distance)(replace(scored, extras=extras))
    same(ours, theirs, query)


class Scores(torch.nn.Module):
    """A cross-encoder whose answers are known: text i is row or column i of a table."""

    num_labels = 1
    device = torch.device("cpu")

    def __init__(self, table):
        super().__init__()
        self.table = table

    def preprocess(self, pairs, **_):
        return {"cells": torch.tensor([[int(query), int(document)] for query, document in pairs])}

    def forward(self, tokens):
        return {"scores": self.table[tuple(tokens["cells"].T)]}


def lists(seed=0):
    """Ragged lists of at least two, as theirs and as ours: (leaf, queries and documents, labels, batch). float32."""
    g = torch.Generator().manual_seed(seed)
    student = (torch.randn(6, 7, generator=g) * 2).requires_grad_()
    teacher = torch.randn(6, 7, generator=g) * 3
    lengths = torch.tensor([7, 2, 5, 3, 7, 4])
    valid = torch.arange(7) < lengths[:, None]
    documents = [[str(k) for k in range(length)] for length in lengths.tolist()]
    labels = [teacher[row, :length] for row, length in enumerate(lengths.tolist())]
    scored = Scored(student, teacher, torch.zeros_like(valid), valid, torch.tensor(20.0))
    return student, ([str(row) for row in range(6)], documents), labels, scored


@pytest.mark.parametrize(
    ("make", "ours"),
    [
        (lambda of, model: of.ListNetLoss(model), SoftmaxCE(convention="sentence_transformers")),
        (
            lambda of, model: of.ListMLELoss(model, respect_input_order=False),
            ListMLE(convention="sentence_transformers"),
        ),
        (lambda of, model: of.RankNetLoss(model), RankNet(convention="sentence_transformers")),
        (
            lambda of, model: of.LambdaLoss(model, weighting_scheme=of.LambdaRankScheme()),
            LambdaRank(convention="sentence_transformers"),
        ),
        (lambda of, model: of.ADRMSELoss(model), ADRMSE(convention="sentence_transformers", temperature=1.0)),
        (
            lambda of, model: of.ADRMSELoss(model, alpha=2.0),
            ADRMSE(convention="sentence_transformers", temperature=0.5),
        ),
    ],
    ids=["ListNet", "ListMLE", "RankNet", "LambdaRank", "ADR-MSE", "ADR-MSE-alpha"],
)
def test_list_losses_of_sentence_transformers(st, make, ours):
    for seed in range(3):
        student, inputs, labels, scored = lists(seed)
        same(ours(scored), make(st[1], Scores(student))(inputs, labels), student, rtol=1e-4, atol=1e-5)


# --- pytorch-metric-learning ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pml():
    """Its losses, distances and reducers."""
    pytest.importorskip(
        "pytorch_metric_learning", reason="pytorch-metric-learning is a test dependency: pip install -e .[dev]"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pytorch_metric_learning import distances, losses, reducers
    return losses, distances, reducers


def labelled(seed=0):
    """Unit queries and keys with two keys of each query's label, and our view."""
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(4, 5, generator=g, dtype=torch.float64).requires_grad_()
    key = torch.nn.functional.normalize(torch.randn(8, 5, generator=g, dtype=torch.float64), dim=1)
    unit = torch.nn.functional.normalize(query, dim=1)
    ids, key_ids = torch.arange(4), torch.arange(8) % 4
    positive = ids[:, None] == key_ids
    student = unit @ key.T
    scored = Scored(student, student.detach() * torch.nan, positive, positive | True, torch.tensor(10.0).double())
    return query, (unit, ids, None, key, key_ids), scored


def test_contrastive_of_pytorch_metric_learning(pml):
    query, given, scored = labelled()
    same(Contrastive()(scored), pml[0].NTXentLoss(temperature=0.1)(*given), query, rtol=1e-5, atol=1e-8)
    same(
        Contrastive(positives="shared")(scored), pml[0].SupConLoss(temperature=0.1)(*given), query, rtol=1e-5, atol=1e-8
    )


def test_hinge_of_pytorch_metric_learning(pml):
    query, given, scored = labelled(1)
    losses, distances, reducers = pml
    theirs = losses.TripletMarginLoss(
        margin=0.2, distance=distances.CosineSimilarity(), reducer=reducers.MeanReducer()
    )(*given)
    same(
        Hinge(hardest=False)(scored), theirs * 6, query, rtol=1e-5, atol=1e-8
    )  # theirs is a mean over the six negatives too


# --- formulas of toolkits that are no test dependency ----------------------------------------------------------------


def raw(seed=0):
    scored = full_rows(seed)
    return scored.student.requires_grad_(), scored


def test_kl_of_tevatron_has_one_temperature_and_no_square():
    leaf, scored = raw()
    for t in (0.05, 1.0):
        theirs = kl_div(log_softmax(leaf / t, 1), softmax(scored.teacher / t, 1), reduction="batchmean")
        same(KL(convention="tevatron", temperature=t, teacher_temperature=t)(scored), theirs, leaf)


def test_kl_of_flag_embedding_is_a_cross_entropy():
    leaf, scored = raw(1)
    theirs = -(log_softmax(leaf / 0.02, dim=-1) * softmax(scored.teacher, dim=-1)).sum(dim=-1).mean()
    same(SoftmaxCE(convention="flag_embedding", temperature=0.02)(scored), theirs, leaf)


def test_lightning_ir():
    leaf, scored = raw(2)
    t = scored.teacher
    row, i, j = torch.nonzero(t[..., None] > t[:, None], as_tuple=True)
    margins, wanted = leaf[row, i] - leaf[row, j], t[row, i] - t[row, j]
    same(MarginMSE(convention="lightning_ir")(scored), mse_loss(margins, wanted), leaf)
    for times in (1.0, 4.0):
        theirs = binary_cross_entropy_with_logits(margins * times, torch.ones_like(margins))
        same(RankNet(convention="lightning_ir", temperature=1 / times)(scored), theirs, leaf)
    same(
        KL(convention="lightning_ir")(scored),
        kl_div(log_softmax(leaf, -1), log_softmax(t, -1), log_target=True, reduction="batchmean"),
        leaf,
    )
    centred = [x - x.mean(dim=-1, keepdim=True) for x in (leaf, t)]
    same(Pearson()(scored), (1 - torch.cosine_similarity(*centred, dim=-1)).mean(), leaf)
    smooth = torch.sigmoid((leaf[:, None] - leaf[..., None]) / 0.5)
    smooth = (smooth * (1 - torch.eye(8))).sum(-1) + 1
    worth = 2 ** t.clamp(min=0) - 1
    places = t.argsort(descending=True).argsort() + 1
    ideal = (worth / torch.log2(1 + places)).sum(-1)
    theirs = (1 - (worth / torch.log2(1 + smooth)).sum(-1) / ideal).mean()
    same(ApproxNDCG(convention="lightning_ir", temperature=0.5)(scored), theirs, leaf)
    for discount, weight in [("none", 1.0), ("log2", 1 / torch.log2(places + 1)), ("reciprocal", 1 / places)]:
        theirs = ((smooth - places) ** 2 * weight).mean()
        same(ADRMSE(convention="lightning_ir", temperature=0.5, discount=discount)(scored), theirs, leaf)


def test_one_mean_over_all_pairs_is_not_the_mean_of_rows():
    """The convention changes something: rows of unequal length count by their pairs."""
    scored = draw(3)
    for options in (MarginMSE, RankNet):
        own = options(temperature=1.0, **({"pairs": "all"} if options is MarginMSE else {}))
        theirs = options(convention="lightning_ir", **({} if options is MarginMSE else {"temperature": 1.0}))
        assert not torch.isclose(own(scored), theirs(scored))


def test_infonce_of_the_best_labelled_is_cross_entropy():
    leaf, scored = raw(4)
    best = scored.teacher.argmax(dim=1)
    positive = torch.zeros_like(scored.positive).scatter(1, best[:, None], True)
    ours = SoftmaxCE(target="labels", temperature=1.0)(replace(scored, positive=positive))
    same(ours, cross_entropy(leaf, best), leaf)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: KL(convention="pylate"),
            "convention must be one of own, sentence_transformers, tevatron, lightning_ir",
        ),
        (lambda: KL(convention="sentence_transformers"), "knows no learned scale: give a number for temperature"),
        (
            lambda: KL(convention="tevatron", temperature=0.1, t_squared=True),
            "convention='tevatron' has t_squared=False: leave t_squared out",
        ),
        (
            lambda: KL(convention="tevatron", temperature=0.1),
            "one temperature for both: set teacher_temperature to 0.1",
        ),
        (lambda: KL(convention="lightning_ir", temperature=0.1), "has temperature=1.0: leave temperature out"),
        (lambda: MarginMSE(convention="lightning_ir", pairs="all"), "has pairs='all': leave pairs out"),
        (lambda: ListMLE(convention="sentence_transformers", train_scale=True), "has train_scale=False"),
        (lambda: MarginMSE(pairs="all", negatives="hardest"), "with pairs='all' leave negatives out"),
    ],
)
def test_options_that_contradict_a_convention_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_the_page_names_every_convention():
    """docs/loss-conventions.md beside the tables in the code."""
    page = (Path(__file__).parents[2] / "docs" / "loss-conventions.md").read_text(encoding="utf-8")
    tables = {
        "margin_mse": margin.CONVENTIONS,
        "kl": logits.KL_CONVENTIONS,
        "softmax_ce": logits.CE_CONVENTIONS,
        "ranknet": pairwise.RANKNET,
        "lambdarank": pairwise.LAMBDARANK,
        "listmle": listwise.LISTMLE,
        "approx_ndcg": listwise.APPROX_NDCG,
        "adr_mse": listwise.ADR_MSE,
    }
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(lines) >= sum(map(len, tables.values())) > 10
    for loss, conventions in tables.items():
        for name, convention in conventions.items():
            (line,) = [line for line in lines if line.startswith(f"| `{loss}` | `{name}` |")]
            for option in convention.fixes:
                assert f"`{option}:" in line, (loss, name, option)


def test_log_two_is_what_divides():
    scored = full_rows(5)
    torch.testing.assert_close(RankNet(binary_log=True)(scored) * math.log(2), RankNet()(scored))
