"""The report holds the run's numbers and texts, and nothing that a transcript brings along runs."""

import json
import math
import re
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hebasr_jax.charts import Curve, Point, histogram, line_chart, scatter
from hebasr_jax.errors import UserError
from hebasr_jax.metrics import score
from hebasr_jax.report import write_report
from hebasr_jax.tracking import MetricsLog

VOID = {"meta", "line", "circle", "rect", "path", "polyline"}


class Page(HTMLParser):
    """Reads a page: its elements, the text of each class, and whether tags close in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str]]] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, list[str], str]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs) -> None:
        element = (tag, {name: value or "" for name, value in attrs})
        self.elements.append(element)
        if tag not in VOID or (tag != "meta" and not self.rawdata_ended_with_slash()):
            self.open.append(element)

    def rawdata_ended_with_slash(self) -> bool:
        return self.get_starttag_text().endswith("/>")

    def handle_startendtag(self, tag, attrs) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data) -> None:
        tag = self.open[-1][0] if self.open else ""
        classes = [attributes.get("class", "") for _, attributes in self.open]
        self.texts.append((tag, classes, data))

    @property
    def text(self) -> str:
        return "".join(data for tag, _, data in self.texts if tag != "style")

    def within(self, name: str) -> str:
        """All text below elements of a class."""
        return " ".join(data for _, classes, data in self.texts if name in classes)


def read(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


SAMPLES = [
    {"id": "a/1", "reference": "שלום, עולם גדול", "hypothesis": "שלום לעולם גדול ויפה"},
    {"id": "a/2", "reference": "one two three", "hypothesis": "one three"},
    {"id": "a/3", "reference": "", "hypothesis": ""},
]


def train(step: int, loss: float = 1.0, **more: object) -> dict[str, object]:
    rates = {"decoder": 1e-5 * step, "encoder": 2e-6}
    return {"kind": "train", "step": step, "steps": 400, "loss": loss, "rates": rates} | more


def validation(step: int, wers: dict[str, float], samples=()) -> dict[str, object]:
    sets = {
        name: {
            **{"wer": wer, "ci95": (wer * 0.8, wer * 1.25), "cer": wer / 2, "loss": wer * 3},
            **{"words": 1234, "clips": 56, "empty": 7, "samples": list(samples)},
            **{"substitutions": 81, "deletions": 82, "insertions": 83},
        }
        for name, wer in wers.items()
    }
    return {"kind": "validation", "step": step, "sets": sets}


def write_run(folder: Path, *lines: dict[str, object]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    log = MetricsLog(folder / "metrics.jsonl", None)
    for line in lines:
        log.append(line)
    return folder


FILES = {
    "metrics.jsonl": '{"kind": "train", "step": 7, "loss": 0.731}\n',
    "config.json": '{"seed": {"value": 4711, "origin": "--set"}}',
    "env.json": '{"packages": {"jax": "0.10.2"}, "devices": ["one", "two"]}',
    "plan.json": '[{"set": "crowd", "clips": 98765}]',
    "quarantine.jsonl": '{"set": "crowd", "id": "c9", "reason": "no sound"}\n',
}
SHOWN = ("0.731", "4711", "0.10.2", "98,765", "no sound")


@pytest.mark.parametrize("count", range(6))
def test_any_of_the_files_may_be_missing(tmp_path, count) -> None:
    for number, names in enumerate(combinations(FILES, count)):
        folder = tmp_path / f"{count}-{number}"
        folder.mkdir()
        for name in names:
            (folder / name).write_text(FILES[name])
        text = read(folder).text
        for name, shown in zip(FILES, SHOWN, strict=True):
            assert (shown in text) == (name in names), (shown, names)


@pytest.mark.parametrize("cut", [b"", b"{", b"\xff\xfe", b"null"])
def test_damaged_files_are_said_to_be_so(tmp_path, cut, capsys) -> None:
    for name in FILES:
        (tmp_path / name).write_bytes(cut)
    text = read(tmp_path).text
    assert text.count("missing or damaged") == 3
    assert "No step has been logged yet." in text


def test_the_headline_and_the_dev_table_have_the_numbers(tmp_path) -> None:
    run = write_run(
        tmp_path,
        validation(0, {"d1": 0.9, "ידיעות": 0.8}),
        train(10, 0.5, audio_s_per_s=2450.0, padding_audio=0.081, data_wait_share=0.004),
        validation(10, {"d1": 0.123, "ידיעות": 0.4}),
        train(20, 0.25, skipped=3, padding_audio=0.099, memory_bytes=3 * 2**30),
        validation(20, {"d1": 0.2, "ידיעות": 0.3}),
        validation(30, {"d1": 0.25, "ידיעות": 0.3}),
    )
    page = read(run)
    tiles = re.sub(r"\s+", " ", page.within("tile"))
    for told in (
        "steps 20 of 400",
        "best WER, d1 12.3 % [9.8, 15.4] step 10",
        "best WER, ידיעות 30.0 % [24.0, 37.5] step 20",
        "training loss 0.25",
        "2,450 s/s",
        "padding of audio, mean 9.0 %",
        "waiting for data, mean 0.4 %",
        "skipped steps 3",
    ):
        assert told in tiles
    table = re.sub(r"\s+", " ", page.within("wide"))
    assert "d1 first 0 90.0 % [72.0, 112.5] 45.0 % 2.7 1,234 81 82 83 56 7" in table
    assert "d1 best 10 12.3 % [9.8, 15.4] 6.2 % 0.369 1,234" in table
    assert "d1 last 30 25.0 %" in table
    assert "ידיעות best 20 30.0 %" in table
    assert "d1 20" not in table
    assert "3.0 GiB" in page.text


def test_the_best_is_never_an_undefined_one(tmp_path) -> None:
    page = read(write_run(tmp_path, validation(1, {"d": math.nan}), validation(2, {"d": 0.5})))
    assert "50.0 % [40.0, 62.5] step 2" in re.sub(r"\s+", " ", page.within("tile"))


def test_skipped_steps_are_marked_on_the_loss(tmp_path) -> None:
    page = read(write_run(tmp_path, train(1), {"kind": "skipped", "step": 2}, train(3)))
    assert sum(attributes.get("class") == "bad" for _, attributes in page.elements) == 1
    assert "training, step 2: not finite" in page.text


def test_clips_left_out_are_told_by_set_and_reason(tmp_path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"left_out": {"crowd": {"too short": 1234}}}))
    assert re.search(r"crowd\s+too short\s+1,234", read(tmp_path).within("wide"))


def test_bad_clips_are_counted_by_reason_with_the_first_as_an_example(tmp_path) -> None:
    faults = [("a", "silent", "x"), ("b", "cut", "y"), ("c", "cut", ""), ("d", "cut", "z")]
    rows = [{"set": "crowd", "id": i, "reason": r, "detail": d} for i, r, d in faults]
    (tmp_path / "quarantine.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"set": "c')
    page = read(tmp_path)
    table = re.sub(r"\s+", " ", page.within("wide"))
    assert table.endswith("crowd cut 3 b: y crowd silent 1 a: x")


def test_validations_of_other_dev_data_are_not_shown_beside_those_of_now(tmp_path) -> None:
    lines = [validation(step, {"d1": wer}) for step, wer in ((1, 0.111), (2, 0.666), (2, 0.555))]
    for line, data in zip(lines, ("old", "old", "new"), strict=True):
        line["scored_on"] = data
    text = write_report(write_run(tmp_path, *lines)).read_text(encoding="utf-8")
    assert "55.5" in text
    assert not re.search(r"11\.1|66\.6", text)


def test_undefined_numbers_are_said_to_be_so(tmp_path) -> None:
    told = score(["", ""], ["א", ""], resamples=9, seed=0)
    lines = [train(1, math.nan), {"kind": "validation", "step": 1, "sets": {"x": told}}]
    page = read(write_run(tmp_path, *lines))
    assert "training loss nan" in re.sub(r"\s+", " ", page.within("tile"))
    assert "undefined" in page.within("wide")
    assert "unknown" in page.within("wide")
    assert any("bad" in attributes.get("class", "") for _, attributes in page.elements)


def test_alignments_run_in_the_direction_of_their_script(tmp_path) -> None:
    old = [{"id": "old", "reference": "x", "hypothesis": "y"}]
    lines = [validation(4, {"d1": 0.5}, old), validation(5, {"d1": 0.5}, SAMPLES)]
    page = read(write_run(tmp_path, *lines, validation(6, {"d1": 1})))
    words = [a for tag, a in page.elements if a.get("class") == "words"]
    assert [attributes["dir"] for attributes in words] == ["rtl", "ltr", "ltr"]
    assert "After step 5." in page.text
    marks = "".join(data for tag, _, data in page.texts if tag == "i")
    assert sorted(marks) == sorted("≠+−")
    columns = [c for tag, a in page.elements if (c := a.get("class", "")) in OPERATIONS]
    assert columns[3:] == ["equal", "substitute", "equal", "insert", "equal", "delete", "equal"]
    assert "עולם לעולם" in re.sub(r"\s+", " ", page.within("substitute"))
    assert "ויפה" in page.within("insert")
    assert "two" in page.within("delete")
    assert "שלום, עולם גדול" in page.text
    assert "errors: 2, words: 3" in page.text
    tags = {
        name: tag for tag, classes, data in page.texts for name in ["ויפה", "two"] if data == name
    }
    assert tags == {"ויפה": "bdi", "two": "bdi"}


OPERATIONS = {"equal", "substitute", "delete", "insert"}
NASTY = st.text(st.sampled_from("<>&\"'/א b;=\u202e\u2028\x00{}%"), max_size=12)
NASTY = NASTY | st.sampled_from(["<script>alert(1)</script>", "</style><img src=x>", "<!--", "]]>"])


@settings(max_examples=40, deadline=None)
@given(NASTY, NASTY, NASTY)
def test_text_stays_text(tmp_path_factory, name, reference, other) -> None:
    folder = tmp_path_factory.mktemp("run")
    sample = {"id": other, "reference": reference, "hypothesis": f"{other} {reference}"}
    write_run(folder, train(1, rates={name: 1.0, other: 2.0}), validation(1, {name: 0.5}, [sample]))
    rows = {"set": name, "reason": reference, "id": other, "detail": name}
    (folder / "quarantine.jsonl").write_text(json.dumps(rows))
    (folder / "plan.json").write_text(json.dumps({name: [{other: reference}], "x" + other: name}))
    (folder / "env.json").write_text(json.dumps({name: {other: [reference]}}))
    (folder / "config.json").write_text(json.dumps({name: {"value": other, "origin": reference}}))
    page = read(folder)
    assert all(ALLOWED.fullmatch(tag) for tag, _ in page.elements)
    attributes = {name for _, found in page.elements for name in found}
    assert not {a for a in attributes if a.startswith("on") or a in ("src", "href", "style")}
    assert reference.replace("\0", "\ufffd") in page.text.replace("\0", "\ufffd")


ALLOWED = re.compile(
    "html|head|meta|title|style|body|main|section|h[123]|p|b|i|div|span|bdi|table|tr|th|td|del|ins|"
    "details|summary|figure|figcaption|svg|line|circle|rect|path|polyline|text"
)


def test_the_page_loads_nothing(tmp_path) -> None:
    run = write_run(tmp_path, train(1), train(2), validation(2, {"d": 0.5}, SAMPLES))
    page = write_report(run).read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import|<script|<link", page)
    assert "default-src 'none'" in page


def test_a_long_run_gives_a_small_page(tmp_path) -> None:
    lines = (json.dumps(train(step, 2.0 + step % 3)) for step in range(1, 20_000))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert write_report(tmp_path).stat().st_size < 100_000


def test_a_folder_that_is_not_there_or_full_is_a_users_error(tmp_path, monkeypatch) -> None:
    with pytest.raises(UserError, match="no run folder"):
        write_report(tmp_path / "absent")
    (tmp_path / "report.html").write_text("old")
    (tmp_path / "plan.json").write_text("[]")

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match="No space left"):
        write_report(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "report.html"]
    assert (tmp_path / "report.html").read_text() == "old"


# --- charts ----------------------------------------------------------------------------------

NUMBERS = st.floats(-1e6, 1e6) | st.sampled_from([0.0, math.nan, math.inf, 1e-12])
CURVES = st.lists(
    st.lists(st.tuples(st.integers(0, 10**6), NUMBERS), max_size=12, unique_by=lambda p: p[0]),
    max_size=3,
)


@settings(max_examples=200, deadline=None)
@given(CURVES, st.booleans())
def test_everything_drawn_lies_within_the_chart(curves, log) -> None:
    drawn = [Curve(f"c{i}", [Point(*p) for p in sorted(c)], i) for i, c in enumerate(curves)]
    chart = line_chart("t", drawn, log=log)
    assert bool(chart) == any(curves)
    if not chart:
        return
    page = Page(chart)
    finite = sum(math.isfinite(y) for curve in curves for _, y in curve)
    crosses = sum(a.get("class") == "bad" for _, a in page.elements)
    assert crosses == sum(map(len, curves)) - finite
    for x, y in pixels(page):
        assert 0 <= x <= 640
        assert 0 <= y <= 250
    assert sum(tag == "circle" for tag, _ in page.elements) == finite


def pixels(page: Page) -> list[tuple[float, float]]:
    lines = [a["points"] for tag, a in page.elements if tag == "polyline"]
    dots = [(a["cx"], a["cy"]) for tag, a in page.elements if tag == "circle"]
    pairs = [pair.split(",") for line in lines for pair in line.split()] + dots
    return [(float(x), float(y)) for x, y in pairs]


@pytest.mark.parametrize("log", [False, True])
def test_height_and_place_follow_the_numbers(log) -> None:
    points = [Point(x, y) for x, y in ((0, 1.0), (50, 10.0), (100, 100.0))]
    (x0, y0), (x1, y1), (x2, y2) = pixels(Page(line_chart("t", [Curve("c", points)], log=log)))[:3]
    assert x1 - x0 == x2 - x1 > 100
    assert (y0 - y1) / (y1 - y2) == pytest.approx(1.0 if log else 0.1, rel=0.03)


def test_intervals_span_their_bounds() -> None:
    points = [Point(0, 5.0, 0.0, 10.0), Point(10, 5.0)]
    page = Page(line_chart("t", [Curve("c", points)]))
    (found,) = [a for tag, a in page.elements if a.get("class") == "s0 range"]
    middle = (float(found["y1"]) + float(found["y2"])) / 2
    assert middle == pytest.approx(pixels(page)[0][1], abs=0.11)


def test_a_long_curve_keeps_its_peaks_its_ends_and_every_nan() -> None:
    points = [Point(x, float(x % 7)) for x in range(5000)]
    points[1234] = Point(1234, 90.0)
    points[2345] = Point(2345, -50.0)
    points[3456] = points[3457] = Point(3456, math.nan)
    page = Page(line_chart("t", [Curve("c", points)]))
    found = pixels(page)
    assert 200 < len(found) < 450
    assert sum(a.get("class") == "bad" for _, a in page.elements) == 2
    top, bottom = min(found, key=lambda p: p[1]), max(found, key=lambda p: p[1])
    left, right = 56, 612
    assert top[0] == pytest.approx(left + (right - left) * 1234 / 4999, abs=0.1)
    assert bottom[0] == pytest.approx(left + (right - left) * 2345 / 4999, abs=0.1)
    assert (found[0][0], found[-1][0]) == (left, right)


def test_a_histogram_has_a_bar_for_each_count() -> None:
    page = Page(histogram("t", [0, 1, 2, 4], [10, 20, 5], "s"))
    bars = [a for tag, a in page.elements if tag == "rect"]
    heights = [float(bar["height"]) for bar in bars]
    assert heights[1] / heights[0] == pytest.approx(2, rel=0.01)
    assert heights[1] / heights[2] == pytest.approx(4, rel=0.01)
    assert float(bars[2]["width"]) == pytest.approx(2 * float(bars[0]["width"]), rel=0.02)
    assert "2 to 4 s: 5" in page.text
    assert histogram("t", [0, 1], [0], "s") == ""


def test_each_dot_lies_where_its_numbers_say() -> None:
    points = [Point(1.0, 0.0), Point(10.0, 0.5), Point(100.0, 1.0)]
    page = Page(scatter("t", points, [(points[1], "<b>")], [], str, str))
    cloud = next(a["d"] for _, a in page.elements if a.get("class") == "s0 cloud")
    (x0, y0), (x1, y1), (x2, y2) = re.findall(r"M(\d+) (\d+)", cloud)
    assert abs(int(x1) - int(x0) - (int(x2) - int(x1))) <= 1  # logarithmic from a factor of 20 on
    assert int(y0) - int(y1) == pytest.approx(int(y1) - int(y2), abs=1)
    assert "<b>" in page.text
    assert scatter("t", [], [], [], str, str) == ""
