"""Decides whether two Llamas agree. Knows no optimisation by name.

Read compare.py (what agreement means), then subject.py and adapters.py (who can be judged), then judge.py and
verify.py.
"""

from llama_ref.interrupts import quiet_until_run

quiet_until_run()  # a command that Ctrl-C ends while PyTorch loads ends without a traceback
