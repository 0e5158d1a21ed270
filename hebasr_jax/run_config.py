"""What a training run is told: frozen dataclasses, units in the field names.

A config is a Python file with `get_config() -> Config`; `config_file.py` loads it, overrides
single values, and knows where each value came from.
"""

from dataclasses import dataclass, field
from typing import Literal

from hebasr_jax.errors import UserError


@dataclass(frozen=True)
class Model:
    """Where the weights and the tokenizer come from."""

    path: str = "Qwen/Qwen3-ASR-1.7B"
    """model folder in either layout, or hub id"""
    revision: str | None = None
    """branch, tag or commit of a hub id"""


@dataclass(frozen=True)
class Text:
    """What the prompt gives and the target holds (`text.PromptStyle`)."""

    language: str = "Hebrew"
    """of clips whose manifest row names none"""
    language_in_prompt: bool = True
    """the language stands in the prompt; else the model writes it and it counts in the loss"""
    stamp_share: float = 0.0
    """share of all rows of the mix that are trained with time stamps, drawn each epoch: a row that
    can have them (`data/targets.py`) does so with this, divided by the share of such rows"""
    context_share: float = 0.0
    """share of all rows of the mix that are trained with a context, drawn likewise"""
    wrong_context_share: float = 0.0
    """share of those contexts that another recording's stands in for (none, where no other is
    found), so that the model does not write what it did not hear"""


@dataclass(frozen=True)
class Columns:
    """Names of parquet columns or manifest fields, where they are not the usual ones."""

    audio: str = "audio"
    text: str = "text"
    id: str = "id"
    duration_s: str = "duration_s"
    speaker: str = "speaker"
    recording: str = "recording"
    source: str = "source"
    language: str = "language"
    context: str = "context"
    segments: str = "segments"
    quality: str = "quality"


@dataclass(frozen=True)
class Source:
    """One data set."""

    name: str
    path: str
    """a JSONL manifest, a parquet file, a folder or glob of them, or shards by `prepare`"""
    share: float | None = None
    """share of the clips drawn in an epoch; None: in proportion to the set's size"""
    split: str | None = None
    """keep only rows whose `split` field says so"""
    hub: str | None = None
    """hub data set that `path` is a copy of: told in errors and in the model card"""
    licence: str | None = None
    """for the model card; None: that of the schema, if it states one"""
    columns: Columns = field(default_factory=Columns)
    schema: str = ""
    """known hub set that parquet files in `path` are a copy of (`data/adapters.py`); "": none"""
    normalizer: Literal["", "hebrew-v1"] = ""
    """what is done to texts, contexts and segments before training; "": nothing"""
    without: tuple[str, ...] = ()
    """JSONL files with `id` and `reason` in each line: clips left out, counted by reason"""
    only: str | None = None
    """JSONL file with an `id` in each line: all other clips are left out"""
    min_quality: float | None = None
    """clips with a lower quality score, or none, are left out; scores run from 0 to 1"""
    accept_licence: bool = False
    """use the schema's set although its licence is non-commercial or not stated"""


@dataclass(frozen=True)
class Data:
    """What is trained on and how it is batched."""

    train: tuple[Source, ...] = ()
    dev: tuple[Source, ...] = ()
    """scored while training; checkpoints are chosen by them"""
    test: tuple[Source, ...] = ()
    """scored once, with the weights that the run ends with"""
    min_clip_s: float = 0.1
    """shorter clips are left out, and counted"""
    max_clip_s: float = 30.0
    """longer clips are left out, and counted; also the longest bucket before speed perturbation"""
    max_text_tokens: int = 448
    """clips with longer prompt and target are left out, and counted"""
    buckets: int = 6
    """shapes to compile: few, chosen from the length histogram to minimise padding"""
    batch_clips: int | None = 64
    """rows in each optimiser step, whatever the number of devices; with `join_share` a row may be
    several clips"""
    batch_audio_s: float | None = None
    """instead of batch_clips: seconds of audio, padding included, in each optimiser step"""
    micro_audio_s: float = 960.0
    """seconds of padded audio on one device at a time; more than that is accumulated"""
    join_share: float = 0.0
    """share of the short clips that are joined with others of their set"""
    join_gap_s: float = 0.3
    """silence between joined clips"""
    max_repeats: float = 4.0
    """no set is drawn more often than this in an epoch, whatever its share asks for"""
    max_synthetic_share: float = 0.5
    """share of an epoch's clips that may be synthetic speech; a mix with more is refused"""
    temperature: float | None = None
    """sets without a share are drawn in proportion to size ** (1 / temperature); None: to size.
    Above 1 small sets gain: Arivazhagan et al. 2019, arXiv 1907.05019"""
    exhaust: bool = False
    """an epoch lasts until no set has an undrawn clip (`all_exhausted` of Hugging Face datasets),
    as far as max_repeats allows; else it draws as many clips as the sets have together"""
    max_bad_share: float = 0.01
    """share of clips that may be bad before the run stops"""
    threads: int = 8
    """threads that decode audio"""
    prefetch_batches: int = 4
    """batches decoded ahead"""


@dataclass(frozen=True)
class Augment:
    """Augmentation inside the step; evaluation never augments. All shares are of the clips."""

    speed_factors: tuple[float, ...] = (1.0,)
    """drawn with equal chance; 1.1 is 10 % faster and higher, as Kaldi's"""
    time_masks: int = 0
    time_mask_frames: int = 80
    """longest time mask, in mel frames"""
    time_mask_share: float = 0.2
    """longest time mask, as a share of the clip"""
    mel_masks: int = 0
    mel_mask_bins: int = 27
    """widest frequency mask, in mel bins"""
    noise_share: float = 0.0
    noise_path: str | None = None
    """folder of noise recordings; None: white and pink noise made in the step"""
    noise_snr_db: tuple[float, float] = (5.0, 30.0)
    gain_share: float = 0.0
    gain_db: tuple[float, float] = (-12.0, 6.0)
    band_share: float = 0.0
    band_hz: tuple[float, float] = (300.0, 3400.0)
    """pass band of the telephone-like filter"""


@dataclass(frozen=True)
class Computation:
    """How a step computes; results differ by rounding only."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    attention: Literal["auto", "cudnn", "xla"] = "auto"
    remat: Literal["none", "dots", "full"] = "dots"
    """what the backward pass recomputes: nothing, all but weight products and attention, layers"""
    unroll: bool = False
    """layers one behind the other instead of in a loop: 6 to 9 % faster on one H200, 11 % on four,
    three to four times as long to compile"""
    loss_rows: int | None = None
    """text positions whose logits exist at a time; None: all"""
    gather: Literal["step", "layer"] = "step"
    """sharded weights are gathered once a step, or layer by layer (less memory)"""
    devices: int | None = None
    """devices of the mesh; None: all there are"""
    cut_over: int | None = None
    """devices over which weights and moments are cut; None: all, which takes least memory. Fewer,
    such as those of one host: each group of so many holds a copy, 1: each device"""
    cache_dir: str | None = "~/.cache/hebasr/xla"
    """compiled programs are kept here; None: nowhere"""


@dataclass(frozen=True)
class Group:
    """Learning rate of a group of parameters; `GROUPS` in optim.py says which belong to it."""

    learning_rate: float = 0.0
    """peak; 0 freezes the group"""
    trained_layers: int | None = None
    """only so many last layers of the group's stack are trained; None: all"""
    layer_decay: float = 1.0
    """each layer's rate is this times the rate of the layer above it"""


@dataclass(frozen=True)
class Mix:
    """One data set's part in a stage."""

    set: str
    """its name in `data.train`"""
    share: float | None = None
    """share of the clips drawn in an epoch; None: in proportion to the set's size"""


@dataclass(frozen=True)
class Stage:
    """A stretch of the run: what is trained, at what rates, on what mix, for how long."""

    name: str = "train"
    epochs: int = 1
    steps: int | None = None
    """its length in steps; None: its epochs"""
    mix: tuple[Mix, ...] = ()
    """the sets it draws from, with their shares; (): those of `data.train`, with theirs"""
    new_schedule: bool = False
    """warm-up and cosine begin anew; else one cosine goes on from the stage before"""
    conv_stem: Group = Group(2e-5)
    encoder: Group = Group(2e-5)
    projector: Group = Group(2e-5)
    embedding: Group = Group(2e-5)
    decoder: Group = Group(2e-5)


@dataclass(frozen=True)
class Optim:
    """Optimiser and schedule; the rates are those of the stages."""

    matrices: Literal["adamw", "muon"] = "adamw"
    """optimiser of the layers' matrices; everything else is AdamW's"""
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-8
    moments: Literal["float32", "bfloat16"] = "float32"
    """as which moments are kept between steps; bfloat16 saves 4 bytes of each trained parameter"""
    weight_decay: float = 0.01
    """of matrices only"""
    clip_norm: float = 1.0
    """global gradient norm above which gradients are scaled down"""
    warmup_steps: int = 500
    """updates until a tensor has its full rate, from the first that it gets"""
    final_rate: float = 0.1
    """the cosine ends at this share of the peak"""
    decay: Literal["cosine", "linear", "none"] = "cosine"


@dataclass(frozen=True)
class Train:
    """How long, and what is kept."""

    steps: int | None = None
    """all stages together in so many steps, in proportion to their own lengths"""
    checkpoint_steps: int = 500
    keep_last: int = 2
    keep_best: int = 3
    """checkpoints kept by validation WER, and as many by validation loss"""
    max_skipped_steps: int = 5
    """stop after so many steps in a row without a finite gradient"""
    log_steps: int = 10


@dataclass(frozen=True)
class Validation:
    """Loss and WER on the dev sets; never augmented, always without time stamps."""

    every_steps: int = 500
    """also before step 1 and after the last; 0: never"""
    max_clips: int | None = 500
    """first clips of each dev set; None: all"""
    batch_audio_s: float = 480.0
    samples: int = 8
    """pairs of reference and hypothesis kept for the report"""
    bootstrap: int = 1000
    """resamples of the confidence interval"""


@dataclass(frozen=True)
class Average:
    """Which weights a run ends with: a mean of its best checkpoints, or the best of them."""

    best: int = 1
    """checkpoints whose mean is compared with each of them on the dev sets; 1: the best alone"""
    by: Literal["wer", "loss"] = "wer"
    weights: Literal["uniform", "softmax"] = "uniform"
    """softmax: of minus the validation loss"""
    soup: bool = False
    """also a greedy soup: a member stays only if dev WER does not rise"""


@dataclass(frozen=True)
class Export:
    """Model folders written at the end, in `export/` of the run, and their upload."""

    layouts: tuple[Literal["original", "transformers"], ...] = ()
    """original (qwen-asr, vLLM) and transformers; (): none"""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    upload: bool = True
    """the first layout goes to the hub if HF_REPO_ID names a model there"""
    private: bool = True


@dataclass(frozen=True)
class Tracking:
    """Copies of metrics.jsonl for trackers; none can stop or slow a run."""

    sinks: tuple[Literal["wandb", "trackio", "tensorboard"], ...] = ()
    """each is an extra of that name"""


@dataclass(frozen=True)
class Config:
    """A training run."""

    name: str = "run"
    """the run folder is `runs_dir`/`name`"""
    runs_dir: str = "runs"
    seed: int = 0
    model: Model = field(default_factory=Model)
    text: Text = field(default_factory=Text)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    compute: Computation = field(default_factory=Computation)
    optim: Optim = field(default_factory=Optim)
    stages: tuple[Stage, ...] = (Stage(),)
    train: Train = field(default_factory=Train)
    validation: Validation = field(default_factory=Validation)
    average: Average = field(default_factory=Average)
    export: Export = field(default_factory=Export)
    tracking: Tracking = field(default_factory=Tracking)

    def __post_init__(self) -> None:
        data = self.data
        if (data.batch_clips is None) == (data.batch_audio_s is None):
            raise UserError(
                "data.batch_clips and data.batch_audio_s: exactly one must be set",
                f"they are {data.batch_clips} and {data.batch_audio_s}",
                "set the other to None",
            )
