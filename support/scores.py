"""The table of scores, and its file, with which an interrupted run goes on."""

import json

import numpy as np
from tqdm import tqdm

from car import ENV_ID, FPS
from support.checkpoints import fingerprint
from support.cli import fail
from support.files import back_up, code_key, is_stream, replace_atomically, versions
from support.index_page import write_index

# flags that decide nothing about a score but by `arithmetic` and the nets, which settings hold
OUTPUT_FLAGS = "root models json no_video headless film device precision threads".split()
COLUMNS = "  track  return steps tiles missed  lap plan ms p50    p99"  # of row_line


def row_name(policy, pace):
    """A policy's name in tables and reports: an expert that does not drive at full pace says so."""
    return f"expert, pace {pace:g}" if policy == "expert" and pace != 1 else policy


def row_line(row):
    """A drive's row as a line of text, below COLUMNS."""
    lap = "yes" if row["lap_finished"] else "no"
    return (
        f"{row['track_seed']:7} {row['return']:7.1f} {row['steps']:5} {row['tiles']:5} "
        f"{row['tiles_missed']:6} {lap:>4} {row['plan_ms_p50']:11.1f} {row['plan_ms_p99']:6.1f}"
    )


def score_settings(args, nets):
    """All that decides a score, as JSON holds it: flags, code, versions, and {policy: {name: net}}
    by their fingerprints."""
    keys = {p: {k: fingerprint(net) for k, net in of.items()} for p, of in nets.items()}
    flags = {k: v for k, v in vars(args).items() if k not in OUTPUT_FLAGS}
    settings = flags | {"code": code_key(), "nets": keys, "versions": versions()}
    return json.loads(json.dumps(settings, default=str))


class Report:
    """The rows of all policies, {name: {track_seed: row}}, and the file of --json.

    The file is written after each drive. An unfinished file of the same settings is continued. Any
    other file is moved aside, so that no score is lost.
    """

    def __init__(self, path, settings, models):
        """path: a Path, or None for no file; models: {name: folder of the weights, or None}, one
        for each policy. Refuses a file that is no report."""
        self.path, self.settings, self.models = path, settings, models
        self.rows = {name: {} for name in models}
        self.stream = bool(path) and is_stream(path)
        if path and not self.stream and path.exists() and path.stat().st_size:
            self._resume()

    def _resume(self):
        try:
            known = json.loads(self.path.read_bytes())
            then, finished, rows = known["settings"], known["finished"], known["rows"].items()
            rows = {name: {e["track_seed"]: e for e in r["episodes"]} for name, r in rows}
            keys = sorted(then.keys() | self.settings.keys())
        except (ValueError, LookupError, TypeError, AttributeError):
            fail(f"--json {self.path}: is no report of drive_mpc.py; choose another name")
        other = [k for k in keys if then.get(k) != self.settings.get(k)]
        if not finished and not other:
            self.rows |= rows
            print(f"{self.path}: goes on behind {sum(map(len, rows.values()))} drives")
            return
        back_up(self.path.parent, [self.path])
        why = "finished" if finished else f"unfinished, with other {', '.join(other)}"
        print(f"{self.path}: {why}; it is in {self.path.parent}/replaced-* now, drives anew")

    def add(self, name, row):
        """Adds the row of a drive, and writes the file."""
        self.rows[name][row["track_seed"]] = row
        self.save()

    def summaries(self):
        """{name: its episodes in order of their tracks, mean and spread, and what drove}."""
        kind, out = self.settings["env"], {}
        for name, rows in self.rows.items():
            episodes = [rows[track] for track in sorted(rows)]
            returns = [e["return"] for e in episodes]
            if rows:
                out[name] = {
                    "env_id": ENV_ID if kind == "official" else f"{ENV_ID} {kind}",
                    "policy": name,
                    "models": self.models[name],
                    "versions": self.settings["versions"],
                    "episodes": episodes,
                    "mean": round(float(np.mean(returns)), 2),
                    "std": round(float(np.std(returns)), 2),
                    "median": round(float(np.median(returns)), 2),
                    "worst": min(returns),
                    "laps_finished": sum(e["lap_finished"] for e in episodes),
                }
        return out

    def save(self, last=False):
        """Writes the file; a stream gets the last report only. A failure costs a line, for the next
        drive tries again; after the last one it raises OSError."""
        if self.path is None or self.stream and not last:
            return
        reports, settings = self.summaries(), self.settings
        finished = all(len(rows) == settings["episodes"] for rows in self.rows.values())
        main = reports.get(row_name(settings["policy"], settings["pace"]), {})
        body = main | {"settings": settings, "finished": finished, "rows": reports}
        text = json.dumps(body, indent=1) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_atomically(self.path, lambda f: f.write(text.encode()))
            write_index(self.path.parent)
        except OSError as e:
            if last:
                raise
            tqdm.write(f"{self.path}: not written ({e.strerror}); tries again after the next drive")


def top_speed_return(tiles):
    """Return of a lap at 100 units/s, the car's top speed, along the middle of so many tiles.

    A tile has 3.5 units, a step costs 0.1. What lies below it is the driver's; it differs less from
    track to track than the return does.
    """
    return 1000 - 0.1 * FPS * 3.5 / 100 * tiles


def compare(reports, env_name):
    """The table of several policies' summaries on the same tracks."""
    tracks = [e["track_seed"] for r in reports for e in r["episodes"]]
    width = max(10, *(len(r["policy"]) for r in reports))
    columns = "    mean ± std median  worst  below top speed    laps missed  steps plan ms"
    where = f"tracks {min(tracks)} to {max(tracks)}, {env_name} env"
    lines = [f"{'driver':{width}}  {columns}   {where}"]
    for r in reports:
        mean = lambda key: np.mean([e[key] for e in r["episodes"]])
        laps = f"{r['laps_finished']}/{len(r['episodes'])}"
        tiles = [e["tiles"] + e["tiles_missed"] for e in r["episodes"]]
        below = top_speed_return(np.array(tiles)) - [e["return"] for e in r["episodes"]]
        lines.append(
            f"{r['policy']:{width}} {r['mean']:7.1f} ± {r['std']:5.1f} {r['median']:6.1f} "
            f"{r['worst']:6.1f} {below.mean():8.1f} ± {below.std():4.1f} {laps:>7} "
            f"{mean('tiles_missed'):6.1f} {mean('steps'):6.0f} {mean('plan_ms_p50'):7.1f}"
        )
    lines += sorted({f"weights of {r['models']}" for r in reports if r["models"]})
    return "\n".join(lines)
