"""A headless Chromium that shows pages without a network, for tests of what it makes of them."""

from __future__ import annotations

import json
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --disable-extensions"
).split()

# Runs in the frame before the page's own script: what a console would show.
_WATCH = """<script>
window.faults = [];
addEventListener("error", (event) => faults.push(String(event.message || event.target)), true);
addEventListener("securitypolicyviolation", (event) => faults.push("policy: " + event.blockedURI));
for (const kind of ["error", "warn"]) console[kind] = (...all) => faults.push(all.join(" "));
</script>"""


def asked(page: str, script: str, folder: Path, width: int = 1280) -> Any:
    """Show a page in a frame of a width, and return what a function body answers.

    Parameters
    ----------
    page : str
        The HTML.
    script : str
        The body of a function of ``document`` and ``window`` of the frame; what it returns is
        passed on as JSON, with the page's errors as ``faults``.
    folder : Path
        For the browser's own files.
    width : int
        Of the frame. (A window may not be as narrow as a phone.)
    """
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here (apt-get install chromium)")
    watched = page.replace("<head>", f"<head>{_WATCH}", 1)
    assert watched != page
    outer = folder / "outer.html"
    outer.write_text(
        f"""<!DOCTYPE html><meta charset="utf-8"><body>
        <iframe srcdoc="{escape(watched)}" width="{width}" height="900"></iframe>
        <pre id="answer"></pre><script>
        document.querySelector("iframe").addEventListener("load", (event) => {{
          const window = event.target.contentWindow, document = window.document;
          let answer;
          try {{ answer = (() => {{ {script} }})(); }} catch (error) {{ answer = String(error); }}
          const all = {{ answer, faults: window.faults }};
          parent.document.getElementById("answer").textContent = JSON.stringify(all);
        }});</script>""",
        encoding="utf-8",
    )
    command = [browser, *_FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    ended = subprocess.run(
        [*command, "--virtual-time-budget=5000", outer.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    _, found, rest = ended.stdout.partition('<pre id="answer">')
    assert found, ended.stderr
    return json.loads(unescape(rest.partition("</pre>")[0]))
