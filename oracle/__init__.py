"""Decides whether two Llamas agree. Knows no optimisation by name.

Read compare.py (what agreement means), then subject.py and adapters.py (who can be judged), then judge.py and
verify.py.
"""
