"""The certificate as a page: self-contained, the same bytes, and a picture of everything that was measured."""

from __future__ import annotations

import json
import math
import re
from xml.etree import ElementTree

import pytest
import torch

from llama_fast.recipes import encoding_named, optimised
from llama_ref.checkpoint import Checkpoint
from oracle.report.certificate import Certificate
from oracle.report.page import page
from oracle.report.pictures import pictures
from oracle.statistics.compare import Check, Curve, Verdict
from oracle.verify import verify


@pytest.fixture(scope="module")
def certificate(tiny: Checkpoint) -> Certificate:
    def encode(text: str) -> list[int]:
        return [byte % 257 for byte in text.encode()]

    return verify(tiny, optimised(encoding_named("int8")), torch.device("cpu"), torch.bfloat16, encode)


def test_a_page_holds_every_check_and_picture_and_needs_nothing_else(certificate: Certificate) -> None:
    found = page(certificate, "2000-01-01")
    assert found == page(certificate, "2000-01-01")
    assert found.replace("2000-01-01", "x") == page(certificate, "2001-02-03").replace("2001-02-03", "x")
    assert not re.search(r"https?://|<script|<link|<img|url\((?!#)", found)
    assert all(name in found for name in certificate.parts)
    rows = sum(len(part.checks) for part in certificate.parts.values())
    assert found.count('<td class="ok">') + found.count('<td class="FAIL">') == rows
    titles = (
        "Error against layer",
        "Error against position: float32, row 1",
        "Error against position: bfloat16, row 0",
    )
    assert all(title in found for title in (*titles, "Drift"))
    for picture in re.findall(r"<svg.*?</svg>", found):
        ElementTree.fromstring(picture)
    assert len(re.findall(r"<svg", found)) == 7  # layers, parts, two rows in each of two types, drift


def test_the_document_holds_the_pictures_numbers(certificate: Certificate) -> None:
    document = json.loads(certificate.to_json("2000-01-01"))
    pictures = document["pictures"]
    assert [place for place, _ in pictures["layers"]["float32"]] == [
        "embedding",
        "layers.0",
        "layers.1",
        "norm",
        "logits",
    ]
    rows = pictures["positions"]["bfloat16"]
    assert [len(row["subject"]) for row in rows] == [129, 96]
    assert all(a <= b for row in rows for a, b in zip(row["yardstick"], row["budget"], strict=True))
    assert sum(pictures["histogram"]["subject"]) == document["drift"]["subject"]["positions"] == 1024
    assert document["drift"]["subject"]["kld_mean"].keys() == {"value", "error", "low", "high"}
    assert 0 < document["false_alarm_rate"] < 1e-2


def test_words_of_others_are_shown_as_words() -> None:
    certificate = Certificate({"model": "<b>x</b>"}, {"a & b": Verdict((Check("<i>", math.nan, 1.0, '"here"'),))})
    found = page(certificate, "2000-01-01")
    assert "<b>" not in found and "<i>" not in found
    assert "&lt;b&gt;x&lt;/b&gt;" in found and "a &amp; b" in found and "nan" in found


@pytest.mark.parametrize("values", [[], [math.nan], [0.0], [math.inf, -1.0]])
def test_what_cannot_be_drawn_is_said(values: list[float]) -> None:
    curve = Curve(values, values, [1.0] * len(values))
    certificate = Certificate({}, positions={"float32": [curve]})
    ((_, _, picture),) = pictures(certificate)
    assert "<svg" not in picture and "nothing that could be drawn" in picture


def test_axes_have_decades_every_layer_its_name_and_each_part_a_bar() -> None:
    layers = [("embedding", 1e-3), *((f"layers.{i}", 10.0 ** (i - 2)) for i in range(3)), ("logits", 0.4)]
    parts = {"float32 stages": Verdict((Check("q", 1.0, 4.0), Check("attention_out", 2.0, 4.0)))}
    found = {title: picture for title, _, picture in pictures(Certificate({}, parts, layers={"float32": layers}))}
    by_layer, by_part = found["Error against layer"], found["Error against part"]
    texts = [re.sub(r"<[^>]*>|\s", "", text) for text in re.findall(r"<text.*?</text>", by_layer, re.S)]
    assert [name for name in texts if name in dict(layers)] == [name for name, _ in layers]
    assert {"float32", "budget", "shareofitsbudget"} <= set(texts)
    assert any("10" in text and "−2" in text for text in texts)  # decades, and no halves of them
    assert "q" in re.sub(r"<[^>]*>", "", by_part) and "attention_out" in by_part
    (bars,) = {len(re.findall(r'<g id="patch_\d+">\s*<path d="[^"]*" clip-path', by_part))}
    assert bars == 2


def test_of_many_layers_the_first_and_the_last_keep_their_names() -> None:
    layers = [(f"layers.{i}", 0.1 + i) for i in range(100)]
    ((_, _, picture),) = pictures(Certificate({}, layers={"float32": layers}))
    names = re.findall(r"layers\.(\d+)</text>", picture)
    assert len(names) <= 36 and names[0] == "0" and names[-1] == "99"


def test_without_matplotlib_the_page_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = page(Certificate({}, layers={"float32": [("logits", 0.5)]}), "2000-01-01")
    assert "<svg" not in found and "matplotlib is not installed" in found
