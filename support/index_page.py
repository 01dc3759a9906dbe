"""visuals/index.html: one static page of all pictures, films and scores of a ROOT.

It needs no server and no network. Every picture that is written refreshes it; a browser reloads it.
"""

import json
import os
import time
from contextlib import suppress
from html import escape
from urllib.parse import quote

from support.files import replace_atomically

RELOAD_S = 30  # seconds after which the browser loads the page again
SECTIONS = {  # heading: (file names, how many of the newest are shown)
    "Reconstruction": (["reconstruct_ep*.png", "reconstruct_progress.gif"], 1),
    "Rollout": (["output_dream.gif", "dream_ep*.png", "dream_long.png"], 1),
    "Energy": (["demo_energy.png", "energy_*.png"], 9),
    "Films": (["*.mp4"], 9),
    "Report card": (["report*.png"], 9),
    "Curves": (["*_curves.png"], 9),
}
HEAD = f"""<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="{RELOAD_S}">
<title>TinyJEPA</title><style>
body {{ font: 16px sans-serif; margin: 24px; background: #fafafa; color: #222 }}
img, video {{ max-width: 100%; border: 1px solid #ccc; background: #fff }}
figure {{ margin: 0 0 16px }} figcaption, td, th {{ font-size: 14px; padding: 2px 10px 2px 0 }}
th {{ text-align: left }}
</style>"""


def write_index(visuals):
    """Writes visuals/index.html anew, for a folder of that name. A failure costs the page only."""
    if visuals.name != "visuals":
        return
    with suppress(OSError):
        title = f"<h1>{escape(visuals.resolve().parent.name)}</h1>"
        parts = [HEAD, title, f"<p>{time.strftime('%F %T')}, reloads every {RELOAD_S} s</p>"]
        for heading, (patterns, count) in SECTIONS.items():
            figures = [figure(f) for p in patterns for f in newest(visuals, p, count)]
            parts += [f"<h2>{heading}</h2>", *figures] if figures else []
        tables = list(filter(None, map(scores, newest(visuals, "*.json", 9))))
        parts += ["<h2>Scores</h2>", *tables] if tables else []
        page = "\n".join(parts).encode(errors="replace")
        replace_atomically(visuals / "index.html", lambda f: f.write(page))


def newest(visuals, pattern, count):
    """The newest `count` files of a pattern, newest first."""
    files = [p for p in visuals.glob(pattern) if p.is_file()]
    return sorted(files, key=lambda p: p.stat().st_mtime, reverse=True)[:count]


def figure(path):
    """A picture or a film under its name; the date in its address defeats the browser's cache."""
    changed, name = path.stat().st_mtime, escape(path.name)
    source = f'src="{quote(os.fsencode(path.name))}?{changed:.0f}"'
    film = path.suffix == ".mp4"
    shown = f"<video {source} controls loop muted></video>" if film else f"<img {source}>"
    at = time.strftime("%F %T", time.localtime(changed))
    return f"<figure>{shown}<figcaption>{name}, {at}</figcaption></figure>"


def scores(path):
    """The rows of a report of drive_mpc.py as a table, or "" for another file."""
    table = f"<figure><figcaption>{escape(path.name)}</figcaption><table>"
    table += "<tr><th>driver<th>return<th>laps"
    try:
        for name, r in json.loads(path.read_text())["rows"].items():
            table += f"<tr><td>{escape(name)}<td>{r['mean']:.1f} ± {r['std']:.1f}"
            table += f"<td>{r['laps_finished']}/{len(r['episodes'])}"
    except (ValueError, LookupError, TypeError, AttributeError):
        return ""
    return f"{table}</table></figure>"
