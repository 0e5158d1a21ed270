"""An alignment shows every error or counts it, and a long one is no wall of words."""

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report import Page

from hebasr_jax.alignment import alignment
from hebasr_jax.metrics import align_words


def shown(reference: str, hypothesis: str) -> tuple[list[str], list[str]]:
    """Operations of the columns, and the texts of the gaps."""
    columns = align_words(reference, hypothesis)
    page = Page(alignment("", columns, (reference, hypothesis)))
    kinds = ("equal", "substitute", "delete", "insert", "gap")
    operations = [c for tag, a in page.elements if (c := a.get("class", "")) in kinds]
    gaps = [data for _, classes, data in page.texts if "gap" in classes]
    return operations, gaps


def test_a_long_alignment_is_its_errors_and_the_words_around() -> None:
    words = [f"w{i}" for i in range(1000)]
    wrong = [*words]
    wrong[500], wrong[509], wrong[999] = "x", "y", "z"
    operations, gaps = shown(" ".join(words), " ".join(wrong))
    assert Counter(operations) == {"equal": 20, "substitute": 3, "gap": 2}
    assert gaps == ["… 496 correct …", "… 481 correct …"]
    same = " ".join(words)
    assert shown(same, same) == (["gap"], ["… 1,000 correct …"])


def test_a_short_alignment_is_whole() -> None:
    operations, gaps = shown("a b c", "a x c")
    assert (operations, gaps) == (["equal", "substitute", "equal"], [])


@pytest.mark.parametrize("operation", ["insert", "delete"])
def test_of_many_words_at_a_stretch_both_ends_are_shown(operation) -> None:
    texts = ["a b", "a b" + " x" * 60]
    operations, gaps = shown(*(texts if operation == "insert" else texts[::-1]))
    assert Counter(operations) == {"equal": 2, operation: 12, "gap": 1}
    assert gaps == [f"… 48 more {'added' if operation == 'insert' else 'left out'} …"]


@settings(max_examples=50)
@given(st.lists(st.sampled_from("ab"), max_size=900), st.randoms(use_true_random=False))
def test_words_shown_and_words_in_gaps_are_all_words(reference, random) -> None:
    hypothesis = [w for w in reference if random.random() > 0.05]
    columns = align_words(" ".join(reference), " ".join(hypothesis))
    operations, gaps = shown(" ".join(reference), " ".join(hypothesis))
    hidden = sum(int(re.search(r"[\d,]+", gap)[0].replace(",", "")) for gap in gaps)
    assert len(operations) - len(gaps) + hidden == len(columns)
