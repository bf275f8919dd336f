"""What a comparison's page explains: how its figures came about and what they can and cannot say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distill.analysis import Analysis
    from distill.compare import Comparison


def how_to_read(comparison: Comparison, analysis: Analysis) -> Iterator[tuple[str, str]]:
    """(term, explanation) in the order in which a reader meets them."""
    how = analysis.how
    yield (
        "What was identical",
        "All arms of a seed start from the same weights and see the same batches in the same order, the same "
        "candidates and the same teacher scores, for the same number of steps. They differ in their losses alone.",
    )
    yield (
        "Recall and RSUM",
        "R@K is the percentage of queries whose first true match is among the first K results; a tie counts against "
        "the model. RSUM adds R@1, R@5 and R@10 of both directions: 600 is perfect.",
    )
    yield (
        "± over seeds",
        "The sample standard deviation over trainings with different seeds: how far another training of the same arm "
        "may land elsewhere on these same images.",
    )
    yield (
        f"{100 * how.confidence:g} % interval",
        f"A percentile bootstrap over {analysis.clusters:,} images, {how.resamples:,} draws: how far the figure may "
        "move with another sample of test images, for these very students. An image and the captions written for it "
        "are drawn together, because captions of one image do well or badly together; hits are averaged over seeds "
        "first. The interval is not corrected for the number of arms.",
    )
    yield (
        "p",
        "From a paired test: on each image the two arms are exchanged by the toss of a coin, and p is the share of "
        f"{how.resamples:,} such exchanges (all of them, where there are fewer) whose RSUM differs by as much as the "
        "real one, two-sided. Like the interval it speaks of other test images, not of other trainings: for those "
        "look at the seeds, and whether all of them point the same way.",
    )
    yield (
        "p (Holm)",
        "The same, corrected for the number of arms compared with the same one; the comparisons with the undistilled "
        f"and those with the best arm are two families, each corrected for itself. A difference counts where it is "
        f"below {how.alpha:g}. “No significant difference” does not mean that two arms are equal: the interval says "
        "how large a difference these images leave possible.",
    )
    yield (
        "The best arm",
        "It was picked by its mean RSUM on the images it is then tested on, which makes its lead look a little larger "
        "than it is. Choose an arm on the validation split and report it on the test split.",
    )
    if comparison.teacher is not None:
        yield from _with_teacher(comparison.teacher.shortlist)


def _with_teacher(shortlist: int) -> Iterator[tuple[str, str]]:
    yield (
        "Gap closed",
        "How much of the RSUM distance between the undistilled student and the teacher an arm covered, each seed "
        f"against the undistilled student of the same seed. The teacher re-ranks the {shortlist:,} best items of a "
        "first stage.",
    )
    yield (
        "Agreement",
        "Kendall τ and Spearman ρ compare the order that student and teacher give the same candidates, 1 being the "
        "same, 0 unrelated; “same top-1” is the share of queries whose best candidate is the same one. An arm may "
        "agree less with its teacher and still find more.",
    )


def facts(comparison: Comparison) -> Iterator[tuple[str, str]]:
    """(name, value) of data, teacher, seeds and machine."""
    corpus, teacher = comparison.corpus, comparison.teacher
    yield "Data", f"{corpus.name}, {corpus.split} split, fingerprint {corpus.fingerprint}"
    if teacher is not None:
        yield "Teacher", f"{teacher.identity}, {teacher.score_kind}, re-ranks {teacher.shortlist:,} items"
    yield "Seeds", ", ".join(map(str, comparison.seeds))
    yield from comparison.environment.items()
