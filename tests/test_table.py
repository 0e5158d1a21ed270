"""The plan's table: tokens counted to hold whatever is drawn, unusable clips left out and told."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_pipeline import clip, clip_set, tokenizer

from hebasr_jax.data.clips import Clip
from hebasr_jax.data.pipeline import Feed, _Positions
from hebasr_jax.data.plan import EpochPlan
from hebasr_jax.data.table import count_tokens, make_table
from hebasr_jax.errors import UserError
from hebasr_jax.run_config import Data, Text
from hebasr_jax.text import PromptStyle, build_example
from hebasr_jax.timestamps import Segment


def test_what_is_left_out_is_counted() -> None:
    clips = [clip(0, 0.05), clip(1, 40.0), clip(2, 1.0, text="x" * 500), clip(3, 1.0)]
    clips += [clip(4, 1.0, text="\ud800"), clip(5, 1.0, language="??"), clip(6, float("nan"))]
    table, left_out = make_table([clip_set(clips)], tokenizer(), Text(), Data())
    assert table.clip_C.tolist() == [3]
    assert list(left_out["a"].values()) == [2, 1, 2, 1]
    with pytest.raises(UserError, match="no clip"):
        make_table([clip_set(clips[:3])], tokenizer(), Text(), Data())
    with pytest.raises(UserError, match="no clip"):
        make_table([clip_set([])], tokenizer(), Text(), Data())
    with pytest.raises(UserError, match="names"):
        make_table([clip_set(clips), clip_set(clips)], tokenizer(), Text(), Data())
    with pytest.raises(UserError, match="names"):
        make_table([], tokenizer(), Text(), Data())
    with pytest.raises(UserError, match="time-stamp"):
        make_table([clip_set(clips)], tokenizer(False), Text(stamp_share=0.1), Data())
    with pytest.raises(UserError, match="language"):
        make_table([clip_set(clips)], tokenizer(), Text(language="hebrew"), Data())


words = st.text("aH b×©.1", max_size=12)


@given(words, words, st.booleans(), st.booleans(), st.booleans())
def test_counted_tokens_hold_whatever_is_drawn(one, two, stamps, context, in_prompt) -> None:
    text = Text(stamp_share=0.5 * stamps, context_share=0.5 * context, language_in_prompt=in_prompt)
    clips = [
        Clip(str(n), said, 1.0, context="co n", segments=(Segment(0.0, 0.4, said),))
        for n, said in enumerate((one, two))
    ]
    alone, added = count_tokens(clips, tokenizer(), text, joined=True)
    for with_stamps in {False, stamps}:
        for parts in (clips[:1], clips):
            said = " ".join(p.text.strip() for p in parts if p.text.strip())
            style = PromptStyle("Hebrew", in_prompt, with_stamps)
            segments = [Segment(float(n), n + 0.4, part.text) for n, part in enumerate(parts)]
            length = len(
                build_example(
                    tokenizer(),
                    style,
                    said,
                    segments=segments,
                    context="co n" if context else "",
                ).text_ids
            )
            planned = alone[0] + (added[1] if len(parts) > 1 else 0)
            assert length <= planned
            if not stamps and in_prompt and one.strip():
                assert length == planned


def test_a_late_thread_finds_the_plan_of_an_epoch_long_past() -> None:
    """Epochs of one batch: threads ask for several epochs at once, and out of order."""

    class OneBatchEpochs(Feed):
        def __init__(self) -> None:
            """Nothing is read."""

        def plan(self, epoch: int) -> EpochPlan:
            plan = object.__new__(EpochPlan)
            object.__setattr__(plan, "epoch", epoch)
            object.__setattr__(plan, "bucket_N", np.zeros(1))
            return plan

    positions = _Positions(OneBatchEpochs(), epoch=0, batch=0, epochs=10)
    found = [positions[index] for index in (8, 5, 0, 9, 3)]
    assert [(at[0].epoch, at[1]) for at in found if at] == [(8, 0), (5, 0), (0, 0), (9, 0), (3, 0)]
    assert positions[10] == ()
