"""Error alignments as HTML: reference over hypothesis, told apart by colour, sign and stroke."""

import html
from collections.abc import Iterator, Sequence
from itertools import groupby

from hebasr_jax.metrics import AlignedWord
from hebasr_jax.page import direction_of, escaped

_MARKS = {"equal": "", "substitute": "≠", "delete": "−", "insert": "+"}
_WHOLE_WORDS = 100
_AROUND_WORDS = 4
_STRETCH_WORDS = 8
_MOST_WORDS = 240
_MOST_LETTERS = 20_000
_MOST_LETTERS_OF_WORD = 60


def key_to_signs(which: str) -> str:
    """What the lines and signs of an alignment mean, after a sentence (HTML) on whose they are."""
    return (
        f'<p class="key">{which} Upper line: reference; lower line: hypothesis, both '
        'normalised. <span class="substitute"><span>≠ another word</span></span> '
        '<span class="delete"><span><del>− left out</del></span></span> '
        '<span class="insert"><span><ins>+ added</ins></span></span></p>'
    )


def errors_and_words(columns: Sequence[AlignedWord]) -> tuple[int, int]:
    """Errors of an alignment, and words of its reference."""
    errors = sum(column.operation != "equal" for column in columns)
    return errors, sum(column.reference is not None for column in columns)


def shortened(word: str) -> str:
    """A word of at most 60 letters."""
    over = len(word) > _MOST_LETTERS_OF_WORD
    return word[:_MOST_LETTERS_OF_WORD] + "…" if over else word


def alignment(
    head: str, columns: Sequence[AlignedWord], written: Sequence[str], player: str = ""
) -> str:
    """One clip, in the direction of its script.

    head and player are HTML. Over 100 words only the errors are shown with four words around each;
    of more than 16 words added or left out at a stretch both ends; and no more than 240 words
    altogether. What is not shown is counted in its place. `written` is the reference and the
    hypothesis before any normalising, folded, each up to 20,000 letters.
    """
    direction = direction_of("".join(written))
    words = " ".join(map(_column, _excerpt(columns))) or "both are empty"
    raw = "".join(f"<div>{_cut(text)}</div>" for text in written)
    return (
        f'<div class="sample"><div class="id">{head}</div>{player}'
        f'<div class="words" dir="{direction}">{words}</div>'
        f'<details><summary>as written</summary><div dir="{direction}">{raw}</div></details></div>'
    )


def _excerpt(columns: Sequence[AlignedWord]) -> Iterator[AlignedWord | str]:
    """The columns to show, and between them what is said of those left out."""
    before = 0
    for i in [*_kept(columns), len(columns)]:
        if i > before:
            yield _gap(columns[before:i])
        if i < len(columns):
            yield columns[i]
        before = i + 1


def _kept(columns: Sequence[AlignedWord]) -> list[int]:
    """Indices around errors, without the middle of what was added or left out at a stretch."""
    long = len(columns) > _WHOLE_WORDS
    errors = [i for i, column in enumerate(columns) if not long or column.operation != "equal"]
    near = {j for i in errors for j in range(i - _AROUND_WORDS, i + _AROUND_WORDS + 1)}
    near &= set(range(len(columns)))
    near |= {j for i in near for j in (i + 1, i + 2) if i + 3 in near}  # no gap of two words
    for operation, run in groupby(range(len(columns)), key=lambda i: columns[i].operation):
        stretch = list(run)
        if operation in ("insert", "delete") and len(stretch) > 2 * _STRETCH_WORDS:
            near -= set(stretch[_STRETCH_WORDS:-_AROUND_WORDS])
    return sorted(near)[:_MOST_WORDS]


def _gap(columns: Sequence[AlignedWord]) -> str:
    errors, _ = errors_and_words(columns)
    operations = {column.operation for column in columns}
    told = f"words with {errors:,} errors" if errors else "correct"
    if operations in ({"insert"}, {"delete"}):
        told = "more added" if "insert" in operations else "more left out"
    return f"… {len(columns):,} {told} …"


def _column(column: AlignedWord | str) -> str:
    if isinstance(column, str):
        return f'<span class="gap">{escaped(column)}</span>'
    ours, theirs, operation = column
    mark = f"<i>{_MARKS[operation]}</i>" if operation != "equal" else ""
    upper = "&nbsp;" if ours is None else escaped(shortened(ours))
    lower = "&nbsp;" if theirs is None else escaped(shortened(theirs))
    upper = f"<del>{upper}</del>" if operation == "delete" else f"<span>{upper}</span>"
    lower = f"<ins>{lower}</ins>" if operation == "insert" else f"<span>{lower}</span>"
    return f'<span class="{operation}">{upper}{lower}{mark}</span>'


def _cut(text: str) -> str:
    more = len(text) - _MOST_LETTERS
    shown = html.escape(text[:_MOST_LETTERS])
    return (shown + f" <bdi>… {more:,} more letters</bdi>" if more > 0 else shown) or "∅"
