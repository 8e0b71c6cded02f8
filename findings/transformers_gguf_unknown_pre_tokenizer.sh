#!/usr/bin/env bash
# Date:    2026-11-28
# Package: transformers 5.24.0 reading a GGUF vocabulary (gguf 0.19.0, tokenizers 0.23.3)
# Guess:   tokenizer.ggml.pre names the rule by which text is cut before the merges. A reader follows it, or refuses a name
#          that it does not know, as llama.cpp does ("unknown pre-tokenizer type").
# Seen:    transformers has a table of some two dozen names. Every other name, known to llama.cpp (deepseek-coder, deepseek-llm,
#          smollm, starcoder, ...) or invented, gets GPT-2's cut in silence. A vocabulary that was trained with
#          deepseek-coder's cut holds the token "tab + if"; the tokenizer read from the file can never produce it.
# Matters: ids differ from those the model was trained with (mostly in code, where lines begin with tabs), the text still
#          decodes to itself, and so nothing shows but a worse answer.
# Output:  trained ['\tif', ' x'], read from GGUF ['\t', 'if', ' x'], for the right name and for an invented one alike
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 gguf==0.19.0 tokenizers==0.23.3 accelerate==1.15.0 \
    numpy==2.4.6

cat > "$folder/demo.py" <<'PY'
import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import gguf
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

# deepseek-coder's cut, less its rule for Chinese: one white-space character belongs to the letters behind it.
PATTERNS = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"\p{N}"]
byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
trained = Tokenizer(models.BPE())
trained.pre_tokenizer = pre_tokenizers.Sequence(
    [*(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS), byte_level]
)
trained.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(
    vocab_size=300,
    initial_alphabet=byte_level.alphabet(),
    special_tokens=["<s>", "</s>"],
    show_progress=False,
)
trained.train_from_iterator(["\tif x", "\tif y x"] * 50, trainer)
described = json.loads(trained.to_str())["model"]
tokens = sorted(described["vocab"], key=described["vocab"].get)


def read(name):
    """Write the vocabulary into a GGUF file under the pre-tokenizer's `name`; read it with transformers."""
    folder = Path(tempfile.mkdtemp(dir=Path(__file__).parent))
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(pair) for pair in described["merges"]])
    writer.add_token_types([3 if token in ("<s>", "</s>") else 1 for token in tokens])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")


TEXT = "\tif x"
print(*(f"{name} {version(name)}" for name in ("transformers", "gguf", "tokenizers")))
right = trained.encode(TEXT, add_special_tokens=False).ids
print("expected (the tokenizer the file was made of):", [trained.decode([i]) for i in right])
for name in ("deepseek-coder", "no-such-name"):
    tokenizer = read(name)
    seen = tokenizer(TEXT, add_special_tokens=False).input_ids
    print(f"seen: tokenizer.ggml.pre = {name!r}:", [tokenizer.decode([i]) for i in seen])
    assert tokenizer.decode(seen) == TEXT
    assert [tokenizer.decode([i]) for i in seen] == ["\t", "if", " x"], "the behaviour has changed"
assert [trained.decode([i]) for i in right] == ["\tif", " x"]
PY
HF_HUB_OFFLINE=1 HF_HOME="$folder/hf" OMP_NUM_THREADS=1 "$folder/venv/bin/python" -W ignore "$folder/demo.py" \
    2> "$folder/said" || { cat "$folder/said"; exit 1; }
