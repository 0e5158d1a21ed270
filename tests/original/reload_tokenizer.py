"""Print, as JSON, what the transformers of this environment makes of a tokenizer folder.

Runs in the environment of the original package: `reload_tokenizer.py FOLDER TEXT NAME...`.
"""

import json
import sys
from pathlib import Path

import transformers


def main(folder: Path, text: str, names: list[str]) -> None:
    if (folder / "vocab.json").exists():
        loaders = {
            loader: getattr(transformers, loader).from_pretrained(str(folder))
            for loader in ("AutoTokenizer", "Qwen2TokenizerFast", "Qwen2Tokenizer")
        }
    else:  # 4.57 cannot read the tokenizer_config.json of 5.x, with or without stamps
        file = str(folder / "tokenizer.json")
        loaders = {"tokenizer_file": transformers.PreTrainedTokenizerFast(tokenizer_file=file)}
    report = {
        loader: {
            "ids": tokenizer.convert_tokens_to_ids(names),
            "size": len(tokenizer),
            "text_ids": tokenizer(text)["input_ids"],
            "decoded": tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True),
        }
        for loader, tokenizer in loaders.items()
    }
    print(json.dumps({"version": transformers.__version__, "loaders": report}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
