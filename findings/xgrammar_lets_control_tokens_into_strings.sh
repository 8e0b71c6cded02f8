#!/usr/bin/env bash
# Date:    2026-11-28
# Package: xgrammar 0.2.9, beside llguidance 1.9.1
# Guess:   TokenizerInfo.from_huggingface knows which tokens are special (the tokenizer says so), and a grammar of text never
#          allows one of them; only the stop tokens come, at the end.
# Seen:    inside a JSON string the mask allows every control token but EOS, since its name is spelt in letters that a
#          string may hold: BOS, a header token, and <|eot|>. special_token_ids is empty. llguidance masks all of them.
# Matters: a chat model likes to say <|eot|> when it wants to stop. The token is let into the middle of the document: the
#          engine either stops there, with half a document, or shows the text "<|eot|>" as data in a valid one.
# Output:  xgrammar allows ['<s>', '<|header|>', '<|eot|>'] behind '"a'; llguidance none of them
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 xgrammar==0.2.9 llguidance==1.9.1 transformers==5.24.0 \
    tokenizers==0.23.3 numpy==2.4.6

cat > "$folder/demo.py" <<'PY'
import json
from importlib.metadata import version

import llguidance.hf
import xgrammar
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
vocabulary = {"<s>": 0, "</s>": 1} | {letter: i + 2 for i, letter in enumerate(sorted(byte_level.alphabet()))}
letters = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
letters.pre_tokenizer, letters.decoder = byte_level, decoders.ByteLevel()
letters.add_special_tokens(["<s>", "</s>", "<|header|>", "<|eot|>"])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<s>", eos_token="</s>")
special = [token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special]
schema, start = {"type": "string"}, '"a'


def names(allowed):
    return [tokenizer.convert_ids_to_tokens(token) for token in special if allowed(token)]


info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=len(tokenizer))
matcher = xgrammar.GrammarMatcher(xgrammar.GrammarCompiler(info).compile_json_schema(json.dumps(schema)))
assert matcher.accept_string(start)
mask = xgrammar.allocate_token_bitmask(1, info.vocab_size)
matcher.fill_next_token_bitmask(mask)
by_xgrammar = names(lambda token: mask[0, token // 32].item() >> (token % 32) & 1)

witness = llguidance.LLMatcher(
    llguidance.hf.from_tokenizer(tokenizer), llguidance.LLMatcher.grammar_from_json_schema(schema)
)
assert witness.consume_tokens(tokenizer.encode(start, add_special_tokens=False))
bias = witness.compute_logit_bias()
by_llguidance = names(lambda token: bias[token])

print(*(f"{name} {version(name)}" for name in ("xgrammar", "llguidance", "transformers")))
print("the tokenizer's special tokens:", names(lambda token: True), "xgrammar's stop tokens:", info.stop_token_ids)
print(f"expected: none of them may follow {start!r}")
print("seen: llguidance allows", by_llguidance)
print("seen: xgrammar allows  ", by_xgrammar)
assert by_llguidance == []
assert by_xgrammar == ["<s>", "<|header|>", "<|eot|>"], "the behaviour has changed"
PY
HF_HUB_OFFLINE=1 HF_HOME="$folder/hf" OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/demo.py"
