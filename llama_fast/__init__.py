"""Llama inference in native PyTorch, proved right against `llama_ref`, at the speed of the machine's memory.

from llama_fast import Llama, Plan
from llama_fast.encodings.int8 import Int8
llama = Llama.from_pretrained("smollm2-135m", plan=Plan(encoding=Int8()))
print(llama.generate("Hello, my name is", max_new_tokens=20).text)
"""

from llama_ref.interrupts import quiet_until_run

quiet_until_run()  # a command that Ctrl-C ends while PyTorch loads ends without a traceback

from llama_fast.build import build
from llama_fast.engine.generate import Completion, Generation, generate
from llama_fast.engine.runner import Runner
from llama_fast.engine.sampling import Sampling
from llama_fast.llama import Llama, Output
from llama_fast.plan import Plan

__all__ = ["Completion", "Generation", "Llama", "Output", "Plan", "Runner", "Sampling", "build", "generate"]
