#!/usr/bin/env bash
# Date:    2026-11-28
# Package: tokenizers 0.23.3 (byte-level BPE, as in Llama 3)
# Guess:   an added token's text is plain text: decode(encode(text)) gives it back, as it does for every other text.
# Seen:    the byte-level decoder takes an added token for byte symbols whenever all its characters happen to be symbols of
#          that alphabet. Latin letters with accents are (e with acute stands for the byte E9), so "<café>" decodes to
#          "<caf" + U+FFFD + ">". An added token with one character outside the alphabet comes back whole.
# Matters: control tokens and tags in French, German or Spanish are damaged in the answer that a server shows, while
#          Chinese ones are right; a stop string with such a tag never matches the decoded text.
# Output:  '<café>' comes back as '<caf\ufffd>', '<Größe>' as '<Gr\ufffd\ufffde>', '<漢字>' whole.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q tokenizers==0.23.3

cat > "$folder/demo.py" <<'PY'
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, decoders.ByteLevel()
trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=byte_level.alphabet(), show_progress=False)
tokenizer.train_from_iterator(["hello world"] * 5, trainer)


def round_trip(text):
    return tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False)


TAGS = ("<café>", "<Größe>", "<漢字>")
print("tokenizers", tokenizers.__version__)
assert [round_trip(tag) for tag in TAGS] == list(TAGS)  # as ordinary text each comes back
tokenizer.add_tokens(list(TAGS))
seen = [round_trip(tag) for tag in TAGS]
for tag, back in zip(TAGS, seen, strict=True):
    print(f"added token {tag!r}: expected {tag!r}, seen {back!r}")
assert seen == ["<caf\ufffd>", "<Gr\ufffd\ufffde>", "<漢字>"], "the behaviour has changed"
PY
"$folder/venv/bin/python" "$folder/demo.py"
