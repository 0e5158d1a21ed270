"""`make demo-long`: the demo with more clips and more steps."""

from dataclasses import replace

from configs.demo import get_config as demo
from hebasr_jax.run_config import Config, Source


def get_config() -> Config:
    config = demo()
    return replace(
        config,
        name="demo-long",
        model=replace(config.model, path="runs/demo-long-files/model"),
        data=replace(
            config.data,
            train=(Source("words", "runs/demo-long-files/corpus/train.jsonl"),),
            dev=(Source("dev", "runs/demo-long-files/corpus/dev.jsonl"),),
            test=(Source("test", "runs/demo-long-files/corpus/test.jsonl"),),
        ),
        compute=replace(config.compute, cache_dir="runs/demo-long-files/cache"),
        train=replace(config.train, steps=3000, checkpoint_steps=250),
        validation=replace(config.validation, every_steps=500),
    )
