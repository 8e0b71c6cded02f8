#!/usr/bin/env bash
# Date:    2026-11-28
# Package: transformers 5.24.0 (LlamaTokenizer) reading a tokenizer.model of sentencepiece 0.2.3
# Guess:   a tokenizer.model holds its own rules (normaliser, dummy prefix, white space), and LlamaTokenizer, which reads
#          the file, gives sentencepiece's ids.
# Seen:    only the pieces and their merges are read. The normaliser (here nmt_nfkc, sentencepiece's own choice),
#          add_dummy_prefix = false and remove_extra_whitespaces are passed over without a word: full-width letters
#          become byte tokens, every text gets a space before it, and double spaces stay.
#          A space that the text does begin with is lost even where the file keeps white space.
# Matters: Llama models with a vocabulary of their own (many are trained with nmt_nfkc) get other ids than they were
#          trained on; two engines disagree by which of the two packages they load the same file with.
# Output:  four lines of sentencepiece's pieces beside LlamaTokenizer's, all different.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0 sentencepiece==0.2.3 protobuf==7.36.2

cat > "$folder/demo.py" <<'PY'
import json
import tempfile
from pathlib import Path

import sentencepiece
import transformers
from transformers import AutoTokenizer

CORPUS = ["hello my name is", "ABC 123 fi", "say hello to the name"] * 60


def trained(**rules):
    """Train a small vocabulary under `rules`; return it as sentencepiece and as transformers read it."""
    folder = Path(tempfile.mkdtemp(dir=Path(__file__).parent))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **rules,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    reader = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return reader, AutoTokenizer.from_pretrained(folder)


KEEP = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
CASES = {
    "normaliser nmt_nfkc": (trained(normalization_rule_name="nmt_nfkc"), "ＡＢＣ"),
    "remove_extra_whitespaces": (trained(normalization_rule_name="identity"), "hello  name"),
    "add_dummy_prefix = false": (trained(add_dummy_prefix=False, **KEEP), "hello"),
    "a space before the text": (trained(**KEEP), " hello"),
}
print("transformers", transformers.__version__, "sentencepiece", sentencepiece.__version__)
print("expected: the same pieces from both readers")
for rule, ((reader, tokenizer), text) in CASES.items():
    theirs = reader.encode(text)
    seen = tokenizer(text, add_special_tokens=False).input_ids
    print(f"{rule}, {text!r}")
    print("   sentencepiece ", reader.id_to_piece(theirs))
    print("   LlamaTokenizer", tokenizer.convert_ids_to_tokens(seen))
    # The two agree on plain text, so that it is the rule alone that differs.
    if rule != "add_dummy_prefix = false":
        assert reader.encode("say hello") == tokenizer("say hello", add_special_tokens=False).input_ids
    assert theirs != seen, "the behaviour has changed"
(_, tokenizer), _ = CASES["a space before the text"]
assert tokenizer(" hello").input_ids == tokenizer("hello").input_ids, "the behaviour has changed"
PY
HF_HUB_OFFLINE=1 HF_HOME="$folder/hf" "$folder/venv/bin/python" "$folder/demo.py"
