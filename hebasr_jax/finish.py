"""What follows the last step: choose weights, score them, export, card, upload.

    members -> their mean beside each of them, on the dev sets -> the best, on the test sets
    -> final.json -> export/<layout>/ with its card -> the hub

Each part is kept once it is done, and all are made whole or not at all: a signal ends the process
at once, and the same command goes on with the part that was under way.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from hebasr_jax.average import Choice, compare, describe
from hebasr_jax.card import write_card
from hebasr_jax.data.clips import ClipSet
from hebasr_jax.data.sources import open_sources
from hebasr_jax.distributed import is_first, on_first, place_whole
from hebasr_jax.errors import UserError
from hebasr_jax.export import write_model
from hebasr_jax.members import best_members, member_weights
from hebasr_jax.run_config import Config, Source
from hebasr_jax.run_folder import read_json, write_json, write_text
from hebasr_jax.run_setup import Setup, open_quarantine
from hebasr_jax.running import Run
from hebasr_jax.sharding import replicated
from hebasr_jax.train_step import cast
from hebasr_jax.trained import load_trained
from hebasr_jax.upload import check_repo_id, upload_model
from hebasr_jax.validate import DevSet, load_dev_sets, validate

FINAL = "final.json"
REPOSITORY = "HF_REPO_ID"
_ALL = 1 << 40  # samples: every text is kept
_SAMPLES = 4  # of each set in final.json


def asked_for(config: Config) -> bool:
    """Whether a run has anything to do after its last step."""
    return bool(config.export.layouts or config.data.test or config.average.best > 1)


def repository(config: Config) -> str | None:
    """The hub repository that the model goes to; a bad id is refused, before training."""
    name = os.environ.get(REPOSITORY, "").strip()
    if not name or not config.export.upload or not config.export.layouts:
        return None
    check_repo_id(name)
    return name


def finish(run: Run) -> None:
    """All that the config asks for after the last step; what is there from before is kept."""
    config, folder = run.setup.config, run.folder
    run.stop.leave_at_once("what is done is kept, and the same command goes on")
    on_first(partial(_sweep, folder / "export"), "sweep")
    choice = choose(run)
    texts, test = score_whole(run, choice.params, config.data.test)
    facts = final_facts(run.setup, choice, test, run.setup.steps)
    if not is_first():
        return
    for name, rows in texts.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(folder / "eval" / "test" / name / "hypotheses.jsonl", lines)
    for name, scores in test.items():
        run.say(describe(f"test, {choice.name}, {name}", {name: scores}))
    done = read_json(folder / FINAL)
    if done.get("key") == facts["key"]:
        facts |= {name: done[name] for name in ("exports", "upload") if name in done}
    write_json(folder / FINAL, facts)
    export_all(run, choice, facts)
    publish(run, facts)


def choose(run: Run) -> Choice:
    """The best of the best checkpoints and their mean, on the whole dev sets.

    Without dev sets, or if they were never scored, the newest checkpoint.
    """
    setup, config, average = run.setup, run.setup.config, run.setup.config.average
    if not setup.dev_sets or not config.validation.every_steps:
        newest = run.store.steps()[-1]
        name = f"step {newest}"
        run.say(f"no dev set was scored: {name}, the last, is taken")
        return Choice(name, {name: 1.0}, load_trained(run.store.path(newest)), {}, [])
    members = best_members([run.folder], best=average.best, by=average.by, say=run.say)
    fixed = [s.fingerprint for s in setup.dev_sets]
    key = json.dumps([fixed, config.compute.dtype, config.text.language_in_prompt])
    run.say(f"on the whole dev sets: {', '.join(member.name for member in members)}")
    dev_sets: list[DevSet] = []

    def score(params: Any) -> Mapping[str, Any]:
        if not dev_sets:
            dev_sets.extend(_whole_sets(run, setup.dev_sets))
        return _without_texts(_score(run, params, dev_sets))

    choice = compare(
        members,
        member_weights(members, average.weights),
        lambda member: load_trained(member.checkpoint),
        score,
        soup=average.soup,
        kept=run.folder / "eval" / "candidates",
        key=key,
        say=run.say,
    )
    assert choice is not None  # a signal ends the process here
    return choice


def score_whole(
    run: Run, params: Any, sources: Sequence[Source]
) -> tuple[dict[str, list[dict[str, str]]], dict[str, Any]]:
    """Texts and scores of whole sets: {set: rows of id, reference, hypothesis}, {set: scores}."""
    if not sources:
        return {}, {}
    scores = _score(run, params, _whole_sets(run, open_sources(sources)))
    return {name: found["samples"] for name, found in scores.items()}, _without_texts(scores)


def final_facts(
    setup: Setup, choice: Choice, test: Mapping[str, Any], steps: int
) -> dict[str, Any]:
    """What final.json and the card tell; `key` names the weights and the settings of the export."""
    config = setup.config
    base = setup.source
    sources = {source.name: source for source in config.data.train}
    named = [steps, choice.weights, config.export.dtype, setup.tokenizer_sha256]
    return {
        "key": hashlib.sha256(json.dumps(named).encode()).hexdigest(),
        "step": steps,
        "chosen": choice.name,
        "members": choice.weights,
        "candidates": choice.table,
        "scores": {"dev": choice.scores, "test": dict(test)},
        "base_model": base.source if base.revision else Path(base.source).name,
        "base_revision": base.revision,
        "data": {
            s.name: {
                "path": sources[s.name].path,
                "hub": sources[s.name].hub,
                "revision": f"what was read has fingerprint {s.fingerprint[:16]}",
                "licence": sources[s.name].licence,
                "hours": sum(clip.duration_s for clip in s.clips) / 3600,
                "clips": len(s.clips),
            }
            for s in setup.sets
        },
    }


def export_all(run: Run, choice: Choice, facts: dict[str, Any]) -> None:
    """A model folder with its card for each layout; those of other weights are replaced."""
    setup, export = run.setup, run.setup.config.export
    for layout in export.layouts:
        folder = run.folder / "export" / layout
        if facts.get("exports", {}).get(layout) == facts["key"] and folder.is_dir():
            continue
        if folder.exists():
            shutil.rmtree(folder)
        write_model(
            choice.params,
            setup.model,
            setup.files,
            folder,
            layout,
            dtype=jax.numpy.dtype(export.dtype),
        )
        write_card(folder, run.folder, _for_the_card(facts) | {"layout": layout})
        facts["exports"] = facts.get("exports", {}) | {layout: facts["key"]}
        write_json(run.folder / FINAL, facts)
        run.say(f"exported {choice.name} to {folder}")


def publish(run: Run, facts: dict[str, Any]) -> None:
    """Uploads the first layout, if HF_REPO_ID names a place; what fails is told and recorded."""
    config = run.setup.config
    repo = repository(config)
    if repo is None or facts.get("upload", {}).get("repository") == repo:
        return
    layout = config.export.layouts[0]
    folder = run.folder / "export" / layout
    write_card(folder, run.folder, _for_the_card(facts) | {"layout": layout, "repo": repo})
    try:
        where = upload_model(folder, repo, private=config.export.private, say=run.say)
    except UserError as error:  # the run is whole without it
        run.say(f"not uploaded: {error}")
        run.say(f"the model is in {folder}; the same command tries the upload again")
        return
    facts["upload"] = {"repository": repo, "commit": where}
    write_json(run.folder / FINAL, facts)
    run.say(f"uploaded to {where}")


def _whole_sets(run: Run, sets: Sequence[ClipSet]) -> list[DevSet]:
    """Sets with all of their clips, ready to be scored."""
    setup, config = run.setup, run.setup.config
    whole = replace(config, validation=replace(config.validation, max_clips=None))
    quarantine = open_quarantine(sets, config, run.folder / "eval" / "quarantine.jsonl")
    return load_dev_sets(sets, setup.tokenizer, whole, quarantine, setup.mesh.size)


def _score(run: Run, params: Any, sets: Sequence[DevSet]) -> dict[str, Any]:
    """Scores of host weights on every device, with the texts of all clips."""
    setup = run.setup
    config = setup.config
    every = replace(config, validation=replace(config.validation, samples=_ALL))
    whole = replicated(setup.mesh)
    placed = jax.tree.map(lambda leaf: place_whole(leaf, whole), cast(params, setup.compute.dtype))
    scores = validate(
        placed,
        sets,
        setup.model,
        setup.tokenizer,
        every,
        compute=setup.compute,
        mesh=setup.mesh,
    )
    assert scores is not None
    return scores


def _for_the_card(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Without texts of clips: a set may be gated, and a card is public."""
    scores = {
        part: {name: {**row, "samples": []} for name, row in sets.items()}
        for part, sets in facts["scores"].items()
    }
    return {**facts, "scores": scores}


def _without_texts(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Scores with a few samples, spread over the set."""
    found = {}
    for name, row in scores.items():
        every = max(1, len(row["samples"]) // _SAMPLES)
        found[name] = {**row, "samples": row["samples"][::every][:_SAMPLES]}
    return found


def _sweep(exports: Path) -> None:
    """Removes what a signal left of an export that was under way."""
    for partial_folder in exports.glob(".*.partial-*"):
        shutil.rmtree(partial_folder, ignore_errors=True)
