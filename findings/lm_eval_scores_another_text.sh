#!/usr/bin/env bash
# Date:    2026-11-28
# Package: lm_eval 0.4.13 (HFLM.loglikelihood), transformers 5.24.0, torch 2.13.0
# Guess:   loglikelihood(context, continuation) scores the text context + continuation, split at the border; whatever the
#          split, the scored ids decode to that text.
# Seen:    the harness tokenises the context alone and the whole text, and cuts the whole at the context's NUMBER of
#          ids. If a token runs over the border, the two do not fit together: ("un", "able to go") is scored as "un" + " to go".
#          The text "un to go", which nobody asked for, gets the score; a better or a worse continuation may win by it.
#          Where the border token ends the text, the continuation is empty and an AssertionError without a message ends the run.
# Matters: tasks with target_delimiter "" (cloze tasks, tasks in Chinese or Japanese, code) meet this at every word that
#          is cut. An engine whose log-likelihoods are right differs from the harness's own class.
# Output:  scored ids decode to 'un to go'; ("un", "able"): AssertionError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 lm_eval==0.4.13 accelerate==1.15.0 numpy==2.4.6

cat > "$folder/demo.py" <<'PY'
from importlib.metadata import version

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
trained = Tokenizer(models.BPE())
trained.pre_tokenizer, trained.decoder = byte_level, decoders.ByteLevel()
trainer = trainers.BpeTrainer(
    vocab_size=330,
    initial_alphabet=byte_level.alphabet(),
    special_tokens=["<s>", "</s>"],
    show_progress=False,
)
trained.train_from_iterator(["unable to go", "unable to see", "under the sun", "un do"] * 50, trainer)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, bos_token="<s>", eos_token="</s>", pad_token="</s>")
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=len(tokenizer),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    initializer_range=0.3,
)
model = LlamaForCausalLM(config).eval()
harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu")


def harness_score(context, continuation):
    request = Instance("loglikelihood", {}, (context, continuation), 0)
    return harness.loglikelihood([request], disable_tqdm=True)[0][0]


@torch.no_grad()
def own_score(before, after):
    """The sum of log-probabilities of the ids `after`, behind the ids `before`."""
    ids = torch.tensor([before + after])
    rows = model(ids).logits[0, len(before) - 1 : -1].log_softmax(-1)
    return sum(rows[i, token].item() for i, token in enumerate(after))


def ids(text):
    return tokenizer(text, add_special_tokens=False).input_ids


print(*(f"{name} {version(name)}" for name in ("lm_eval", "transformers", "torch")))
context, continuation = "un", "able to go"
seen = harness_score(context, continuation)
print("whole text's tokens:", tokenizer.convert_ids_to_tokens(ids(context + continuation)))
print(f"expected: the score of {continuation!r} behind {context!r}: {own_score(ids(context), ids(continuation)):.4f}")
print(f"seen: {seen:.4f}; the score of ' to go' behind 'un': {own_score(ids('un'), ids(' to go')):.4f}")
assert tokenizer.decode(ids("un") + ids(" to go")) == "un to go"
assert abs(seen - own_score(ids("un"), ids(" to go"))) < 1e-4, "the behaviour has changed"
assert abs(seen - own_score(ids(context), ids(continuation))) > 1e-2
try:
    harness_score("un", "able")
    ended = "a score"
except AssertionError as error:
    ended = f"AssertionError({error})"
print("seen: ('un', 'able'):", ended)
assert ended == "AssertionError()", "the behaviour has changed"
PY
HF_HUB_OFFLINE=1 HF_HOME="$folder/hf" XDG_CACHE_HOME="$folder/cache" OMP_NUM_THREADS=1 \
    "$folder/venv/bin/python" "$folder/demo.py" 2> "$folder/said" || { cat "$folder/said"; exit 1; }
