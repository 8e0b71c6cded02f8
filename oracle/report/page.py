"""The certificate as one self-contained HTML page: the report, and its pictures as inline SVG. No script, no network."""

from __future__ import annotations

import datetime
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from oracle.report.certificate import Certificate

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 720, 260, 70, 40, 16
COLOURS = ("#0b6e99", "#c2571a", "#5b8c2a", "#7a4fa3")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse } td, th { padding: .1em .8em .1em 0; text-align: left; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums } .AGREE, .ok { color: #2a7a2a }
.DIFFER, .FAIL { color: #b00020 }
.EMPTY { color: #8a6d00 } svg { width: 100%; height: auto } svg text { font: 12px system-ui, sans-serif; fill: #444 }
h2 { margin-top: 1.6em; font-size: 1.15em } .where { color: #666 }
"""


@dataclass(frozen=True)
class Line:
    """One curve of a picture: its points, its name, and whether it is a limit (dashed)."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


def page(certificate: Certificate, date: str | None = None) -> str:
    """The whole document; the same certificate gives the same bytes, apart from `date`, which defaults to today."""
    outcome = certificate.outcome.value
    head = "".join(f"<tr><th>{_text(k)}</th><td>{_text(v)}</td></tr>" for k, v in certificate.subject.items())
    body = [
        f'<h1>llama-oracle: <span class="{outcome}">{outcome}</span></h1>',
        f"<table>{head}<tr><th>date</th><td>{_text(date or datetime.date.today().isoformat())}</td></tr></table>",
    ]
    fault = certificate.first_fault
    if fault is not None:
        told = f"<p>subject: {_text(fault.subject)}<br>truth: {_text(fault.truth)}</p>"
        body.append(f'<h2 class="DIFFER">First fault: {_text(str(fault))}</h2>{told}')
    body += _pictures(certificate)
    for name, part in certificate.parts.items():
        rows = "".join(
            f'<tr><td class="{"ok" if check.ok else "FAIL"}">{"ok" if check.ok else "FAIL"}</td><td>{_text(check.name)}</td>'
            f'<td class="number">{check.measured:.4g}</td><td class="number">of {check.budget:.4g}</td>'
            f'<td class="where">{_text(check.where)}</td></tr>'
            for check in part.checks
        )
        body.append(
            f'<h2>{_text(name)}: <span class="{part.outcome.value}">{part.outcome.value}</span></h2><table>{rows}</table>'
        )
    body += _drift_table(certificate)
    body += [f"<p>note: {_text(note)}</p>" for note in certificate.notes]
    top = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>llama-oracle: {outcome}</title><style>{STYLE}</style>'
    return "\n".join([top, *body, "</html>"]) + "\n"


def _pictures(certificate: Certificate) -> list[str]:
    parts = []
    if any(certificate.layers.values()):
        parts.append("<h2>Error against layer</h2><p>Of each block's parts, the one nearest to its budget (1).</p>")
        places = list(dict.fromkeys(place for curve in certificate.layers.values() for place, _ in curve))
        lines = [
            Line(name, [(places.index(place), used) for place, used in curve])
            for name, curve in certificate.layers.items()
        ]
        parts.append(
            chart(
                [*lines, Line("budget", [(0, 1.0), (len(places) - 1, 1.0)], True)], "stage", "share of budget", places
            )
        )
    for name, rows in certificate.positions.items():
        for row, curve in enumerate(rows):
            parts.append(f"<h2>Error against position: {_text(name)}, row {row}, prefill</h2>")
            three = (("subject", curve.subject), ("yardstick", curve.yardstick), ("budget", curve.budget))
            lines = [Line(who, list(enumerate(values)), who == "budget") for who, values in three]
            parts.append(chart(lines, "position", "relative error"))
    if certificate.histogram:
        parts.append("<h2>Drift</h2><p>Positions by KL divergence from the original weights.</p>")
        lines = [
            Line(who, [(i / 2 - 12 + 0.25, float(count)) for i, count in enumerate(counts)])
            for who, counts in certificate.histogram.items()
        ]
        parts.append(chart(lines, "log10 of the divergence", "positions", logarithmic=False))
    return parts


def _drift_table(certificate: Certificate) -> list[str]:
    if certificate.drift is None:
        return []
    document = certificate.estimates()
    rows = "".join(
        f"<tr><td>{_text(key.replace('_', ' '))}</td><td>{_text(ours)}</td><td>{_text(plain)}</td></tr>"
        for key, ours, plain in document
    )
    head = "<tr><th></th><th>subject [95%]</th><th>plain bf16</th></tr>"
    return [f"<h2>Drift over {certificate.drift.positions} positions of text</h2><table>{head}{rows}</table>"]


def chart(lines: Sequence[Line], across: str, up: str, places: Sequence[str] = (), logarithmic: bool = True) -> str:
    """Lines over a common frame as an SVG; numbers that are none, or not positive on a logarithmic axis, are left out."""

    def usable(y: float) -> bool:
        return math.isfinite(y) and (y > 0 or not logarithmic)

    points = [(x, y) for line in lines for x, y in line.points if usable(y)]
    if not points:
        return "<p>nothing that could be drawn</p>"
    xs = [x for x, _ in points]
    ys = [math.log10(y) if logarithmic else y for _, y in points]
    x0, x1 = min(xs), max(max(xs), min(xs) + 1)
    y0, y1 = (math.floor(min(ys)), math.ceil(max(ys))) if logarithmic else (0.0, max(ys))
    y1 = max(y1, y0 + 1)

    def at(x: float, y: float) -> str:
        high = math.log10(y) if logarithmic else y
        right = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - 10)
        return f"{right:.1f},{TOP + (y1 - high) / (y1 - y0) * (HEIGHT - TOP - BOTTOM):.1f}"

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for tick in _ticks(y0, y1):
        height = TOP + (y1 - tick) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)
        label = f"1e{tick:g}" if logarithmic else f"{tick:g}"
        parts.append(f'<path d="M{LEFT},{height:.1f}H{WIDTH - 10}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{height + 4:.1f}" text-anchor="end">{label}</text>')
    for tick in _ticks(x0, x1):
        named = places[int(tick)] if places and tick == int(tick) and int(tick) < len(places) else f"{tick:g}"
        right = LEFT + (tick - x0) / (x1 - x0) * (WIDTH - LEFT - 10)
        parts.append(f'<text x="{right:.1f}" y="{HEIGHT - 22}" text-anchor="middle">{_text(named)}</text>')
    for index, line in enumerate(lines):
        path = " ".join(at(x, y) for x, y in line.points if usable(y))
        style = ' stroke-dasharray="6 4"' if line.dashed else ""
        colour = "#b00020" if line.dashed else COLOURS[index % len(COLOURS)]
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"{style}/>')
        parts.append(f'<text x="{LEFT + 8 + 130 * index}" y="12" style="fill:{colour}">{_text(line.name)}</text>')
    parts.append(f'<text x="{WIDTH - 10}" y="{HEIGHT - 6}" text-anchor="end">{_text(across)}</text>')
    parts.append(f'<text x="4" y="{HEIGHT - 6}">{_text(up)}</text></svg>')
    return "".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    """At most nine round numbers from low to high: (0, 30) -> 0, 5, 10, ..., 30."""
    span = high - low
    step = next(s for power in range(-3, 12) for s in (10.0**power, 2 * 10.0**power, 5 * 10.0**power) if span / s <= 8)
    first = math.ceil(low / step)
    return [round(step * i, 9) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _text(value: object) -> str:
    return html.escape(str(value))
