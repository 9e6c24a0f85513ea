"""The page: template, style, script and data in one file that loads nothing from the network.

Text that a model wrote reaches the page as JSON in a script element that browsers do not run. `<`, `>` and `&` are escaped, so no
text can end the element. The script builds the document from text nodes alone. The content security policy names style and script
by hash, so nothing else may run or load, even if a text became markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files
from typing import Any

SCRIPTS = (
    *("data.js", "dom.js", "address.js", "charts.js", "traces.js", "colour.js", "strip.js", "reader.js"),
    *("groups.js", "policies.js", "run.js", "runs.js", "evidence.js", "audit.js", "keys.js", "live.js", "main.js"),
)


def page(document: dict[str, Any]) -> bytes:
    """One HTML file, UTF-8, that shows `document`. The same document gives the same bytes.

    A page that is served (`document["live"]`) may ask the server that it came from, and nobody else.
    """
    folder = files("pipeline") / "report" / "assets"
    style = (folder / "report.css").read_text(encoding="utf-8")
    script = '"use strict";\n' + "\n".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS)
    asks = "; connect-src 'self'" if document["live"] else ""
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'; form-action 'none'{asks}"
    )
    index, blocks = apart(document)
    held = "\n".join(f'<script type="text/plain" id="{name}">{block}</script>' for name, block in blocks.items())
    parts = {"policy": policy, "style": style, "script": script, "blocks": held, "data": embedded(index)}
    html = (folder / "report.html").read_text(encoding="utf-8")
    for name, text in parts.items():  # the data come last, so a text in them that looks like a placeholder stays as it is
        before, after = html.split(f"{{{{{name}}}}}")
        html = before + text + after
    return html.encode("utf-8")


def apart(document: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The document without its blocks, and the blocks by name: `block-0-3` is the fourth one of the first run's sample."""
    blocks: dict[str, str] = {}
    runs = []
    for number, run in enumerate(document["runs"]):
        run = dict(run)
        for key, name in (("sample", "block"), ("answers", "answers")):
            if run.get(key):
                blocks |= {f"{name}-{number}-{place}": block for place, block in enumerate(run[key]["blocks"])}
                run[key] = run[key] | {"blocks": len(run[key]["blocks"])}
        runs.append(run)
    return document | {"runs": runs}, blocks


def embedded(document: Any) -> str:
    """JSON that is safe inside a script element: ASCII, without `<`, `>`, `&`. Raises ValueError on NaN or infinity."""
    text = json.dumps(document, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
