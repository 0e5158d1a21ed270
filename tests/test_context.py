"""Previous text in the prompt: whose it is, in joined rows and where another's is drawn."""

from dataclasses import replace
from pathlib import Path

import pytest
from test_pipeline import (
    Ledger,
    all_batches,
    clip,
    clip_set,
    feed_of,
    rows_of,
    some_clips,
    tokenizer,
    with_,
)
from test_stamped_targets import heard, read, told_rows

from hebasr_jax.data.clips import Clip


def test_the_context_of_a_clip_joined_behind_a_bad_one_is_not_used() -> None:
    """The plan has no room for it: it took the first clip's into account."""
    clips = [clip(0, 6.0, text="x" * 60), clip(1, 1.0, recording="r", context="")]
    clips.append(clip(2, 1.0, recording="r", context="long " * 20))
    config = with_(data={"join_share": 1.0}, text={"context_share": 1.0})
    rows = told_rows(clips, config, bad={1: "damaged"})
    [told] = [told for row, told in rows if heard(row) == [2]]
    assert told.context == ""


def contexts(clips: list[Clip], epoch: int = 0, wrong: float = 0.5, **data) -> dict[int, str]:
    """The context in each clip's row; every context is drawn, and a share of them wrong."""
    config = with_(text={"context_share": 1.0, "wrong_context_share": wrong}, data=data)
    ledger = Ledger(Path("/nowhere/quarantine.jsonl"), limit_share=0.0)
    rows = rows_of(
        all_batches(feed_of([clip_set(clips)], config, ledger), epochs=epoch + 1, epoch=epoch)
    )
    return {heard(row)[0]: read(row, tokenizer()).context for row in rows}


def test_wrong_contexts_are_another_recordings() -> None:
    owner = {n: n % 5 for n in range(300)}
    clips = [
        replace(one, recording=f"r{owner[n]}", context=f"{n} " + "b" * (n % 7))
        for n, one in enumerate(some_clips(300))
    ]
    drawn = [contexts(clips, epoch) for epoch in range(2)]
    assert drawn[0] == contexts(clips, batch_clips=7, buckets=2)
    wrong = []
    for told in drawn:
        assert told.keys() == owner.keys()
        wrong.append({n for n, text in told.items() if text != clips[n].context.strip()})
        others = {n: told[n] for n in wrong[-1] if told[n]}
        assert all(owner[int(text.split()[0])] != owner[n] for n, text in others.items())
        assert all(len(text) <= len(clips[n].context) for n, text in others.items())
        assert len(set(others.values())) > 60
        assert len(others) > 0.9 * len(wrong[-1])
        assert len(wrong[-1]) == pytest.approx(150, abs=35)
    assert len(wrong[0] & wrong[1]) == pytest.approx(75, abs=30)
    assert contexts(clips, wrong=0.0) == {n: one.context.strip() for n, one in enumerate(clips)}


def test_no_wrong_context_is_the_clips_own_or_of_its_recording() -> None:
    """Where there is no other, or the recordings are not told, there is none."""
    for names in (("one", "one"), ("", ""), ("", "one")):
        clips = [replace(one, recording=names[n % 2]) for n, one in enumerate(some_clips(20))]
        assert set(contexts(clips, wrong=1.0).values()) == {""}
    clips = [replace(one, recording=str(n), context="same") for n, one in enumerate(some_clips(20))]
    assert set(contexts(clips, wrong=1.0).values()) == {""}
    clips[3] = replace(clips[3], context="")
    assert contexts(clips, wrong=1.0)[3] == ""
