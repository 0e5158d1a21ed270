"""The same training in torch: transformers' own model class, torch's AdamW, the engine's batches.

A batch comes from the engine's plan and pipeline and its features from the engine's front end
(rung 1 proves that one); model, loss, gradients, clipping, optimiser and decoding are torch's.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen3ASRForConditionalGeneration

from hebasr_jax.data.clips import Batch
from hebasr_jax.data.pipeline import stream
from hebasr_jax.metrics import score
from hebasr_jax.model.encoder import audio_tokens
from hebasr_jax.optim import schedule
from hebasr_jax.run_config import Config
from hebasr_jax.run_setup import Setup, set_up
from hebasr_jax.text import PromptStyle, parse_output
from hebasr_jax.train_step import prepare_inputs
from hebasr_jax.transcribe import token_budget
from hebasr_jax.validate import DevSet, load_dev_sets

sys.path.insert(0, str(Path(__file__).parents[1]))
from reference import torch_inputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_PADDED_BOUND = 1e-4
Row = dict[str, torch.Tensor]


def train_in_torch(config: Config, deadline_s: float, *, reverse: bool = False) -> None:
    """Trains as the config says and writes metrics.jsonl as the engine does.

    Args:
      deadline_s: `time.time()` after which no step begins.
      reverse: take the rows of each batch in reverse order.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    folder = Path(config.runs_dir) / config.name
    folder.mkdir(parents=True)
    setup = set_up(config, folder / "model", folder / "quarantine.jsonl")
    [dev] = load_dev_sets(
        setup.dev_sets, setup.tokenizer, config, setup.quarantine, setup.mesh.size
    )
    feed = setup.parts[0].feed
    model = load_model(setup.source.path)
    optimizer = make_adamw(model, config)
    every = config.validation.every_steps
    with (folder / "metrics.jsonl").open("w") as log, stream(feed, epochs=1 << 30) as items:

        def tell(**line: Any) -> None:
            print(json.dumps({"time_s": time.time(), **line}), file=log, flush=True)

        for step, item in zip(range(setup.steps), items, strict=False):
            if time.time() > deadline_s:
                return
            audio_s = feed.buckets[item.bucket].audio_s
            rows = torch_rows(setup, item.data, audio_s)
            if reverse:
                rows = {name: x.flip(0) for name, x in rows.items()}
            if step == 0:
                error = padded_error(model, setup, item.data, audio_s)
                (folder / "padded_error.json").write_text(json.dumps(error))
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * float(schedule(step, setup.steps, config.optim))
            loss = batch_loss(model, rows)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
            optimizer.step()
            tell(kind="train", step=step + 1, loss=loss.item(), grad_norm=norm.item())
            if (step + 1) % every == 0 or step + 1 == setup.steps:
                scores = {dev.name: validate(model, dev, setup)}
                tell(kind="validation", step=step + 1, sets=scores)


def load_model(folder: Path) -> Qwen3ASRForConditionalGeneration:
    """The engine's initial weights in the reference class, strictly."""
    model, info = Qwen3ASRForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    faults = {name: info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(faults.values()):
        raise AssertionError(faults)
    return model.to(DEVICE).train()


def make_adamw(model: torch.nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW with the config's one rate, and weight decay on matrices only."""
    optim = config.optim
    parameters = list(model.parameters())
    groups = [
        {
            "params": [p for p in parameters if (p.ndim > 1) == matrices],
            "peak": config.stages[0].decoder.learning_rate,
            "weight_decay": optim.weight_decay if matrices else 0.0,
        }
        for matrices in (True, False)
    ]
    return torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), eps=optim.epsilon)


@partial(jax.jit, static_argnames=("augment", "audio_s"))
def _features(batch: Batch, *, augment: Any, audio_s: int) -> Any:
    inputs = prepare_inputs(batch, None, augment=augment, audio_s=audio_s, mel_bins=128)
    return inputs.mel_BTM, inputs.frames_B


def torch_rows(setup: Setup, batch: Batch, audio_s: int, *, prompts: bool = False) -> Row:
    """A batch as the reference class takes it: rows right-padded, the ones that only fill left out.

    Args:
      prompts: leave the targets out, for decoding.
    """
    mel_BTM, frames_B = _features(batch, augment=setup.config.augment, audio_s=audio_s)
    real_B = np.flatnonzero(batch.samples_B)
    frames_B = np.asarray(frames_B)[real_B]
    mel_BMT = torch.tensor(np.asarray(mel_BTM)[real_B]).transpose(1, 2)
    ids, labels = [], []
    for row, frames in zip(real_B, frames_B, strict=True):
        length, at = batch.text_lengths_B[row], batch.audio_at_B[row]
        text_X, in_loss_X = batch.text_BX[row, :length], batch.in_loss_BX[row, :length]
        if prompts:
            text_X, in_loss_X = text_X[~in_loss_X], in_loss_X[~in_loss_X]
        audio = np.full(audio_tokens(int(frames)), setup.model.audio_token_id)
        targets = np.where(in_loss_X, text_X, -100)
        ids.append(torch.tensor(np.concatenate([text_X[:at], audio, text_X[at:]])))
        labels.append(torch.tensor(np.concatenate([targets[:at], 0 * audio - 100, targets[at:]])))
    lengths_B1 = torch.tensor([[len(row)] for row in ids])
    ids_BL = pad_sequence(ids, batch_first=True)
    rows = {
        "input_ids": ids_BL,
        "attention_mask": torch.arange(ids_BL.shape[1]) < lengths_B1,
        "input_features": mel_BMT,
        "input_features_mask": torch.arange(mel_BMT.shape[2]) < torch.tensor(frames_B)[:, None],
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }
    return {
        name: x.to(DEVICE, torch.float32 if x.is_floating_point() else torch.long)
        for name, x in rows.items()
    }


def batch_loss(model: Qwen3ASRForConditionalGeneration, rows: Row) -> torch.Tensor:
    """Mean over the batch's target tokens, in nats."""
    inputs = {name: x for name, x in rows.items() if name != "labels"}
    logits_BLV = model(**inputs, use_cache=False).logits[:, :-1]
    return cross_entropy(logits_BLV.flatten(0, 1), rows["labels"][:, 1:].flatten())


def padded_error(model: Any, setup: Setup, batch: Batch, audio_s: int) -> float:
    """Relative difference of the padded batch's loss to that of its rows, each alone.

    Raises AssertionError above 1e-4: the comparison would then be with another model.
    """
    inputs = jax.jit(
        partial(prepare_inputs, augment=setup.config.augment, audio_s=audio_s, mel_bins=128)
    )(batch, None)
    total = 0.0
    with torch.no_grad():
        for row in np.flatnonzero(batch.samples_B):
            alone = torch_inputs(inputs, int(row), setup.model.audio_token_id)
            labels = torch.tensor(batch.text_BX[row][batch.in_loss_BX[row]]).long()
            logits = model(**{name: x.to(DEVICE) for name, x in alone.items()}).logits[0]
            before = logits[-len(labels) - 1 : -1]
            total += cross_entropy(before, labels.to(DEVICE), reduction="sum").item()
        padded = batch_loss(model, torch_rows(setup, batch, audio_s)).item()
    error = abs(padded / (total / batch.in_loss_BX.sum()) - 1)
    if not error <= _PADDED_BOUND:
        raise AssertionError(f"padded batches differ from single rows by {error}")
    return float(error)


@torch.no_grad()
def validate(model: Any, dev: DevSet, setup: Setup) -> dict[str, Any]:
    """Loss and scores of the dev set, as the engine's validation has them."""
    model.eval()
    tokenizer, style = setup.tokenizer, PromptStyle(setup.config.text.language)
    loss, count, texts = 0.0, 0, []
    for bucket, batch, clips in dev.batches:
        rows = torch_rows(setup, batch, bucket.audio_s)
        tokens = int((rows["labels"] >= 0).sum())
        loss, count = loss + batch_loss(model, rows).item() * tokens, count + tokens
        real_B = np.flatnonzero(batch.samples_B)
        budgets = [token_budget(int(batch.samples_B[row])) for row in real_B]
        prompts = torch_rows(setup, batch, bucket.audio_s, prompts=True)
        for row, ids in zip(
            real_B, greedy(model, prompts, budgets, tokenizer.special.eos), strict=True
        ):
            texts.append((clips[row], parse_output(tokenizer, style, ids).text))
    model.train()
    texts.sort(key=lambda pair: pair[0].id)
    pairs = [(clip.text, text) for clip, text in texts]
    scores = score(*zip(*pairs, strict=True), None, resamples=1000, seed=0)
    samples = [{"id": clip.id, "reference": clip.text, "hypothesis": text} for clip, text in texts]
    return {"loss": loss / count, **scores, "samples": samples}


def greedy(
    model: Any, prompts: Row, budgets: list[int], end_ids: tuple[int, ...]
) -> list[list[int]]:
    """Greedy continuations without a cache: every step runs the whole decoder again."""
    inner = model.model
    audio_AD = inner.get_audio_features(
        prompts["input_features"], prompts["input_features_mask"], return_dict=True
    ).pooler_output
    heard_BL = prompts["input_ids"] == model.config.audio_token_id
    embed = inner.get_input_embeddings()
    x_BLD = embed(prompts["input_ids"])
    x_BLD = x_BLD.masked_scatter(heard_BL[..., None].expand_as(x_BLD), audio_AD)
    x_BLD = torch.nn.functional.pad(x_BLD, (0, 0, 0, max(budgets)))
    length_B = prompts["attention_mask"].sum(1)
    budget_B = torch.tensor(budgets, device=DEVICE)
    ends = torch.tensor(end_ids, device=DEVICE)
    written: list[list[int]] = [[] for _ in budgets]
    row_R = torch.arange(len(budgets), device=DEVICE)  # rows that have not ended
    for step in range(max(budgets)):
        used = int(length_B[row_R].max())
        hidden_RLD = inner.language_model(
            inputs_embeds=x_BLD[row_R, :used],
            attention_mask=(torch.arange(used, device=DEVICE) < length_B[row_R, None]).long(),
            use_cache=False,
        ).last_hidden_state
        last_R = length_B[row_R] - 1
        logits_RV = model.lm_head(hidden_RLD[torch.arange(len(row_R), device=DEVICE), last_R])
        token_R = logits_RV.argmax(-1)
        going_R = ~torch.isin(token_R, ends) & (step < budget_B[row_R])
        row_R, token_R = row_R[going_R], token_R[going_R]
        if not len(row_R):
            break
        for row, token in zip(row_R.tolist(), token_R.tolist(), strict=True):
            written[row].append(token)
        x_BLD[row_R, length_B[row_R]] = embed(token_R)
        length_B[row_R] += 1
    return written
