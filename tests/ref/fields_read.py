"""The fields that the readers in llama_ref take out of files, found in their source by `ast`.

A read is `x.get("field")`, `x.pop("field")`, `x["field"]`, `"field" in x`, or a helper's `whole(x, "field")`. A name in
place of the text is followed to a constant of a module, or to the loop around it; what is left open in an f-string
becomes a star: f"tokenizer.ggml.{name}_id" -> "tokenizer.ggml.*_id".
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

ASKED_BY_HELPERS = (  # names of holders
    *("data", "rope", "params", "metadata", "settings", "specials", "header.metadata", "scheme", "weights", "stated"),
)

Texts = Mapping[str, list[str]]  # name -> the texts that it is, or holds


@dataclass(frozen=True)
class Read:
    """One read: `holder` is what was asked, as "data" or "header.metadata"."""

    module: str
    line: int
    holder: str
    field: str


def reads_of(folder: Path) -> list[Read]:
    """Every read of every module of a folder."""
    trees = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.py"))}
    everywhere: dict[str, list[str]] = {}
    for tree in trees.values():
        everywhere |= _constants(tree)
    return [read for module, tree in trees.items() for read in _reads(module, tree, everywhere | _constants(tree))]


def _constants(tree: ast.Module) -> dict[str, list[str]]:
    """The texts of a module's constants: of a text itself, of a tuple its entries, of a dictionary its keys."""
    found = {}
    for name, value in _named(tree):
        found[name] = [text for text in _entries(value) if isinstance(text, str)]
    return {name: texts for name, texts in found.items() if texts}


def _named(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """Each constant with its value, also of `A, B = "a", "b"`."""
    for node in tree.body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        pairs = [(target, node.value)]
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = list(zip(target.elts, node.value.elts))
        yield from ((name.id, value) for name, value in pairs if isinstance(name, ast.Name))


def _entries(value: ast.expr) -> list[object]:
    if isinstance(value, ast.Constant):
        return [value.value]
    keys = value.keys if isinstance(value, ast.Dict) else getattr(value, "elts", [])
    return [key.value for key in keys if isinstance(key, ast.Constant)]


def _reads(module: str, tree: ast.Module, constants: Texts) -> Iterator[Read]:
    for node, known in _walk(tree, constants):
        for holder, key in _asked(node):
            for field in _texts(key, known):
                yield Read(module, node.lineno, ast.unparse(holder), field)  # type: ignore[attr-defined]


def _walk(node: ast.AST, known: Texts) -> Iterator[tuple[ast.AST, Texts]]:
    """Every node, with the texts of the constants and of the variables of the loops around it."""
    inside = dict(known)
    for loop in getattr(node, "generators", [node] if isinstance(node, ast.For) else []):
        inside |= _taken(loop.target, loop.iter, inside)
    yield node, inside
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, inside)


def _taken(target: ast.expr, values: ast.expr, known: Texts) -> dict[str, list[str]]:
    """Variable -> its texts: of `for name in ("a", "b")`, also of `for name, x in (("a", 1), ("b", 2))`."""
    names = target.elts if isinstance(target, ast.Tuple) else [target]
    variables = [name.id for name in names if isinstance(name, ast.Name)]
    if isinstance(values, ast.Call) and isinstance(values.func, ast.Attribute):  # of `CONSTANT.items()`
        values = values.func.value
    if isinstance(values, ast.Name):
        return {variables[0]: list(known.get(values.id, []))} if variables else {}
    found: dict[str, list[str]] = {name: [] for name in variables}
    for entry in getattr(values, "elts", []):
        parts = entry.elts if isinstance(entry, ast.Tuple) and len(names) > 1 else [entry]
        for name, part in zip(variables, parts):
            found[name] += [part.value] if isinstance(part, ast.Constant) and isinstance(part.value, str) else []
    return found


def _asked(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """(what was asked, for what) of a node that is a read."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop"):
        if node.args:
            yield node.func.value, node.args[0]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if len(node.args) > 1 and ast.unparse(node.args[0]) in ASKED_BY_HELPERS:
            yield node.args[0], node.args[1]
    elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
        yield node.value, node.slice
    elif isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.In, ast.NotIn)):
        yield node.comparators[0], node.left


def _texts(key: ast.expr, known: Texts) -> list[str]:
    """The texts that a key can be; [] where it is none, or one that cannot be told."""
    if isinstance(key, ast.Constant):
        return [key.value] if isinstance(key.value, str) else []
    if isinstance(key, (ast.Name, ast.Attribute)):
        return list(known.get(key.id if isinstance(key, ast.Name) else key.attr, []))
    if isinstance(key, ast.BinOp) and isinstance(key.op, ast.Add):
        parts = [key.left, key.right]
    elif isinstance(key, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.FormattedValue) else part for part in key.values]
    else:
        return []
    choices = [_texts(part, known) or ["*"] for part in parts]
    return ["".join(choice) for choice in product(*choices)]
