"""`make demo`: a tiny model of the real classes learns synthetic Hebrew on a CPU."""

from hebasr_jax.run_config import (
    Average,
    Computation,
    Config,
    Data,
    Export,
    Group,
    Model,
    Optim,
    Source,
    Stage,
    Train,
    Validation,
)


def get_config() -> Config:
    every = Group(5e-3)
    return Config(
        name="demo",
        model=Model("runs/demo-files/model"),
        data=Data(
            train=(Source("words", "runs/demo-files/corpus/train.jsonl"),),
            dev=(Source("dev", "runs/demo-files/corpus/dev.jsonl"),),
            test=(Source("test", "runs/demo-files/corpus/test.jsonl"),),
            max_clip_s=2.0,
            buckets=2,
            batch_clips=16,
            threads=2,
        ),
        compute=Computation(dtype="float32", remat="none", cache_dir="runs/demo-files/cache"),
        optim=Optim(matrices="muon", weight_decay=0.2, warmup_steps=60, final_rate=0.02),
        stages=(
            Stage(conv_stem=every, encoder=every, projector=every, embedding=every, decoder=every),
        ),
        train=Train(steps=1000, checkpoint_steps=100, log_steps=20, keep_last=2, keep_best=2),
        validation=Validation(every_steps=200, batch_audio_s=96.0),
        average=Average(best=2),
        export=Export(layouts=("original", "transformers"), dtype="float32", upload=False),
    )
