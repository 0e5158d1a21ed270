"""What every model card says: how to use the model, how it was scored, what it is not for.

And how text and numbers from anywhere are written so that a card shows them as they are.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

TRANSFORMERS = """\
With transformers 5.13 or later. Its list of languages lacks Hebrew, so the prompt names it:

```python
import librosa
from transformers import AutoProcessor, Qwen3ASRForConditionalGeneration

processor = AutoProcessor.from_pretrained("{model}")
model = Qwen3ASRForConditionalGeneration.from_pretrained("{model}")
wave, _ = librosa.load("talk.wav", sr=16000)
[prompt] = processor.apply_transcription_request(wave, tokenize=False)
prompt += "language Hebrew<asr_text>"
inputs = processor(text=prompt, audio=wave, return_tensors="pt").to(model.device, model.dtype)
tokens = model.generate(**inputs, max_new_tokens=16 + 8 * len(wave) // 16000)
new_tokens = tokens[0, inputs["input_ids"].shape[1] :]
print(processor.tokenizer.decode(new_tokens, skip_special_tokens=True))
```
"""

ORIGINAL = """\
With qwen-asr 0.0.6. Its list of languages lacks Hebrew, so the prompt is built by hand:

```python
import librosa
from qwen_asr import Qwen3ASRModel

asr = Qwen3ASRModel.from_pretrained("{model}", attn_implementation="flash_attention_2")
wave, _ = librosa.load("talk.wav", sr=16000)
prompt = asr._build_text_prompt(context="", force_language="Hebrew")
inputs = asr.processor(text=[prompt], audio=[wave], return_tensors="pt", padding=True)
inputs = inputs.to(asr.model.device).to(asr.model.dtype)
tokens = asr.model.generate(**inputs, max_new_tokens=16 + 8 * len(wave) // 16000).sequences
new_tokens = tokens[0, inputs["input_ids"].shape[1] :]
print(asr.processor.tokenizer.decode(new_tokens, skip_special_tokens=True))
```

Without flash attention qwen-asr lets the encoder look at the whole clip at once, which this model
was not trained for: clips over 8 s then come out worse. vLLM reads this layout too
(`vllm serve {model}`), with its own prompt.
"""

HEBASR = """\
With hebasr_jax, which wrote this model, for files and folders of any common format:

```
hebasr transcribe {model} talk.wav
```
"""

SCORING = """\
Both sides are normalised by `normalize_ivrit`, what the benchmark of ivrit.ai compares: vowel
points, punctuation, symbols, bracketed text and case do not count. WER and CER are of the whole
set: all errors over all reference words or characters, not the mean of the clips' own rates. The
interval is a 95 % percentile bootstrap that draws whole recordings (or speakers) where they are
known, else clips. Decoding is greedy. `empty` counts clips with words whose hypothesis has none;
`left out` counts clips that could not be scored. Rates on a dev set are too good: it was used to
choose the weights.
"""

NOT_FOR = """\
- Surveillance, telling who speaks, or profiling people by their voice.
- Deepfakes or any imitation of a person. The licence of the ivrit.ai data forbids it.
- Decisions about people (work, credit, law, welfare, policing) that no human checks against the
  recording.
- Medical, legal or parliamentary records that nobody checks: names, numbers and negations can be
  wrong in fluent text.
- Languages other than Hebrew. They were not scored and may have become worse than in the base
  model.
- Recordings longer, noisier or of other kinds than those above, without a test of your own.
"""

LIMITS = """\
- The model writes fluent text also where it heard nothing or wrong: it can invent, repeat or leave
  out words, above all in silence, music, noise and overlapping speech.
- {stamps}
- {length}
- Speakers, accents and subjects that the training data lack are recognised less well; no score
  here tells by how much.
- Who may use the weights, and for what, also depends on the licences of the data.
"""


def known(value: Any) -> TypeGuard[float]:
    """Whether it is a number, and finite."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def clean(value: Any) -> str:
    """One line without control characters, marks that turn the direction, or half surrogates."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", " ", str(value))
    return text.strip()


def shown(value: Any) -> str:
    """Text in which nothing is Markdown, a table's bar or HTML."""
    special = r"[\\`*{}\[\]<>|&~$@#]|\b_+|_+\b"
    return re.sub(special, lambda m: "".join(f"&#{ord(c)};" for c in m[0]), clean(value))


def number(value: Any) -> str:
    """Whole numbers with separators, others to four digits, and a word for what is not known."""
    if not known(value):
        return "unknown"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def last_part(path: str) -> str:
    """Of a path or address what is behind the last slash, without a query."""
    return re.split(r"[/\\]", re.split("[?#]", path)[0].rstrip("/\\"))[-1]


def table_of(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; cells are safe already."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
