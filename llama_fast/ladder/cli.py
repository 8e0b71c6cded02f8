"""Words to Plan to text: `llama-fast generate`, `bench`, `quantize`. The one place that knows flags and terminals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Generator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from llama_fast import recipes as presets
from llama_fast.build import build
from llama_fast.devices import default_dtype, dtype_named, where
from llama_fast.engine.engine import Engine
from llama_fast.engine.sampling import Sampling
from llama_fast.engine.text import stop_strings
from llama_fast.grammars.asked import Grammar, JsonSchema, Regex
from llama_fast.ladder import jobs
from llama_fast.ladder.report import Summary
from llama_fast.llama import Llama, Output
from llama_fast.model.roofline import GB
from llama_fast.parallel import ranks
from llama_fast.plan import Plan
from llama_fast.recipes import chosen_encoding, encoding_named
from llama_fast.speculative.proposers import Draft, Ngram
from llama_ref.arguments import whole
from llama_ref.command import complain, is_foreseen, one_line, run, writable
from llama_ref.interrupts import INTERRUPTED
from llama_ref.models import DEFAULT_MODEL, resolve
from llama_ref.tokenizers.tokenizer import DEFAULT_PROMPT

if TYPE_CHECKING:
    from llama_fast.chat import Chat
    from llama_fast.ladder.bench import Ladder

HELP = "Llama inference in native PyTorch, proved right and as fast as the machine's memory allows."

app = typer.Typer(add_completion=False, no_args_is_help=True, help=HELP, pretty_exceptions_enable=False)

ModelFlag = Annotated[
    str, typer.Option(help="A directory, a GGUF file, a hub id, smollm2-135m, or random:NAME[:SEED].")
]
DeviceFlag = Annotated[str | None, typer.Option(help="cpu or cuda; a GPU by default, if there is one.")]
DtypeFlag = Annotated[str | None, typer.Option(help="float32 or bfloat16; by default bf16 on a GPU, float32 on a CPU.")]
AdapterFlag = Annotated[str | None, typer.Option(help="A LoRA directory of PEFT, applied to the model.")]
StagesFlag = Annotated[
    int, typer.Option(help="Pipeline stages that the ranks of torchrun are; each is cut over as many.", min=1)
]
EncodingFlag = Annotated[
    str | None, typer.Option(help="dense, int8, fp8, int4-g32, stored, ...; by default as the checkpoint is stored.")
]

TRACED_TOKENS = 16
"""A trace grows by some thousand events a token."""

SERVER_GRACE_SECONDS = 6.0
"""What a signal leaves the ranks of a server to end by themselves; it tells its clients within 5."""


@app.command()
def generate(
    model: ModelFlag = DEFAULT_MODEL,
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = DEFAULT_PROMPT,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 200,
    num_samples: Annotated[int, typer.Option(help="How many continuations, one after another.", min=1)] = 1,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k likeliest.")] = 200,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest that sum to p.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Sample i draws with seed + i.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    min_p: Annotated[
        float, typer.Option(help="Draw among those at least this times as likely as the likeliest.")
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: what stands in the text gets less likely.")] = 1.0,
    frequency_penalty: Annotated[
        float, typer.Option(help="Above 0: a token gets less likely each time it is generated.")
    ] = 0.0,
    presence_penalty: Annotated[
        float, typer.Option(help="Above 0: a token gets less likely once it is generated.")
    ] = 0.0,
    json_schema: Annotated[
        Path | None, typer.Option(help="The text is a JSON value of the schema in this file.")
    ] = None,
    regex: Annotated[str | None, typer.Option(help="The text matches this regular expression, as a whole.")] = None,
    logprobs: Annotated[
        int | None, typer.Option(help="Into the JSON: each token's log-probability, and of so many others.", min=0)
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Show the text as it comes.")] = False,
    adapter: AdapterFlag = None,
    encoding: EncodingFlag = None,
    compile: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile before the first token.")] = False,
    fused: Annotated[bool, typer.Option("--fused", help="Decode by our own kernels; needs a GPU.")] = False,
    draft: Annotated[
        str | None, typer.Option(help="Who proposes tokens: a model with the same vocabulary, or ngram.")
    ] = None,
    draft_encoding: Annotated[
        str | None, typer.Option(help="How the draft's weights are stored; as its checkpoint by default.")
    ] = None,
    speculate: Annotated[
        int | None, typer.Option(help="Tokens proposed in a round; chosen from what is measured by default.")
    ] = None,
    stages: StagesFlag = 1,
    device: DeviceFlag = None,
    dtype: DtypeFlag = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write texts, tokens and rates here.")] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Write a profiler's trace (Chrome's format) of one more, untimed sample here.")
    ] = None,
) -> None:
    """Continue a prompt; print the text, the speed, the bandwidth and the memory."""
    writable(json_file, profile)
    whole("max_new_tokens", max_new_tokens, 1)
    # what is wrong is said before a model is sought
    Sampling(temperature, top_k, top_p, seed, min_p, repetition_penalty, frequency_penalty, presence_penalty)
    grammar = grammar_asked(json_schema, regex)
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    options |= {"stop": stop_strings(stop), "min_p": min_p, "repetition_penalty": repetition_penalty}
    options |= {"frequency_penalty": frequency_penalty, "presence_penalty": presence_penalty}
    member = ranks.join(where(device), stages=stages)
    to, kind = member.device, dtype_named(dtype, member.device)
    found = ranks.one_after_another(lambda: resolve(model))
    checkpoint = found.open(to, kind, adapter)
    if fused and compile:
        raise ValueError("--fused and --compile are two ways to decode: choose one")
    kept = chosen_encoding(encoding, checkpoint, fused)
    plan = replace(presets.fused(kept) if fused else presets.optimised(kept, compile), shard=member.shard)
    proposer = proposer_named(draft, draft_encoding, speculate, plan, to, kind)
    llama = Llama(build(checkpoint, plan, to, kind), found.tokenizer())
    options |= {"draft": proposer, "logprobs": logprobs}
    options |= {"grammar": None if grammar is None else llama.constraint(grammar)}
    if compile or fused:
        warm_up(llama, prompt, max_new_tokens, options)
    if to.type == "cuda":
        torch.cuda.reset_peak_memory_stats(to)
    outputs = []
    for i in range(num_samples):
        outputs.append(continued(llama, prompt, stream, max_new_tokens, {**options, "seed": (seed + i) % 2**64}))
    summary = Summary.of(llama, outputs, proposer)
    print("\n".join(summary.lines()))
    if json_file is not None and ranks.is_first():
        content = {
            "model": model,
            "adapter": adapter,
            "plan": str(plan),
            "dtype": str(kind).removeprefix("torch."),
            **summary.as_json(),
        }
        if summary.speculation is not None:
            content["speculation"] = summary.speculation.as_json()
        content["samples"] = [asdict(output) for output in outputs]
        json_file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if profile is not None:
        write_trace(profile, lambda: llama.generate(prompt, min(max_new_tokens, TRACED_TOKENS), seed=seed, **options))
    member.leave()


def grammar_asked(json_schema: Path | None, regex: str | None) -> Grammar | None:
    """The grammar of a text that two flags ask for; ValueError for both, or for a file that holds no JSON."""
    if json_schema is not None and regex is not None:
        raise ValueError("--json-schema and --regex both say what the text is: choose one")
    if json_schema is None:
        return None if regex is None else Regex(regex)
    try:
        schema = JsonSchema(json_schema.read_text(encoding="utf-8"))
        schema.document()
    except (OSError, ValueError) as error:
        raise ValueError(f"--json-schema {json_schema}: {error}") from None
    return schema


def continued(llama: Llama, prompt: str, stream: bool, max_new_tokens: int, options: dict[str, Any]) -> Output:
    """Print a prompt and what follows it, at the end or as it comes; nothing of a request that is refused."""
    shown: list[str] = []

    def show(_: int, piece: str) -> None:
        print(piece if shown else prompt + piece, end="", flush=True)
        shown.append(piece)

    output = llama.generate(prompt, max_new_tokens, on_text=show if stream else None, **options)
    print("" if shown else prompt + output.text, flush=True)
    return output


def warm_up(llama: Llama, prompt: str, max_new_tokens: int, options: dict[str, Any]) -> None:
    """The first tokens of a request compile, for a cache as long as it needs; they are not timed."""
    options = {name: value for name, value in options.items() if name != "logprobs"}
    with contextlib.closing(llama.stream(prompt, max_new_tokens, **options)) as pieces:
        for _ in zip(range(8), pieces):
            pass


def write_trace(file: Path, action: Callable[[], object]) -> None:
    """Run `action` under PyTorch's profiler and write what it saw, for chrome://tracing or ui.perfetto.dev."""
    from torch.profiler import profile

    with profile() as trace:
        action()
    trace.export_chrome_trace(str(file))
    print(f"Trace: {file}")


@app.command()
def chat(
    model: ModelFlag = DEFAULT_MODEL,
    system: Annotated[str | None, typer.Option(help="What the model is told before the first turn.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of a reply at most.", min=1)] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k likeliest.")] = None,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest that sum to p.")] = 0.95,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: what was said gets less likely.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed and the same words give the same replies.")] = 0,
    begin: Annotated[str, typer.Option(help="The first words of every reply, which the model goes on with.")] = "",
    stop: Annotated[list[str] | None, typer.Option(help="End a reply before this text; may be repeated.")] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="Which of the checkpoint's templates makes the text, by name.")
    ] = None,
    adapter: AdapterFlag = None,
    encoding: EncodingFlag = None,
    compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compile while the first reply is made.")
    ] = False,
    device: DeviceFlag = None,
    dtype: DtypeFlag = None,
) -> None:
    """Talk to a model. Ctrl-C ends a reply, Ctrl-D all; /more continues a reply, /reset starts anew, /exit leaves."""
    from llama_fast.chat import Chat

    sampling = Sampling(temperature, top_k, top_p, seed, repetition_penalty=repetition_penalty)
    ends = stop_strings(stop)
    found = resolve(model)
    to, kind = where(device), dtype_named(dtype, where(device))
    checkpoint = found.open(to, kind, adapter)
    plan = presets.optimised(chosen_encoding(encoding, checkpoint), compile)
    llama = Llama(build(checkpoint, plan, to, kind), found.tokenizer(), chat_template)
    talk(Chat(llama, system, max_new_tokens, sampling, ends), sys.stdin.isatty(), begin)


def talk(chat: Chat, shown: bool, begin: str = "") -> None:
    """Turn by turn until the input ends; `shown`: prompts for a person who types. Every reply starts with `begin`."""
    if shown:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - input() then knows arrow keys
    while True:
        try:
            text = input("> " if shown else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "/exit":
            return
        if text == "/reset":
            chat.forget()
        elif text == "/more":
            reply(chat.go_on)
        elif text:
            reply(lambda text=text: chat.say(text, begin), begin)  # type: ignore[misc]


def reply(answer: Callable[[], Generator[str, None, None]], begin: str = "") -> None:
    """Print one reply as it comes, behind its first words; Ctrl-C ends it, and what was said stays said."""
    try:
        with contextlib.closing(answer()) as pieces:
            for number, piece in enumerate(pieces):
                print(begin + piece if number == 0 else piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [interrupted]", end="")
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, end="")
    print(flush=True)


@app.command()
def serve(
    model: ModelFlag = DEFAULT_MODEL,
    host: Annotated[str, typer.Option(help="The address to listen at; by default only this machine can reach it.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="The port; 0 is any free one.", min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the model; as --model by default.")] = None,
    rows: Annotated[int, typer.Option(help="Texts that are generated at once.", min=1)] = 8,
    length: Annotated[
        int | None, typer.Option(help="Positions of a row, prompt and answer; 2048, or the context if shorter.", min=4)
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            help="How keys and values are kept: static or paged; paged on a CPU where nothing is compiled or drafted."
        ),
    ] = None,
    cache_tokens: Annotated[
        int | None, typer.Option(help="Positions of all rows together in a paged cache; by default --rows x --length.")
    ] = None,
    cache_bits: Annotated[
        int | None,
        typer.Option(help="8 keeps keys and values in so many bits; by default they have the type of the arithmetic."),
    ] = None,
    chunk: Annotated[
        int | None,
        typer.Option(help="Tokens of prompts that are read between two steps of others: 256.", min=1),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="What clients must send as Authorization: Bearer.", envvar="LLAMA_FAST_API_KEY")
    ] = None,
    max_body: Annotated[int, typer.Option(help="Bytes of a request's body at most.", min=1)] = 4_000_000,
    max_queue: Annotated[int, typer.Option(help="Texts that may wait for a row; then clients get 429.", min=0)] = 64,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take, waiting included.")] = 600.0,
    chat_template: Annotated[
        str | None, typer.Option(help="Which of the checkpoint's templates makes the text, by name.")
    ] = None,
    encoding: EncodingFlag = None,
    compile: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile before the first request.")] = False,
    fused: Annotated[bool, typer.Option("--fused", help="Decode by our own kernels; needs a GPU.")] = False,
    draft: Annotated[
        str | None,
        typer.Option(help="Who proposes tokens: a model, or ngram."),
    ] = None,
    draft_encoding: Annotated[
        str | None, typer.Option(help="How the draft's weights are stored; as its checkpoint by default.")
    ] = None,
    speculate: Annotated[
        int | None, typer.Option(help="Tokens proposed in a round; chosen from what is measured by default.")
    ] = None,
    stages: StagesFlag = 1,
    device: DeviceFlag = None,
    dtype: DtypeFlag = None,
) -> None:
    """Serve a model to OpenAI's clients, and a page to talk to it. Ctrl-C ends it within seconds."""
    try:
        from llama_fast.serve.door import Limits, check_key
        from llama_fast.serve.memory import bound_prepared_products
        from llama_fast.serve.server import Address, make_served, run_server, warm_up
        from llama_fast.serve.setup import Setup
    except ModuleNotFoundError as error:
        raise ValueError(f"the server's packages are not there ({error}): pip install 'llama-fast[serve]'") from error

    if not 0 < timeout < float("inf"):
        raise ValueError(f"timeout={timeout} must be a positive number of seconds")
    check_key("--api-key", api_key)
    setup = Setup(
        model=model,
        rows=rows,
        length=length,
        cache=cache,
        cache_tokens=cache_tokens,
        cache_bits=cache_bits,
        chunk=chunk,
        chat_template=chat_template,
        encoding=encoding,
        compile=compile,
        fused=fused,
        device=device,
        dtype=dtype,
        drafted=draft is not None,
    )
    limits = Limits(max_body, timeout, max_queue)
    bound_prepared_products()
    member = ranks.join(where(device), stages=stages)
    llama, slots = setup.opened(member, partial(proposer_named, draft, draft_encoding, speculate))
    served = make_served(llama, name or model, engine_of(member, llama, slots), limits)
    if setup.warms_up:
        warm_up(served.thread.engine)
    try:
        number = run_server(served, Address(host, port), limits, api_key)
    except KeyboardInterrupt:
        ranks.hard_exit(INTERRUPTED)  # Python takes seconds to clear away what PyTorch has loaded
    if member.watch is not None:
        member.watch.end(member.watch.signal or number or signal.SIGINT)


def engine_of(member: ranks.Member, llama: Llama, settings: dict[str, Any]) -> Engine:
    """The engine to serve with. Over ranks only the first comes back with one; the others follow it, and end when it does."""
    if member.watch is None:
        return Engine(llama.runner, **settings)
    from llama_fast.parallel.orders import Orders
    from llama_fast.serve.following import LeadingEngine, follow

    member.watch.grace_seconds = SERVER_GRACE_SECONDS
    orders = Orders()
    if not ranks.is_first():
        follow(Engine(llama.runner, **settings), orders, llama)
        if member.watch.signal is not None:
            member.watch.end(member.watch.signal)
        ranks.hard_exit(0)
    return LeadingEngine(orders, llama, **settings)


@app.command(
    "lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def lm_eval(context: typer.Context) -> None:
    """The lm-evaluation-harness with `--model llama_fast`; all arguments are its own."""
    try:
        from llama_fast.lm_eval_model import main
    except ImportError as error:
        raise ValueError(f"the harness is not there ({error}): pip install lm_eval") from error
    main(context.args)


@app.command()
def quantize(
    model: ModelFlag = DEFAULT_MODEL,
    out: Annotated[Path, typer.Option(help="The directory to write; it must be new or empty.")] = Path("quantized"),
    encoding: Annotated[str, typer.Option(help="int8, fp8, int4-g32, sparse24, ...: a wrong name lists all.")] = "int8",
    head: Annotated[
        str | None, typer.Option(help="The head's own encoding, or dense; a tied embedding table is the head too.")
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(help="A text (UTF-8) to fit the matrices to; without one they are rounded to the nearest."),
    ] = None,
    calibrate_tokens: Annotated[int, typer.Option(help="How much of the text is used.", min=128)] = 16384,
    fit: Annotated[
        str,
        typer.Option(
            help="weighted: scales and 2:4 places by weighted errors; feedback: and later columns answer them."
        ),
    ] = "feedback",
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Tell what is lost on a held-out text.")
    ] = True,
    adapter: AdapterFlag = None,
    device: DeviceFlag = None,
) -> None:
    """Encode a checkpoint once and save it, and tell what is lost: a directory that loads again without the original."""
    from llama_fast.ladder import quantizing
    from llama_ref.formats.saved import check_can_write, save_checkpoint

    kind, of_head = encoding_named(encoding), None if head is None else encoding_named(head)
    if kind.name in ("dense", "stored"):
        raise ValueError(f"encoding {kind.name} changes nothing: name a smaller one, as int8")
    feedback = quantizing.fit_named(fit)
    check_can_write(out)
    found, to = resolve(model), where(device)
    checkpoint = found.open(adapter=adapter)
    if checkpoint.encoding != "dense":
        raise ValueError(f"{model} is stored as {checkpoint.encoding} already")
    checkpoint = quantizing.with_head(checkpoint, of_head, kind)
    tokenizer = found.tokenizer()
    fitting, text = None, None
    if calibrate is not None:
        fitting = quantizing.Fit(checkpoint, kind, feedback, to, lambda line: print(f"note: {line}", file=sys.stderr))
        text = quantizing.Text.of(calibrate, tokenizer, calibrate_tokens, checkpoint.config.max_context)
        for notice in text.notices:
            print(f"note: {notice}", file=sys.stderr)
    tensors = quantizing.nearest(checkpoint, kind, to)
    held = quantizing.held_out(checkpoint, tokenizer, to) if measure and found.has_tokenizer else None
    if measure and held is None:
        print("note: the loss is not measured: no tokenizer says what text means to this model", file=sys.stderr)
    if held is not None:
        print(f"Rounded to the nearest: {quantizing.measured(held, checkpoint, tensors, kind.name)}", flush=True)
    if fitting is not None and text is not None:
        tensors = quantizing.fitted(fitting, text)
        if held is not None:
            line = quantizing.measured(held, checkpoint, tensors, kind.name)
            print(f"Fitted to {calibrate}, {fit}: {line}", flush=True)
    save_checkpoint(out, checkpoint.config, tensors, kind.name, tokenizer, checkpoint.encodings)
    size = sum(tensor.nbytes for tensor in tensors.values())
    heads = "".join(f", {stem} {name}" for stem, name in checkpoint.encodings.items())
    print(f"{out}: {kind.name}{heads}, {size / GB:.3f} GB")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A directory or file in any layout, or a hub id.")],
    target: Annotated[Path, typer.Argument(help="The directory to write; it must be new or empty.")],
    to: Annotated[str | None, typer.Option(help="hf or meta; by default the other one than the source has.")] = None,
) -> None:
    """Rewrite a checkpoint in Hugging Face's or Meta's layout, number for number."""
    from llama_ref.convert import convert as rewrite
    from llama_ref.formats.saved import check_can_write

    check_can_write(target)
    found = resolve(source)
    if found.path is None:
        raise ValueError(f"{source} has no files to convert")
    print(f"{target}: {rewrite(found.path, target, to)}")


@app.command()
def bench(
    model: ModelFlag = DEFAULT_MODEL,
    rungs: Annotated[
        str | None, typer.Option(help="Which rungs, with commas between; all by default, but `int4`, a CPU's.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where ladder.json and ladder.png go.")] = Path("."),
    samples: Annotated[int, typer.Option(help="Samples of every rung, taken in turns.", min=1)] = 5,
    new_tokens: Annotated[int, typer.Option(help="Tokens a sample, whatever the EOS ids say.", min=2)] = 200,
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = DEFAULT_PROMPT,
    profile: Annotated[Path | None, typer.Option(help="Write a profiler's trace here, and explain each rung.")] = None,
    adapter: AdapterFlag = None,
    device: DeviceFlag = None,
) -> None:
    """Climb the ladder: measure every rung, prove it, plot it. Exit code 1: one does not agree, or one asked for is left out."""
    from llama_fast.ladder.bench import Witnesses, Work
    from llama_fast.ladder.bench import bench as climb
    from llama_fast.ladder.judging import rung_judge
    from llama_fast.ladder.plots import draw
    from llama_fast.ladder.report import Live, show_step_times, show_table
    from llama_fast.ladder.rungs import rungs_named, rungs_of

    named = rungs_named(rungs) if rungs else []  # a wrong name is said before a model is fetched
    member = ranks.join(where(device))
    to = member.device
    for rung in named:
        if rung.needs_gpu and to.type != "cuda":
            raise ValueError(f"the rung {rung.name} needs a CUDA device")
        if rung.needs_cpu and to.type != "cpu":
            raise ValueError(f"the rung {rung.name} needs --device cpu")
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise OSError(f"cannot write to {out}")
    with Live(model) as live:
        live.say("opening the model")
        found = ranks.one_after_another(lambda: resolve(model))
        checkpoint = found.open(to, default_dtype(to), adapter)
        ids = found.tokenizer().encode(prompt)
        alone = member.watch is None
        if rungs:
            chosen = rungs_named(rungs, baseline=alone and checkpoint.encoding == "dense")
        else:
            chosen = rungs_of(to, checkpoint.encoding, launched=not alone)
        here, elsewhere = ([rung for rung in chosen if rung.over_ranks is over] for over in (False, True))
        if not alone:
            here, elsewhere = jobs.divided(chosen, member, to), []
        counts, undivided = {}, {}
        for rung in elsewhere:
            try:
                counts[rung.name] = jobs.ranks_for(checkpoint.config, to, rung)
            except ValueError as error:
                if rungs:
                    raise
                undivided[rung.name] = str(error)
        elsewhere = [rung for rung in elsewhere if rung.name in counts]
        work, witnesses = Work(ids, new_tokens, samples, profile), Witnesses(rung_judge(checkpoint, ids), live)
        ladder = climb(checkpoint, model, here, to, work, witnesses)
        ladder = replace(ladder, left_out=ladder.left_out | undivided)
        if not alone:
            ladder = jobs.of_all_ranks(ladder, member.size)
        save(ladder, out)  # whatever comes after
        same = ["--model", model, "--prompt", prompt, "--device", to.type]
        same += ["--samples", str(samples), "--new-tokens", str(new_tokens)]
        same += [] if adapter is None else ["--adapter", adapter]
        failed: dict[str, str] = {}
        for rung in elsewhere:  # a job for each: what ends one leaves the others
            if to.type == "cuda":
                torch.cuda.empty_cache()  # the first rank works on this GPU too
            try:
                ladder = replace(ladder, rungs=ladder.rungs + jobs.climb([rung], counts[rung.name], same, live.say))
            except ValueError as error:
                failed[rung.name] = str(error)
        ladder = replace(ladder, left_out=ladder.left_out | failed)
    save(ladder, out)
    if not ladder.rungs:
        raise ValueError(f"{model}: no rung could be climbed: {'; '.join(map(': '.join, ladder.left_out.items()))}")
    if ranks.is_first():
        show_table(ladder)
        show_step_times(ladder)
        draw(ladder, out / "ladder.png")
        print(f"{out / 'ladder.json'}  {out / 'ladder.png'}")
    member.leave()
    if failed:
        raise ValueError("; ".join(failed.values()))
    asked = {rung.name for rung in rungs_named(rungs, baseline=False)} if rungs else set()
    if any(rung.verdict != "AGREE" for rung in ladder.rungs) or asked & set(ladder.left_out):
        raise typer.Exit(1)


def save(ladder: Ladder, out: Path) -> None:
    """Write `ladder.json`, as the first rank."""
    if ranks.is_first():
        (out / "ladder.json").write_text(json.dumps(ladder.as_json(), indent=2) + "\n")


def proposer_named(
    draft: str | None, encoding: str | None, k: int | None, target: Plan, device: torch.device, dtype: torch.dtype
) -> Draft | Ngram | None:
    """ "ngram", or a model built as the target is but for its encoding; None where none is asked for."""
    if draft is None:
        if encoding is not None or k is not None:
            raise ValueError("--draft-encoding and --speculate say how tokens are proposed: --draft must say by whom")
        return None
    if draft == "ngram":
        if encoding is not None:
            raise ValueError("an n-gram lookup has no weights: --draft-encoding does not apply to it")
        return Ngram(k)
    if k is not None and k < 1:
        raise ValueError(f"k={k} must be at least 1: so many tokens are proposed in a round")
    checkpoint = resolve(draft).open(device, dtype)
    plan = replace(target, encoding=chosen_encoding(encoding, checkpoint, bool(target.arithmetic.name)))
    return Draft(build(checkpoint, plan, device, dtype), k)


def main() -> None:
    """The entry point: an error is one line and exit code 2, never a traceback (LLAMA_FAST_TRACEBACK=1 shows it)."""
    place = None
    try:
        place = ranks.Place.of_environment()
        ranks.only_first_speaks()
        code = run(app)
        if place is not None:
            ranks.hard_exit(code)
        sys.exit(code)
    except Exception as error:
        if os.environ.get("LLAMA_FAST_TRACEBACK"):
            raise
        if place is not None:
            ranks.fail(ranks.explained(error), 2)
        kind = "" if is_foreseen(error) else f"{type(error).__name__}: "
        complain(f"error: {kind}{one_line(error)}")
        sys.exit(2)


if __name__ == "__main__":
    main()
