#!/usr/bin/env bash
# Date:    2026-11-28
# Package: xgrammar 0.2.9, beside llguidance 1.9.1 and jsonschema 4.26.0
# Guess:   a grammar made of a JSON schema may be wider than the schema (a keyword that it cannot express), never the reverse
#          of it; what is not supported is refused or at least warned of.
# Seen:    two ordinary forms of schema give a grammar that refuses the valid document and accepts an invalid one, without
#          a warning: (1) `properties` and `required` beside an `anyOf` are dropped, and each branch is closed;
#          (2) a name in `required` that `properties` does not list is dropped, and its key cannot be written either.
#          strict_mode=False mends the second half of (2) and nothing of (1).
#          llguidance agrees with jsonschema on all of them.
# Matters: form (1) is how "this, and one of those" is written; form (2) is how a key of any value is asked for. The server
#          promises structured output, and then every answer fails the client's validation.
# Output:  xgrammar accepts exactly the two invalid documents and refuses the two valid ones.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 xgrammar==0.2.9 llguidance==1.9.1 jsonschema==4.26.0 \
    transformers==5.24.0 tokenizers==0.23.3 numpy==2.4.6

cat > "$folder/demo.py" <<'PY'
import json
from importlib.metadata import version

import jsonschema
import llguidance.hf
import xgrammar
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
vocabulary = {"<s>": 0, "</s>": 1} | {letter: i + 2 for i, letter in enumerate(sorted(byte_level.alphabet()))}
letters = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
letters.pre_tokenizer, letters.decoder = byte_level, decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<s>", eos_token="</s>")
compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=len(tokenizer)))
ll_tokenizer = llguidance.hf.from_tokenizer(tokenizer)


def by_xgrammar(schema, text):
    matcher = xgrammar.GrammarMatcher(compiler.compile_json_schema(json.dumps(schema)))
    return matcher.accept_string(text) and matcher.accept_token(tokenizer.eos_token_id)


def by_llguidance(schema, text):
    matcher = llguidance.LLMatcher(ll_tokenizer, llguidance.LLMatcher.grammar_from_json_schema(schema))
    assert not matcher.is_error(), matcher.get_error()
    return matcher.consume_tokens(tokenizer.encode(text, add_special_tokens=False)) and matcher.is_accepting()


def by_jsonschema(schema, text):
    return jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))


def one_of_the_keys(name):
    return {"properties": {name: {"type": "integer"}}, "required": [name]}


BESIDE_ANY_OF = {"type": "object", **one_of_the_keys("k"), "anyOf": [one_of_the_keys("a"), one_of_the_keys("b")]}
REQUIRED_ELSEWHERE = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a", "b"]}
CASES = [
    ("beside anyOf", BESIDE_ANY_OF, '{"k": 1, "a": 2}', True),
    ("beside anyOf", BESIDE_ANY_OF, '{"a": 2}', False),
    ("required elsewhere", REQUIRED_ELSEWHERE, '{"a": 1, "b": 2}', True),
    ("required elsewhere", REQUIRED_ELSEWHERE, '{"a": 1}', False),
]
print(*(f"{name} {version(name)}" for name in ("xgrammar", "llguidance", "jsonschema")))
for name, schema, text, valid in CASES:
    seen = bool(by_xgrammar(schema, text))
    print(f"{name}: {text} expected (jsonschema, llguidance) {valid}, seen (xgrammar) {seen}")
    assert by_jsonschema(schema, text) == valid == bool(by_llguidance(schema, text))
    assert seen != valid, "the behaviour has changed"
PY
HF_HUB_OFFLINE=1 HF_HOME="$folder/hf" OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/demo.py"
