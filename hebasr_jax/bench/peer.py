"""The peer: transformers on the same work, in a process of its own. The only module with torch.

`python -m hebasr_jax.bench.peer train 1.7b 32 10` prints a JSON row for each way to run it.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3ASRConfig, Qwen3ASRForConditionalGeneration
from transformers.models.qwen3_asr import modeling_qwen3_asr

from hebasr_jax.bench import work
from hebasr_jax.config import CHUNK_TOKENS, ModelConfig

_WARM_UP = 3
_GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["train", "generate"])
    parser.add_argument("size", choices=list(work.SIZES))
    parser.add_argument("rows", type=int, nargs="+")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=work.TARGET_TOKENS)
    args = parser.parse_args()
    model = work.model_of(args.size)
    for row in measured(args, model):
        print(json.dumps(row), flush=True)


def measured(args: argparse.Namespace, model: ModelConfig) -> Iterator[dict[str, Any]]:
    """One row for each way and number of clips; what fails is told in its row."""
    ways = ["as shipped"]
    if args.what == "train" and torch.cuda.is_available():
        ways.append("tuned")
    for way in ways:
        for rows in args.rows:
            told: dict[str, Any] = {"peer": f"transformers, {way}", "clips": rows}
            try:
                if args.what == "train":
                    told |= trained(model, rows, args.steps, tuned=way == "tuned")
                else:
                    told |= generated(model, rows, args.tokens)
            except torch.OutOfMemoryError:
                told["failed"] = "out of memory"
            yield told


def trained(model: ModelConfig, rows: int, steps: int, *, tuned: bool) -> dict[str, Any]:
    """Forward, backward and AdamW on clips of 30 s; features are given, nothing is augmented."""
    net = random_model(model).train()
    if tuned:
        tune(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=device() == "cuda")
    batch = inputs(model, rows, work.TARGET_TOKENS)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -work.TARGET_TOKENS :] = batch["input_ids"][:, -work.TARGET_TOKENS :]
    losses = []

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = net(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())

    taken_s = timed(step, steps)
    return {
        "audio-s/s": rows * work.CLIP_S / taken_s,
        "ms": 1e3 * taken_s,
        "peak GiB": peak_gib(),
        "loss from": float(losses[0]),
        "loss to": float(losses[-1]),
    }


def generated(model: ModelConfig, rows: int, tokens: int) -> dict[str, Any]:
    """Greedy decoding of so many clips at once, each to `tokens` new tokens."""
    net = random_model(model).train(False)
    batch = inputs(model, rows, 0)

    def decode() -> None:
        with torch.inference_mode():
            out = net.generate(
                **batch, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens
            )
        if out.shape[1] != batch["input_ids"].shape[1] + tokens:
            raise AssertionError(f"{out.shape} is not the length that was asked for")

    taken_s = timed(decode, 1, warm_up=1)
    return {"audio-s/s": rows * work.CLIP_S / taken_s, "ms": 1e3 * taken_s, "peak GiB": peak_gib()}


def random_model(model: ModelConfig) -> Any:
    """Transformers' own class with random weights; bfloat16 on a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        work.write_model_files(model, Path(folder))
        config = Qwen3ASRConfig.from_pretrained(folder)
    config._attn_implementation = "sdpa"
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device() == "cuda" else torch.float32)
    try:
        with torch.device(device()):
            return Qwen3ASRForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)


def inputs(model: ModelConfig, rows: int, targets: int) -> dict[str, torch.Tensor]:
    """The fixed work as transformers takes it, and so many target tokens behind the prompt."""
    rng = np.random.default_rng(0)
    text = rng.integers(0, 200, (rows, work.PROMPT_TOKENS + targets))
    audio = np.full((rows, CHUNK_TOKENS * work.CLIP_S), model.audio_token_id)
    ids = np.concatenate([text[:, :9], audio, text[:, 9:]], axis=1)
    mel = rng.standard_normal((rows, model.encoder.mel_bins, 100 * work.CLIP_S), np.float32)
    found = {
        "input_ids": torch.tensor(ids),
        "input_features": torch.tensor(mel),
        "input_features_mask": torch.ones(rows, mel.shape[2], dtype=torch.long),
        "attention_mask": torch.ones(ids.shape, dtype=torch.long),
    }
    dtype = torch.bfloat16 if device() == "cuda" else torch.float32
    found["input_features"] = found["input_features"].to(dtype)
    return {name: tensor.to(device()) for name, tensor in found.items()}


def tune(net: Any) -> None:
    """One attention call for all windows of a batch, and compiled layers in both stacks."""
    modeling_qwen3_asr.Qwen3ASRAudioAttention.forward = _all_windows_at_once
    for module in net.modules():
        if type(module).__name__ in ("Qwen3ASRAudioEncoderLayer", "Qwen3DecoderLayer"):
            module.compile()


def _all_windows_at_once(
    self: Any, hidden_states: Any, cu_seqlens: Any, max_seqlen: Any = None, **settings: Any
) -> Any:
    from torch.nn.attention.varlen import varlen_attn

    shape = (hidden_states.shape[0], self.num_heads, self.head_dim)
    q, k, v = (
        layer(hidden_states).view(shape) for layer in (self.q_proj, self.k_proj, self.v_proj)
    )
    ends = cu_seqlens.to(torch.int32)
    longest = 8 * CHUNK_TOKENS
    out: Any = varlen_attn(q, k, v, ends, ends, longest, longest)
    return self.out_proj(out.flatten(1))


def timed(action: Callable[[], None], repeats: int, warm_up: int = _WARM_UP) -> float:
    """Mean seconds of a call."""
    for _ in range(warm_up):
        action()
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        action()
    synchronize()
    return (time.perf_counter() - start) / repeats


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    if device() == "cuda":
        torch.cuda.synchronize()


def peak_gib() -> float:
    """Most memory since the last call, which forgets it."""
    if device() == "cpu":
        return 0.0
    peak = torch.cuda.max_memory_allocated() / _GIB
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return peak


if __name__ == "__main__":
    main()
