"""What the figures of a teacher mean, in plain words.

Thresholds are stated where they stand; each finding gives the number it rests on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from distill.checkup import separation
from distill.checkup.figures import ALL_HARD
from distill.checkup.sample import RANDOM_PAIRS, hard_kind

if TYPE_CHECKING:
    from distill.checkup.anatomy import Anatomy
    from distill.checkup.figures import Figures, Separation
    from distill.checkup.separation import Interval
    from distill.data.corpus import Corpus
    from distill.doctor_teacher import Examination

FAR = 0.8  # AUC against random pairs below which a teacher hardly works
MANY_SATURATED = 0.5
MANY_TIES = 0.05
MANY_CUT, MANY_UNKNOWN = 0.02, 0.01
BLIP_WIDTH, BLIP_HEADS = 768, 12


@dataclass(frozen=True)
class Finding:
    """One thing found. FAULT: cannot work. WARN: works, but likely not as meant. NOTE: could not be looked at."""

    level: Literal["OK", "NOTE", "WARN", "FAULT"]
    topic: str
    text: str
    advice: str = ""


def findings(e: Examination, figures: Figures, body: Anatomy, corpus: Corpus) -> list[Finding]:
    """What was found, in the order in which it should be dealt with."""
    found = [*_scores(e, figures, corpus), *(Finding("NOTE", "sample", note) for note in e.notes)]
    if figures.losses is not None:
        found += [*_separation(e, figures), *_against_student(e, figures), *_variants(e, figures)]
        found += [*_saturation(e, figures), *_ties(e, figures)]
    return found + [*_heads(body), *_vocabulary(body), *_lengths(body)]


def _scores(e: Examination, figures: Figures, corpus: Corpus) -> Iterator[Finding]:
    scores = e.answers.pairs
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        image, text = e.questions.pairs()[bad[0]].tolist()
        yield Finding(
            "FAULT",
            "scores",
            f"{len(bad)} of {len(scores)} scores are NaN or infinite, the first of {corpus.image_names[image]} with "
            f'"{corpus.texts[text]}"',
            "look for half precision that overflows, or a checkpoint that lacks weights",
        )
    elif figures.constant:
        yield Finding(
            "FAULT",
            "scores",
            f"all {len(scores)} scores are {scores[0]:.6g}: nothing can be learnt from them",
            "check that the checkpoint has a trained matching head and that score_kind reads it",
        )
    else:
        yield Finding(
            "OK", "scores", f"{len(scores)} scores, all finite, from {scores.min():.3g} to {scores.max():.3g}"
        )


def _separation(e: Examination, figures: Figures) -> Iterator[Finding]:
    against = figures.scorers[e.teacher].against
    hits, random = _hits(against), against[RANDOM_PAIRS].auc
    said = f"a true pair is above a hard negative of its list in {hits.percent()} of the cases"
    if hits.low <= 0.5:
        yield Finding("WARN", "separation", f"{said}: no better than a coin", _BETTER)
    elif random.value < FAR:
        said = f"even from random pairs true ones are told with an AUC of only {random.plain()}"
        yield Finding("WARN", "separation", said, _BETTER)
    else:
        yield Finding("OK", "separation", f"{said}, above a random pair in {random.percent()}")


_BETTER = "teach it longer, choose another checkpoint, or check that the data are of the kind it was trained on"


def _against_student(e: Examination, figures: Figures) -> Iterator[Finding]:
    if figures.student is None:
        return
    gain = figures.student.hits
    own, theirs = (_hits(figures.scorers[label].against).value for label in (e.teacher, e.student.label))
    said = (
        f"true pair above a hard negative of its list: teacher {own:.1%}, {e.student.label} {theirs:.1%}, "
        f"{gain.points()}{_one_sided(e)}"
    )
    if gain.low > 0:
        yield Finding("OK", "against the student", said)
        return
    verdict = "worse" if gain.high < 0 else f"no better, as far as {len(e.sample.true)} pictures can tell"
    yield Finding(
        "WARN",
        "against the student",
        f"{said}; the teacher is {verdict}",
        "raise --images for a narrower interval; if it stays so, its scores have little to teach this student: try "
        "another score_kind, longer teaching or another teacher first",
    )


def _one_sided(e: Examination) -> str:
    """A finder's own hard negatives are those it errs on most."""
    if len(e.questions.hard) > 1:
        return ""
    finder = next(iter(e.questions.hard))
    return f" (all of them found by the {finder}, which is hard on it)"


def _variants(e: Examination, figures: Figures) -> Iterator[Finding]:
    for label, other in figures.variants.items():
        rank = "undefined" if other.spearman is None else f"{other.spearman:.3f}"
        topic = f"{e.teacher} or {label}"
        said = (
            f"scores differ by up to {other.largest:.3g}, rank correlation {rank}; true pair above a hard negative of "
            f"its list, the recipe's {e.teacher} minus {label}: {other.hits.points()}"
        )
        if other.hits.high < 0:
            advice = f"take {label}: teacher.enc_token is original for [ENC], cls for [CLS]"
            yield Finding("WARN", topic, f"{said}; the recipe's choice is the worse one", advice)
        else:
            verdict = "the recipe's choice is the better one" if other.hits.low > 0 else "neither is clearly better"
            yield Finding("OK", topic, f"{said}; {verdict}")


def _saturation(e: Examination, figures: Figures) -> Iterator[Finding]:
    found = figures.scorers[e.teacher].saturation.get(hard_kind(e.mined_by))
    if found is None:
        return
    said = (
        f"as probabilities, {found.near:.0%} of the hard negatives would lie within {separation.NEAR:g} of 0 or 1 and "
        f"{found.bfloat16:.0%} would be exactly 0 or 1 in bfloat16"
    )
    if found.near >= MANY_SATURATED:
        yield Finding(
            "WARN",
            "saturation",
            said,
            "distil the log-odds as they are, never a probability of a pair: by margins, by order, or by kl with the "
            "teacher_temperature given above",
        )
    else:
        yield Finding("OK", "saturation", said)


def _ties(e: Examination, figures: Figures) -> Iterator[Finding]:
    found = figures.scorers[e.teacher].ties
    if found is None:
        return
    said = (
        f"{found.float32:.1%} of the pairs of candidates of one list have equal scores; {found.bfloat16:.1%} once "
        f"rounded to bfloat16, {found.float16:.1%} to float16"
    )
    if found.float32 > MANY_TIES:
        advice = "look for what rounds the scores; from ties order losses (cprd) learn little: take kl or margins"
        yield Finding("WARN", "ties", said, advice)
    elif found.bfloat16 > MANY_TIES:
        yield Finding("WARN", "ties", said, "keep the teacher's head and its scores in float32")
    else:
        yield Finding("OK", "ties", said)


def _heads(body: Anatomy) -> Iterator[Finding]:
    if body.text_heads is None or body.text_width is None:
        return
    said = f"text encoder of {body.text_layers} layers, {body.text_width} wide, {body.text_heads} attention heads"
    if body.text_width == BLIP_WIDTH and body.text_heads != BLIP_HEADS:
        advice = f'set "num_attention_heads": {BLIP_HEADS} in its config.json, unless it was trained so'
        yield Finding("WARN", "heads", f"{said}; encoders of this width were trained with {BLIP_HEADS}", advice)
    else:
        yield Finding("OK", "heads", said)


def _vocabulary(body: Anatomy) -> Iterator[Finding]:
    if body.tokenizer_length is None or body.embedding_rows is None:
        return
    said = f"the tokenizer has {body.tokenizer_length} tokens, the embedding {body.embedding_rows} rows"
    if body.tokenizer_length > body.embedding_rows:
        yield Finding(
            "FAULT", "vocabulary", said, "a token without a row cannot be read: take the checkpoint's own tokenizer"
        )
    elif body.unknown is not None and body.unknown > MANY_UNKNOWN:
        advice = "use a teacher whose vocabulary covers the captions' language"
        yield Finding(
            "WARN", "vocabulary", f"{said}; {body.unknown:.1%} of the captions' tokens are unknown to it", advice
        )
    else:
        yield Finding("OK", "vocabulary", said)


def _lengths(body: Anatomy) -> Iterator[Finding]:
    if body.longest is None or body.cut is None:
        return
    said = (
        f"{body.max_text_length} tokens of a caption are read; the longest of {body.captions} has {body.longest}, "
        f"{body.cut:.1%} are cut"
    )
    if body.cut > MANY_CUT:
        yield Finding("WARN", "caption length", said, f"raise teacher.max_text_length towards {body.longest}")
    else:
        yield Finding("OK", "caption length", said)


def _hits(against: Mapping[str, Separation]) -> Interval:
    """Over all hard negatives, whoever found them."""
    found = against.get(ALL_HARD) or next(found for kind, found in against.items() if kind != RANDOM_PAIRS)
    assert found.hits is not None, "hard negatives come in lists"
    return found.hits
