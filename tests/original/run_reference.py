"""Run qwen-asr on model folders and save what it makes of them.

Runs in the environment of the original package: `run_reference.py FOLDER`, which holds job.json:

    write      optional: [model folder to write first, folder of its tokenizer]
    models     model folders; the answer on each is NAME.npz beside job.json
    waves      npz of clips at 16 kHz
    prompts    [context, language or null] each
    encode     tokenizer folders; report.json has their ids of `texts` and of `prompts`
    texts
    new_tokens budget of greedy decoding
"""

import contextlib
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from qwen_asr import Qwen3ASRModel
from qwen_asr.core.transformers_backend import Qwen3ASRProcessor
from transformers import AutoModel
from write_checkpoint import write_checkpoint


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    if "write" in job:
        write_checkpoint(*map(Path, job["write"]))
    report = {"version": transformers.__version__, "models": {}, "encode": {}}
    waves = np.load(job["waves"], allow_pickle=False)
    for model in map(Path, job["models"]):
        report["models"][model.name], arrays = run_model(model, waves, job)
        np.savez(folder / f"{model.name}.npz", **arrays)
    for source in map(Path, job["encode"]):
        # As Qwen3ASRModel.from_pretrained does it, flag included.
        processor = Qwen3ASRProcessor.from_pretrained(source, fix_mistral_regex=True)
        asr = Qwen3ASRModel("transformers", torch.nn.Linear(1, 1), processor)
        report["encode"][source.name] = {
            "texts": [processor.tokenizer(text)["input_ids"] for text in job["texts"]],
            "prompts": [
                processor.tokenizer(asr._build_text_prompt(*prompt))["input_ids"]
                for prompt in job["prompts"]
            ],
        }
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


@torch.no_grad()
def run_model(folder: Path, waves, job: dict) -> tuple[dict, dict[str, np.ndarray]]:
    """What loading said; every tensor, and for each clip what each stage gives."""
    _, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    asr = Qwen3ASRModel.from_pretrained(str(folder), max_new_tokens=job["new_tokens"])
    tokenizer = asr.processor.tokenizer
    ends = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    # Its default is the ids of the released tokenizer, which a tiny one does not have.
    asr.model.generate = functools.partial(asr.model.generate, eos_token_id=ends, pad_token_id=0)
    arrays = {f"state/{key}": value.numpy() for key, value in asr.model.state_dict().items()}
    for name, wave in waves.items():
        found = run_clip(asr, wave, job["new_tokens"], ends)
        arrays |= {f"{name}/{stage}": array for stage, array in found.items()}
    first = next(iter(waves.values()))
    for i, prompt in enumerate(job["prompts"]):
        text = asr._build_text_prompt(*prompt)
        arrays[f"prompt/{i}"] = asr.processor(text=[text], audio=[first])["input_ids"][0]
    report = {key: [str(name) for name in found] for key, found in info.items()}
    report["texts"] = [
        asr.transcribe((wave, 16000), language="English")[0].text for wave in waves.values()
    ]
    return report, arrays


def run_clip(
    asr: Qwen3ASRModel, wave: np.ndarray, new_tokens: int, ends: list[int]
) -> dict[str, np.ndarray]:
    """Features, prompt ids, encoder output, logits and greedy ids of one clip, Hebrew forced.

    `audio` is the encoder's output as qwen-asr gives it without flash attention, over the whole
    clip; all that follows has the 8-second windows, as with flash attention and vLLM.
    """
    prompt = asr._build_text_prompt(context="", force_language="Hebrew")
    inputs = asr.processor(text=[prompt], audio=[wave], return_tensors="pt", padding=True)
    features = inputs["input_features"], inputs["feature_attention_mask"]
    thinker = asr.model.thinker
    audio = thinker.get_audio_features(*features)
    with windows(thinker.audio_tower):
        windowed = thinker.get_audio_features(*features)
        logits = thinker(**inputs).logits[0]
        generated = asr.model.generate(**inputs, max_new_tokens=new_tokens)
    tokens = generated.sequences[0, inputs["input_ids"].shape[1] :]
    return {
        "features": features[0][0].T[features[1][0].bool()].numpy(),
        "ids": inputs["input_ids"][0].numpy(),
        "audio": audio.numpy(),
        "windowed": windowed.numpy(),
        "logits": logits.numpy(),
        "tokens": tokens[~torch.isin(tokens, torch.tensor(ends))].numpy(),
    }


@contextlib.contextmanager
def windows(tower: torch.nn.Module) -> Iterator[None]:
    """Gives the encoder's layers the mask that its own builder makes and nothing ever calls."""

    def add_mask(layer, args, kwargs):
        return args, {**kwargs, "attention_mask": tower._prepare_attention_mask(*args)}

    hooks = [layer.register_forward_pre_hook(add_mask, with_kwargs=True) for layer in tower.layers]
    yield
    for hook in hooks:
        hook.remove()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
