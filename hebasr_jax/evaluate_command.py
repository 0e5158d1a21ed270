"""The command `evaluate`: its flags, and what it tells. Light to import: see `evaluate.py`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from hebasr_jax.errors import UserError

if TYPE_CHECKING:
    from hebasr_jax.data.clips import ClipSet
    from hebasr_jax.eval_sets import EvalSet
    from hebasr_jax.evaluate import Settings


@dataclass(frozen=True)
class Evaluate:
    """Word error rates on the six public Hebrew sets, or on data of one's own.

    Writes OUT/results.json, OUT/report.html, and for each set the texts (hypotheses.jsonl) and
    the clips that could not be read (missing.jsonl). The same command again does only what
    changed. A gated set without access is skipped; the exit code is 1 if another set failed, if
    over 1 % of a set's clips could not be read, or if nothing was evaluated.
    """

    model: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="MODEL")] = None
    """model folder in either layout, hub id, training run or checkpoint"""
    out: Path | None = None
    """folder for the results; of --compare, by default the first of the two"""
    sets: tuple[str, ...] = ()
    """eval-d1 eval-whatsapp saspeech fleurs common-voice kan; NAME=FOLDER is a copy of one, and
    NAME@COMMIT what its hub data set was then"""
    manifest: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="DATA")
    ] = ()
    """a JSONL manifest, parquet files or a prepared set; may be given again"""
    style: bool = True
    """bring hypotheses to the references' way of writing; the raw score stands beside"""
    control: str | None = None
    """also evaluate this faster-whisper model, such as ivrit-ai/whisper-large-v3-ct2, on the same
    pieces, and compare"""
    compare: tuple[Path, Path] | None = None
    """folders of two evaluations: paired tests on the sets that both have"""
    check_overlap: str | None = None
    """manifest of the training data: look for it in the sets"""
    piece_s: float = 30.0
    """longest piece that a recording is cut into, in seconds"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """by default bfloat16 on a GPU, else float32"""
    attention: Literal["auto", "cudnn", "xla"] = "auto"
    """attention kernel; one that cannot be had is an error"""
    beams: int = 1
    """hypotheses of a beam search; 1 takes the best token each time"""
    batch_audio_s: float | None = None
    """seconds of audio decoded together on each device; by default 240, and 4096 on a GPU"""
    revision: str | None = None
    """branch, tag or commit of a model on the hub"""
    max_clips: int | None = None
    """a trial on the first clips of each set; the results say so"""
    overwrite: bool = False
    """decode again what is there"""
    bootstrap: int = 1000
    """resamples of the confidence intervals"""

    def run(self) -> int:
        if self.compare and self.model is not None:
            do = f"hebasr evaluate {self.model} --out C ..., then hebasr evaluate --compare A C"
            raise UserError("--compare is of folders that are there, without a MODEL", do=do)
        if self.compare:
            return self._compare(*self.compare, self.out or self.compare[0])
        if self.model is None or self.out is None:
            do = "hebasr evaluate MODEL --sets eval-d1 --out DIR, or --compare A B"
            raise UserError("evaluate needs a MODEL and --out", do=do)
        for name in ("piece_s", "beams", "batch_audio_s", "max_clips", "bootstrap"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise UserError(f"--{name.replace('_', '-')} must be positive")
        from hebasr_jax.eval_sets import choose_sets

        return self._evaluate(self.model, self.out, choose_sets(self.sets, self.manifest))

    def _evaluate(self, model: str, out: Path, sets: "list[EvalSet]") -> int:
        from hebasr_jax.control import load_control
        from hebasr_jax.data.sources import open_source
        from hebasr_jax.evaluate import run_sets, system_of
        from hebasr_jax.program_cache import keep_programs
        from hebasr_jax.report_eval import write_evaluation_report
        from hebasr_jax.run_config import Source
        from hebasr_jax.transcribe import load_recognizer
        from hebasr_jax.writers import check_folder

        # What may fail comes before hours of decoding.
        check_folder(out)
        train = open_source(Source("train", self.check_overlap)) if self.check_overlap else None
        control = load_control(self.control) if self.control else None
        keep_programs()
        recognizer = load_recognizer(
            model, revision=self.revision, dtype=self.dtype, kernel=self.attention
        )
        _say(f"{model}: {recognizer.description}")
        system = system_of(recognizer, beams=self.beams, batch_audio_s=self.batch_audio_s)
        settings, again = self._settings(), self.overwrite
        results, failed = run_sets(system, sets, out, settings, overwrite=again, say=_say)
        done = [one for one in sets if one.name in results["sets"]]
        if train and done:
            self._check_overlap(train, done, out)
        if control and done:
            _say(f"control: {self.control}")
            beside = out / "control"
            _, lost = run_sets(control, done, beside, settings, overwrite=again, say=_say)
            failed += [f"control: {name}" for name in lost]
            try:
                self._compare(out, beside, out)
            except UserError as error:  # the texts are there, and their report is to be written
                _say(str(error))
                failed.append("control: comparison")
        _say(f"wrote {write_evaluation_report(out)}")
        if failed:
            _say(f"not all was evaluated: {', '.join(failed)}")
        return 1 if failed or not done else 0

    def _settings(self) -> "Settings":
        from hebasr_jax.evaluate import Settings
        from hebasr_jax.longform import Cutting

        cutting = Cutting(self.piece_s, search_s=self.piece_s / 3)
        return Settings(cutting, self.max_clips, self.style, self.bootstrap)

    def _compare(self, first: Path, second: Path, out: Path) -> int:
        from hebasr_jax.comparison import compare_folders, show
        from hebasr_jax.report_eval import write_evaluation_report
        from hebasr_jax.run_folder import write_json

        content = compare_folders(first, second, style=self.style, resamples=self.bootstrap, seed=0)
        write_json(out / "compare.json", content)
        show(content)
        if (out / "results.json").is_file():
            write_evaluation_report(out)
        return 0

    def _check_overlap(self, train: "ClipSet", sets: "list[EvalSet]", out: Path) -> None:
        from hebasr_jax.overlap import check_overlap, describe_overlap, write_overlap

        def tell(done: int, total: int) -> None:
            if done % max(1, total // 20) == 0 or done == total:
                _say(f"overlap: {done:,} of {total:,} clips heard")

        found = check_overlap(train, [one.open().clips for one in sets], progress=tell)
        for line in describe_overlap(found):
            _say(line)
        _say(f"wrote {write_overlap(out, found)}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
