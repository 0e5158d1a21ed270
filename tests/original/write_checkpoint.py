"""Write a tiny random checkpoint by the original classes; runs in the original environment."""

from pathlib import Path

import torch
from qwen_asr.core.transformers_backend import (
    Qwen3ASRConfig,
    Qwen3ASRForConditionalGeneration,
    Qwen3ASRProcessor,
)


def write_checkpoint(folder: Path, tokenizer_folder: Path) -> None:
    """Weights, config, tokenizer and front end, each as its own class saves it."""
    processor = Qwen3ASRProcessor.from_pretrained(tokenizer_folder)
    model = Qwen3ASRForConditionalGeneration(tiny_config(processor.tokenizer))
    randomize(model).save_pretrained(folder)
    processor.save_pretrained(folder)


def tiny_config(tokenizer) -> Qwen3ASRConfig:
    """Sizes that no default has; of the rest what the released 1.7B model says."""
    audio = {
        "num_mel_bins": 128,
        "downsample_hidden_size": 24,
        "d_model": 40,
        "encoder_layers": 3,
        "encoder_attention_heads": 5,
        "encoder_ffn_dim": 72,
        "n_window": 50,
        "n_window_infer": 800,
        "output_dim": 48,
    }
    text = {
        "vocab_size": 400,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 88,
        "max_position_embeddings": 4096,
        "rope_theta": 1000000,
        "rope_scaling": {
            "interleaved": True,
            "mrope_interleaved": True,
            "mrope_section": [4, 2, 2],
            "rope_type": "default",
            "type": "default",
        },
        "tie_word_embeddings": True,
    }
    return Qwen3ASRConfig(
        thinker_config={
            "audio_config": audio,
            "text_config": text,
            "audio_token_id": tokenizer.convert_tokens_to_ids("<|audio_pad|>"),
            "audio_start_token_id": tokenizer.convert_tokens_to_ids("<|audio_start|>"),
            "audio_end_token_id": tokenizer.convert_tokens_to_ids("<|audio_end|>"),
        },
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter random, norms and biases too, as tests/reference.py does it.

    Larger query norms make attention choose, so that greedy ids differ from step to step.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                scale = "weight" in name and ("norm" in name or "ln_post" in name)
                parameter.copy_(float(scale) + 0.3 * noise)
                parameter.mul_(5.0 if "q_norm" in name else 1.0)
            else:
                parameter.copy_(noise * 1.5 / parameter[0].numel() ** 0.5)
    return model
