"""The certificate as one self-contained HTML page: the report, and its pictures as inline SVG. No script, no network.

The pictures are matplotlib's (oracle.report.pictures); where it is not installed the page has none, and says so.
"""

from __future__ import annotations

import datetime
import html

from oracle.report.certificate import Certificate
from oracle.report.pictures import pictures

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse } td, th { padding: .1em .8em .1em 0; text-align: left; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums } .AGREE, .ok { color: #2a7a2a }
.DIFFER, .FAIL { color: #b00020 }
.EMPTY { color: #8a6d00 } svg { width: 100%; height: auto }
h2 { margin-top: 1.6em; font-size: 1.15em } .where { color: #666 }
"""


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
    body += [f"<h2>{_text(title)}</h2><p>{_text(told)}</p>{drawn}" for title, told, drawn in pictures(certificate)]
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


def _text(value: object) -> str:
    return html.escape(str(value))
