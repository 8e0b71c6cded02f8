"""One word of judgement for every rung of a benchmark, on the runner as it was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llama_fast.engine.runner import Runner
from llama_fast.engine.speculation import Speculation
from llama_ref.checkpoint import Checkpoint
from oracle.questions.speculation import judge_speculation
from oracle.verify import judge_runner


def rung_judge(
    checkpoint: Checkpoint, prompt: Sequence[int]
) -> Callable[[Runner, int | None, Speculation | None], str]:
    """(runner, its cache's length, its proposer) -> "AGREE", "DIFFER" or "EMPTY"; one row that continues `prompt`."""

    def judge(runner: Runner, cache_length: int | None, draft: Speculation | None = None) -> str:
        if draft is None:
            verdict = judge_runner(runner, checkpoint, prompt, cache_length=cache_length)
        else:
            verdict = judge_speculation(runner, checkpoint, draft, [prompt], batch=1, cache_length=cache_length)
        return verdict.outcome.value

    return judge
