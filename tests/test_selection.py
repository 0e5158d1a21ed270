"""What is left out of a set on purpose: lists, a least quality, texts with nothing in them."""

from dataclasses import replace

import pytest
from hub_rows import FIRST, a_slice, write

from hebasr_jax.data.prepare_command import Prepare
from hebasr_jax.data.sources import describe, open_source
from hebasr_jax.errors import UserError
from hebasr_jax.run_config import Source
from hebasr_jax.timestamps import Segment


def test_lists_and_quality_leave_rows_out_with_reasons(tmp_path) -> None:
    rows = [a_slice(6.0 * n, FIRST, quality_score=q) for n, q in enumerate([0.9, 0.7, 0.2, None])]
    source = write(tmp_path / "set", "knesset-plenums", rows, seconds=6.0)
    (tmp_path / "w.jsonl").write_text('{"id": "s1@0.00", "reason": "is in eval-d1"}\n\n')
    (tmp_path / "o.jsonl").write_text('{"id": "s1@6.00"}\n{"id": "s1@0.00"}\n')
    chosen = open_source(replace(source, min_quality=0.7, without=(str(tmp_path / "w.jsonl"),)))
    assert [clip.id for clip in chosen.clips] == ["s1@6.00"]  # 0.7 is kept, as float32 too
    assert dict(chosen.removed) == {
        "s1@0.00": "is in eval-d1",
        "s1@12.00": "has a quality below 0.7",
        "s1@18.00": "has no quality score",
    }
    assert "3 left out: 1 x is in eval-d1" in describe(chosen)
    only = open_source(replace(source, only=str(tmp_path / "o.jsonl")))
    assert [clip.id for clip in only.clips] == ["s1@0.00", "s1@6.00"]
    with pytest.raises(UserError, match="no clip is left of its 4 rows"):
        open_source(replace(source, min_quality=0.99))
    (tmp_path / "w.jsonl").write_text('{"id": "s1@0.00"}\n{"name": "x"}\n')
    with pytest.raises(UserError, match=r"w\.jsonl:2: is no clip of a list"):
        open_source(replace(source, without=(str(tmp_path / "w.jsonl"),)))
    (tmp_path / "w.jsonl").write_text('{"id": "of another set"}\n')
    with pytest.raises(UserError, match="1 of its 1 ids are not in the set"):
        open_source(replace(source, without=(str(tmp_path / "w.jsonl"),)))
    (tmp_path / "w.jsonl").write_text('{"id": "of another set"}\n{"id": "s1@0.00"}\n')
    part = open_source(replace(source, without=(str(tmp_path / "w.jsonl"),)))
    assert "1 of 2 ids of" in part.notes[0]
    (tmp_path / "w.jsonl").write_text("")
    assert len(open_source(replace(source, without=(str(tmp_path / "w.jsonl"),))).clips) == 4
    with pytest.raises(UserError, match="cannot be read"):
        open_source(replace(source, only=str(tmp_path / "none.jsonl")))


def test_the_normaliser_keeps_words_of_segments_those_of_the_text(tmp_path) -> None:
    rows = [
        a_slice(0.0, "<|0.00|>שָׁלוֹם (רעש)<|2.00|><|2.00|>[צחוק]<|3.00|><|3.00|>צה״ל<|4.00|>"),
        a_slice(6.0, "<|0.00|>אחת (שתיים<|2.00|><|2.00|>שלוש) ארבע<|4.00|>", "<|0.00|>עָם<|1.00|>"),
        a_slice(12.0, "<|0.00|>(לא ברור)<|2.00|>"),
    ]
    source = write(tmp_path, "knesset-plenums", rows, seconds=6.0)
    clip_set = open_source(replace(source, normalizer="hebrew-v1"))
    first, spanned = clip_set.clips
    assert first.text == 'שלום צה"ל'
    assert first.segments == (Segment(0.0, 2.0, "שלום"), Segment(3.0, 4.0, 'צה"ל'))
    assert spanned.context == "עם"
    words = [word for part in spanned.segments for word in part.text.split()]
    assert words in ([], spanned.text.split())
    assert clip_set.removed == (("s1@12.00", "has no text left after hebrew-v1"),)
    assert open_source(source).clips[0].text.startswith("שָׁלוֹם")


def test_a_list_is_of_its_set_whether_shards_were_made_with_it_or_not(tmp_path) -> None:
    """One bad row does not let a list of another set pass."""
    rows = [a_slice(6.0 * n, FIRST) for n in range(4)]
    source = write(tmp_path / "set", "knesset-plenums", [*rows, rows[0]], seconds=6.0)
    ours, foreign = tmp_path / "ours.jsonl", tmp_path / "foreign.jsonl"
    ours.write_text('{"id": "s1@0.00", "reason": "noise"}\n{"id": "s1@6.00", "reason": "noise"}\n')
    foreign.write_text('{"id": "a", "reason": ""}\n{"id": "b", "reason": ""}\n')
    flags = {"source": source.path, "name": "k", "schema": source.schema, "max_bad_share": 0.5}
    assert Prepare(tmp_path / "out", **flags, without=(str(ours),)).run() == 0
    made = Source("k", str(tmp_path / "out" / "k"))
    for path in (source, made):
        assert len(open_source(replace(path, without=(str(ours),))).clips) == 2
        with pytest.raises(UserError, match="2 of its 2 ids are not in the set"):
            open_source(replace(path, without=(str(foreign),)))
    with pytest.raises(UserError, match="2 of its 2 ids"):
        open_source(replace(made, only=str(ours)))
