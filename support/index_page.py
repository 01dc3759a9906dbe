"""visuals/index.html: one static page of all pictures, films and scores of a ROOT.

It needs no server and no network. Every picture that is written refreshes it; a browser reloads it.
"""

import html
import json
import time
from contextlib import suppress

from support.files import replace_atomically

RELOAD_S = 30  # seconds after which the browser loads the page again
SECTIONS = {  # heading: file names, the newest of which is shown, or all of them
    "Reconstruction": (["reconstruct_ep*.png"], 1),
    "Rollout": (["output_dream.gif", "dream_ep*.png"], 1),
    "Energy": (["demo_energy.png", "energy_*.png"], 9),
    "Films": (["*.mp4"], 9),
    "Report card": (["report*.png"], 9),
    "Curves": (["*_curves.png"], 9),
}
STYLE = """body { font: 16px sans-serif; margin: 24px; background: #fafafa; color: #222 }
img, video { max-width: 100%; border: 1px solid #ccc; background: #fff }
figure { margin: 0 0 16px } figcaption, td, th { font-size: 14px; padding: 2px 10px 2px 0 }
th { text-align: left }"""


def write_index(visuals):
    """Writes visuals/index.html anew, for a folder of that name. A full disk costs the page only."""
    if visuals.name != "visuals":
        return
    parts = [f"<h1>{html.escape(str(visuals.resolve().parent.name))}</h1>"]
    parts.append(f"<p>{time.strftime('%F %T')}, reloads every {RELOAD_S} s</p>")
    for heading, (patterns, count) in SECTIONS.items():
        figures = [f for pattern in patterns for f in newest(visuals, pattern, count)]
        if figures:
            parts += [f"<h2>{heading}</h2>", *map(figure, figures)]
    tables = [table for path in sorted(visuals.glob("*.json")) if (table := scores(path))]
    if tables:
        parts += ["<h2>Scores</h2>", *tables]
    head = f'<meta charset="utf-8"><meta http-equiv="refresh" content="{RELOAD_S}">'
    page = f"<!doctype html>{head}<title>TinyJEPA</title><style>{STYLE}</style>" + "\n".join(parts)
    with suppress(OSError):
        replace_atomically(visuals / "index.html", lambda f: f.write(page.encode()))


def newest(visuals, pattern, count):
    """The newest `count` files of a pattern, newest first."""
    files = [p for p in visuals.glob(pattern) if p.is_file()]
    return sorted(files, key=lambda p: p.stat().st_mtime, reverse=True)[:count]


def figure(path):
    """A picture or a film under its name; the date in its address defeats the browser's cache."""
    changed = path.stat().st_mtime
    name, at = html.escape(path.name), time.strftime("%F %T", time.localtime(changed))
    source = f'src="{name}?{changed:.0f}"'
    film = f"<video {source} controls loop muted></video>"
    shown = film if path.suffix == ".mp4" else f'<img {source} alt="{name}">'
    return f"<figure>{shown}<figcaption>{name}, {at}</figcaption></figure>"


def scores(path):
    """The rows of a report of drive_mpc.py as a table, or "" for another file."""
    try:
        rows = json.loads(path.read_text())["rows"]
        cells = [
            (
                name,
                f"{r['mean']:.1f} ± {r['std']:.1f}",
                f"{r['laps_finished']}/{len(r['episodes'])}",
            )
            for name, r in rows.items()
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return ""
    line = lambda tag, row: "<tr>" + "".join(f"<{tag}>{html.escape(x)}</{tag}>" for x in row)
    body = "".join(line("td", row) for row in cells)
    head = line("th", ("driver", "return", "laps"))
    return f"<figure><figcaption>{path.name}</figcaption><table>{head}{body}</table></figure>"
