"""The library's face on trial: what people call, on a model whose answers are known beforehand (oracle.subjects.walkers).

`Llama.generate`, `stream` and `score`, `Chat`, end ids, stop strings, log-probabilities and penalties stand between the loop and
whoever asks. Each question counts the events that it rests on (rows that ended, tokens that a penalty moved, tokens a cache held
already) and is EMPTY where there were none: a question in which nothing happened has seen nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llama_fast.build import build
from llama_fast.chat import Chat
from llama_fast.engine.sampling import Sampling
from llama_fast.llama import Llama
from llama_fast.plan import Plan
from oracle.questions.edits import adjusted_tokens, allowed_tokens
from oracle.questions.pages import with_short_pages
from oracle.questions.survival import survived
from oracle.questions.tally import Tally
from oracle.statistics.compare import Verdict
from oracle.subjects.adapters import RefSubject, Weights
from oracle.subjects.walkers import MARKERS, Letters, walk, walker

PROMPTS = ("A:xyz", "the marker is B, as here", "C", "some words before D.")
"""One for each marker, of unequal lengths; the third is as short as a text can be."""
LONG, SHORT = 40, 7
PENALTY, COOL = 1.3, 0.6
EXACT = 2e-4
"""Of log-probabilities: float32 logits up to 20, whose units of roundoff sum up over a softmax."""


@dataclass(frozen=True)
class Faces:
    """Makes Llamas of one plan."""

    plan: Plan
    device: torch.device

    def llama(self, eos_ids: Sequence[int] = (), shift: int = 0) -> Llama:
        """A walker behind the library's face, in float32."""
        plan = with_short_pages(self.plan)
        line = plan.shard.line
        model = walker(eos_ids, shift, layers=1 if line is None else line.count)
        return Llama(build(model, plan, self.device, torch.float32), Letters())

    def truth(self) -> RefSubject:
        """The reference's float64 logits of the walker, on the numbers that the plan computes with."""
        runner = self.llama().runner
        weights = Weights(runner.reference_weights(), None, self.device)
        return RefSubject(runner.checkpoint.config, weights, torch.float64, self.device, "truth")


def judge_face(plan: Plan, device: torch.device) -> Verdict:
    """Every question of this file."""
    faces = Faces(plan, device)
    questions: dict[str, Callable[[Faces], Tally]] = {
        "generate": _generates,
        "end ids": _ends,
        "stop strings": _stops,
        "stream": _streams,
        "calls after each other": _after_each_other,
        "interleaved calls": _interleaved,
        "score": _scores,
        "log-probabilities": _log_probabilities,
        "penalties": _penalties,
        "edits": _edits,
        "allowed tokens": _allowed,
        "chat": _chats,
        "a reply cut and continued": _continues,
        "the open turn": _open_turns,
    }
    return sum((survived(name, partial(_answer, name, ask, faces)) for name, ask in questions.items()), Verdict())


def _answer(name: str, ask: Callable[[Faces], Tally], faces: Faces) -> Verdict:
    return Verdict((ask(faces).check(name),))


def ids_of(prompt: str) -> list[int]:
    return Letters().encode(prompt)


def wanted(prompt: str, count: int) -> list[int]:
    """The tokens that follow a prompt with one marker."""
    ids = ids_of(prompt)
    (marker,) = (number for number, mark in enumerate(MARKERS) if mark in ids)
    return walk(marker, ids[-1], count)


def shown(tokens: Sequence[int]) -> str:
    return Letters().decode(tokens)


def _generates(faces: Faces) -> Tally:
    """One prompt and several, as text and as ids, in batches of different sizes: tokens, text, reason, counts."""
    tally, llama = Tally("prompts"), faces.llama()
    for rows in (PROMPTS, PROMPTS[::-1], PROMPTS[1:3], PROMPTS[:1], PROMPTS * 2):
        for given in (list(rows), [ids_of(prompt) for prompt in rows]):
            for prompt, out in zip(rows, llama.generate(given, SHORT), strict=True):
                told = (out.tokens, out.text, out.finish_reason, out.prompt_tokens)
                tokens = wanted(prompt, SHORT)
                tally.see(f"{prompt!r}", told, (tokens, shown(tokens), "length", len(ids_of(prompt))))
    alone = llama.generate(PROMPTS[1], LONG)
    tally.see("alone", alone.tokens, wanted(PROMPTS[1], LONG))
    return tally


def _ends(faces: Faces) -> Tally:
    """Rows end at their own first end id, which stays a token and is no text; others go on. At the first token, amid, at
    the last."""
    tally = Tally("rows that end")
    said = [wanted(prompt, LONG) for prompt in PROMPTS]
    for eos_ids in ((said[0][0],), (said[1][12], said[2][5]), (said[3][LONG - 1],), (said[0][1], said[1][LONG - 1])):
        outs = faces.llama(eos_ids).generate(list(PROMPTS), LONG)
        for prompt, tokens, out in zip(PROMPTS, said, outs, strict=True):
            end = next((i + 1 for i, token in enumerate(tokens) if token in eos_ids), None)
            text = shown([token for token in tokens[:end] if token not in eos_ids])
            told = (out.tokens, out.text, out.finish_reason)
            tally.see(f"{prompt!r} until {eos_ids}", told, (tokens[:end], text, "stop" if end else "length"), bool(end))
    return tally


def _stops(faces: Faces) -> Tally:
    """Text ends before the first stop string, wherever tokens part it; a row without one goes on."""
    tally, llama = Tally("rows that stop"), faces.llama()
    texts = [shown(wanted(prompt, LONG)) for prompt in PROMPTS]
    late = texts[2][20:23]
    for stop in ((texts[0][5:8],), (late, texts[2][9:11]), (texts[1][0],), (texts[3][LONG - 2 :],), ("<|end|>",)):
        for prompt, text, out in zip(PROMPTS, texts, llama.generate(list(PROMPTS), LONG, stop=list(stop)), strict=True):
            ends = [(text.find(word) + len(word), text.find(word)) for word in stop if word in text]
            whole = (text[: min(ends)[1]], "stop") if ends else (text, "length")
            tally.see(f"{prompt!r} up to {stop}", (out.text, out.finish_reason), whole, bool(ends))
    return tally


def _streams(faces: Faces) -> Tally:
    """Pieces are the text, and come one by one; told to `on_text` they are each row's own."""
    tally = Tally("pieces")
    llama, ending = faces.llama(), faces.llama((wanted(PROMPTS[1], 9)[-1],))
    for prompt in PROMPTS:
        text = shown(wanted(prompt, LONG))
        pieces = list(llama.stream(prompt, LONG))
        tally.see(f"{prompt!r}", pieces, list(text), len(pieces) - 1)
        tally.see(f"{prompt!r} up to a stop", "".join(llama.stream(prompt, LONG, stop=text[6:9])), text[:6])
    tally.see("until an end id", "".join(ending.stream(PROMPTS[1], LONG)), shown(wanted(PROMPTS[1], 8)))
    told: dict[int, str] = {}
    llama.generate(list(PROMPTS), SHORT, on_text=lambda b, piece: told.update({b: told.get(b, "") + piece}))
    tally.see("on_text", told, {b: shown(wanted(prompt, SHORT)) for b, prompt in enumerate(PROMPTS)})
    return tally


def _after_each_other(faces: Faces) -> Tally:
    """Each call answers as the first would: after longer ones, shorter ones, other batches, and one that was broken off."""
    tally, llama = Tally("calls"), faces.llama()
    calls = [(PROMPTS[0], LONG), (PROMPTS[2], SHORT), (PROMPTS[3], LONG + 60), (PROMPTS[1], SHORT), (PROMPTS[0], 1)]
    for number, (prompt, count) in enumerate([*calls, *calls[::-1]]):
        tally.see(f"call {number}", llama.generate(prompt, count).tokens, wanted(prompt, count))
        pair = [prompt, PROMPTS[number % 4]]
        outs = [out.tokens for out in llama.generate(pair, SHORT)]
        tally.see(f"a pair after call {number}", outs, [wanted(one, SHORT) for one in pair])
        broken = llama.stream(PROMPTS[(number + 1) % 4], LONG)
        next(broken)
        broken.close()
    return tally


def _interleaved(faces: Faces) -> Tally:
    """Streams that are read in turns, and a call between them, do not know of each other."""
    tally, llama = Tally("pieces"), faces.llama()
    streams: list[Iterator[str]] = [iter(llama.stream(prompt, LONG)) for prompt in PROMPTS]
    texts = [""] * len(streams)
    for turn in range(LONG):
        for b, stream in enumerate(streams):
            texts[b] += next(stream)
        if turn in (3, 20):
            tally.see(
                "a call between", llama.generate(PROMPTS[turn % 4], SHORT).tokens, wanted(PROMPTS[turn % 4], SHORT)
            )
    for prompt, text in zip(PROMPTS, texts, strict=True):
        tally.see(f"{prompt!r}", text, shown(wanted(prompt, LONG)), LONG)
    return tally


def _scores(faces: Faces) -> Tally:
    """Log-probabilities of given tokens, and which were likeliest: of texts that go on as they should, and as they should not."""
    tally, llama, truth = Tally("tokens"), faces.llama(), faces.truth()
    rows = [ids_of(prompt) + wanted(prompt, 9) for prompt in PROMPTS]
    rows += [row[:-3] + row[-2:] for row in rows[:2]]
    scores = llama.score_ids(rows)
    texts = [shown(row) for row in rows]
    for row, score, again, logits_TV in zip(rows, scores, llama.score(texts), truth.prefill_logits(rows), strict=True):
        law_TV = logits_TV.log_softmax(-1)
        true = [float(law_TV[i, token]) for i, token in enumerate(row[1:])]
        for told in (score.logprobs, again):
            tally.see("score", close(told, true), True, len(true))
        best = [int(logits_TV[i].argmax()) == token for i, token in enumerate(row[1:])]
        tops = logits_TV[: len(true)].topk(2).values
        sure = [float(one - two) > EXACT for one, two in tops]
        said = [told for told, clear in zip(score.greedy, sure, strict=True) if clear]
        tally.see("likeliest", said, [b for b, clear in zip(best, sure) if clear])
    return tally


def close(told: Sequence[float], true: Sequence[float]) -> bool | str:
    """True, or what is furthest off."""
    if len(told) != len(true):
        return f"{len(told)} numbers instead of {len(true)}"
    errors = [abs(a - b) for a, b in zip(told, true)]
    worst = max(range(len(errors)), key=lambda i: errors[i] if errors[i] == errors[i] else float("inf"))
    return True if errors[worst] <= EXACT else f"number {worst} is {told[worst]:.5g}, not {true[worst]:.5g}"


def _log_probabilities(faces: Faces) -> Tally:
    """Those told beside tokens are the model's own, whatever temperature and filter drew them; no end, and no batch, shifts
    them."""
    tally, llama, truth = Tally("tokens"), faces.llama((wanted(PROMPTS[1], 12)[-1],)), faces.truth()
    settings: tuple[dict[str, Any], ...] = (
        {},
        {"temperature": COOL, "seed": 3},
        {"temperature": 1.7, "top_k": 3, "seed": 4},
    )
    for options in (*settings, {"temperature": COOL, "repetition_penalty": PENALTY, "seed": 5}):
        outs = llama.generate(list(PROMPTS), 16, logprobs=2, **options)  # type: ignore[arg-type]
        rows = [ids_of(prompt) + out.tokens for prompt, out in zip(PROMPTS, outs, strict=True)]
        for out, logits_TV in zip(outs, truth.prefill_logits(rows), strict=True):
            law_TV = logits_TV[-len(out.tokens) - 1 : -1].log_softmax(-1)
            told = out.logprobs or []
            tally.see("tokens", [one.token for one in told], out.tokens)
            true = law_TV.gather(1, torch.tensor(out.tokens, device=law_TV.device)[:, None])[:, 0].tolist()
            tally.see(f"{options}", close([one.logprob for one in told], true), True, len(told))
            best = law_TV.topk(2).values.flatten().tolist()
            top = [value for one in told for value in sorted(one.top.values(), reverse=True)]
            tally.see(f"likeliest, {options}", close(top, best), True)
    return tally


def penalised(logits_V: Tensor, held: Sequence[int], penalty: float) -> Tensor:
    """The published rule (Keskar et al. 2019), in float64."""
    out_V = logits_V.double().clone()
    seen = torch.tensor(sorted(set(held)), device=out_V.device)
    out_V[seen] = torch.where(out_V[seen] > 0, out_V[seen] / penalty, out_V[seen] * penalty)
    return out_V


def _penalties(faces: Faces) -> Tally:
    """A token is the largest of the penalised logits of what its row holds, where that is clear; greedy, and so cold that it is
    as good as greedy, and after another call of the same rows. Counted are tokens that the penalty has moved."""
    tally, llama, truth = Tally("tokens that a penalty moves"), faces.llama(), faces.truth()
    full = "D " + shown([*range(20, 60)])
    prompts = [full, PROMPTS[3], full[:-4], PROMPTS[0]]
    cold = {"temperature": 0.01, "seed": 8}
    for options in ({}, cold, {}):
        outs = llama.generate(prompts, 24, repetition_penalty=PENALTY, **options)  # type: ignore[arg-type]
        rows = [ids_of(prompt) + out.tokens for prompt, out in zip(prompts, outs, strict=True)]
        for prompt, out, row, logits_TV in zip(prompts, outs, rows, truth.prefill_logits(rows), strict=True):
            start = len(row) - len(out.tokens)
            for i, token in enumerate(out.tokens):
                plain_V = logits_TV[start + i - 1]
                law_V = penalised(plain_V, row[: start + i], PENALTY)
                one, two = law_V.topk(2).values.tolist()
                if one - two > (0.3 if options else 1e-3):
                    moved = int(law_V.argmax()) != int(plain_V.argmax())
                    tally.see(f"{prompt[-4:]!r}, token {i}", token, int(law_V.argmax()), moved)
    return tally


def _edits(faces: Faces) -> Tally:
    """See `oracle.questions.edits`; two prompts hold the tokens that are counted, which must not count there."""
    held = [*ids_of("D "), *[10, 20] * 5, 11, 12, 30]
    return adjusted_tokens(faces.llama(), faces.truth(), [held, ids_of(PROMPTS[0]), held[:-6]])


def _allowed(faces: Faces) -> Tally:
    return allowed_tokens(faces.llama(), faces.truth(), [ids_of(prompt) for prompt in PROMPTS[:3]])


def chat_wanted(messages: Sequence[tuple[str, str]], count: int, marker: int) -> str:
    """The reply to turns (role, content), of which the last is the user's."""
    return shown(walk(marker, ids_of(template_of(messages))[-1], count))


def template_of(messages: Sequence[tuple[str, str]], open_turn: bool = True) -> str:
    """A conversation as the walkers' template spells it."""
    closed = "".join(f"<{role[0]}>{content}<|end|>" for role, content in messages)
    return closed + "<a>" * open_turn


def _chats(faces: Faces) -> Tally:
    """Each turn is answered with what the first one held in the cache; a second conversation, and one begun anew, know nothing of
    it. Counted are tokens that the cache held."""
    tally, llama = Tally("tokens that were held"), faces.llama()
    for marker, other in ((1, 2), (3, 0)):
        first, second = Chat(llama, "be brief", SHORT), Chat(llama, None, SHORT)
        turns: dict[int, list[tuple[str, str]]] = {0: [("system", "be brief")], 1: []}
        for words in (f"{'ABCD'[marker]} now", "and then", "more"):
            for which, (chat, mark) in enumerate(((first, marker), (second, other))):
                said = words.replace("ABCD"[marker], "ABCD"[mark])
                turns[which].append(("user", said))
                answer, true = "".join(chat.say(said)), chat_wanted(turns[which], SHORT, mark)
                tally.see(f"{said!r}", answer, true, chat.reused_tokens)
                turns[which].append(("assistant", true))
                kept = [(message["role"], message["content"]) for message in chat.messages]
                tally.see("what is kept", kept, [*turns[which][:-1], ("assistant", true.lstrip())], 0)
                turns[which] = kept
        first.forget()
        fresh = f"{'ABCD'[other]} anew"
        again = chat_wanted([turns[0][0], ("user", fresh)], SHORT, other)
        tally.see("forgotten", "".join(first.say(fresh)), again)
    return tally


def _continues(faces: Faces) -> Tally:
    """A reply that its budget cut goes on where it stopped, as if it had not been cut; and one that was broken off by its
    reader."""
    tally, llama = Tally("tokens that were held"), faces.llama()
    for marker, count in ((0, 3), (2, 7), (1, 1)):
        chat = Chat(llama, None, count)
        question = f"{'ABCD'[marker]} go on"
        true = chat_wanted([("user", question)], 3 * count, marker)
        said = ["".join(chat.say(question))]
        for _ in range(2):
            said.append("".join(chat.go_on()))
            tally.see(f"{count} tokens at a time", "".join(said), true[: count * len(said)], chat.reused_tokens)
        tally.see("what is kept", chat.messages[-1]["content"], true.lstrip(), 0)
    chat = Chat(llama, None, LONG, Sampling())
    reply = chat.say("B stop me")
    begun = next(reply) + next(reply)
    reply.close()
    true = chat_wanted([("user", "B stop me")], LONG + 2, 1)
    tally.see("broken off", begun + "".join(chat.go_on()), true, chat.reused_tokens)
    return tally


def _open_turns(faces: Faces) -> Tally:
    """A conversation's text up to where a reply starts, and with last words of the assistant left open; and what follows each."""
    tally, llama = Tally("conversations"), faces.llama()
    turns = [("system", "x"), ("user", "B?"), ("assistant", "yes"), ("user", "why")]
    for upto in range(2, len(turns) + 1):
        messages = [{"role": role, "content": content} for role, content in turns[:upto]]
        left_open = turns[upto - 1][0] == "assistant"
        text = template_of(turns[:upto], not left_open)
        text = text.removesuffix("<|end|>") if left_open else text
        tally.see(f"{upto} turns", llama.chat_text(messages), text)
        out = llama.generate(messages, SHORT)
        tally.see(f"after {upto} turns", out.tokens, walk(1, ids_of(text)[-1], SHORT))
        tally.see(f"prompt of {upto} turns", out.prompt_tokens, len(Letters().encode(text, bos=False)))
    return tally
