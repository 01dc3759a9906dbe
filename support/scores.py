"""The score table, and its file."""

import json
import os
import time

import numpy as np
from tqdm import tqdm

from car import ENV_ID
from support.checkpoints import fingerprint
from support.cli import fail
from support.files import code_key, is_stream, replace_atomically, versions

OUTPUT_FLAGS = (
    "root",
    "models",
    "json",
    "no_video",
    "headless",
    "film",
    "device",
    "precision",
    "threads",
)
# that decide nothing about a score but by `arithmetic` and the nets, which reports hold
REPORT_KEYS = {"env_id", "policy", "versions", "episodes"}, {"settings", "finished", "rows"}


def summary(policy, episodes, kind="official", models=None):
    """The report of --json: the rows, their mean and spread, and what produced them."""
    returns = [e["return"] for e in episodes]
    env_id = ENV_ID if kind == "official" else f"{ENV_ID} {kind}"
    return {
        "env_id": env_id,
        "policy": policy,
        "models": models,
        "versions": versions(),
        "episodes": episodes,
        "mean": round(float(np.mean(returns)), 2),
        "std": round(float(np.std(returns)), 2),
        "median": round(float(np.median(returns)), 2),
        "worst": min(returns),
        "laps_finished": sum(e["lap_finished"] for e in episodes),
    }


# ------------------------------------------------------------------ scores on disk


def row_name(policy, args):
    """A policy's name in tables and reports: an expert that does not drive at full pace says so."""
    calm = policy == "expert" and args.pace != 1
    return f"expert, pace {args.pace:g}" if calm else policy


class Report:
    """The file of --json: written after each drive, and gone on with where it was not finished.

    What decides a score, the settings, is in it; drives of other settings or nets are not taken.
    """

    def __init__(self, path, args, drivers):
        """path: a Path, or None for no file. Refuses a file that this script did not write."""
        self.path, self.args, self.rows = path, args, {}
        if path is None:
            return
        self.stream = is_stream(path)
        settings = {k: v for k, v in vars(args).items() if k not in OUTPUT_FLAGS}
        settings |= {
            "code": code_key(),
            "nets": {
                policy: {k: fingerprint(net) for k, net in driver.nets.items()}
                for policy, driver in drivers.items()
            },
        }
        self.settings = json.loads(json.dumps(settings, default=str))
        self.settings |= {"versions": versions()}
        if self.stream:
            return
        known = self._read()
        if not known:
            return
        if known.get("finished", True):
            return self._back_up("finished")
        now, then = (
            {k: json.dumps(v) for k, v in x.items()} for x in (self.settings, known["settings"])
        )
        other = sorted(k for k in now.keys() | then.keys() if now.get(k) != then.get(k))
        if other:
            return self._back_up(f"unfinished, with other {', '.join(other)}")
        self.rows = {
            name: {e["track_seed"]: e for e in r["episodes"]} for name, r in known["rows"].items()
        }
        print(f"{path}: goes on behind {sum(map(len, self.rows.values()))} drives")

    def _read(self):
        """The report that is there, or {}."""
        if not self.path.exists() or not self.path.stat().st_size:
            return {}
        try:
            known = json.loads(self.path.read_bytes())
            if not any(keys <= known.keys() for keys in REPORT_KEYS):
                raise ValueError("other keys")
            if not known.get("finished", True):
                for report in known["rows"].values():
                    summary(report["policy"], report["episodes"])
                    [e["track_seed"] for e in report["episodes"]]
                known["settings"].keys()
        except (ValueError, LookupError, TypeError, AttributeError):
            fail(
                f"--json {self.path}: is there already and no report of drive_mpc.py; choose "
                "another name"
            )
        return known

    def _back_up(self, what):
        """Gives the report that is there another name: no score is lost to a new drive."""
        aside = self.path.with_name(
            f"{self.path.stem}-{time.strftime('%Y%m%d-%H%M%S')}{self.path.suffix}"
        )
        os.replace(self.path, aside)
        print(f"{self.path}: {what}; it is {aside.name} now, drives anew")

    def save(self, reports, last=False, finished=False):
        """Writes {name: summary}; into a stream only the last one. Where that fails after a drive
        it says so, for the drives are not lost yet."""
        if self.path is None or self.stream and not last:
            return
        body = reports.get(row_name(self.args.policy, self.args), {}) | {
            "settings": self.settings,
            "finished": finished,
            "rows": reports,
        }
        text = json.dumps(body, indent=1) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_atomically(self.path, lambda f: f.write(text.encode()))
        except OSError as e:
            if last:
                raise
            tqdm.write(f"{self.path}: not written ({e.strerror}); tries again after the next drive")


def compare(reports, env_name):
    """The table of several policies on the same tracks."""
    tracks = [e["track_seed"] for r in reports for e in r["episodes"]]
    wide = max(10, *(len(r["policy"]) for r in reports))
    lines = [
        f"{'driver':{wide}} {'mean ± std':>15} {'median':>6} {'worst':>6} {'laps':>7} "
        f"{'missed':>6} {'steps':>6} {'plan ms':>7}   tracks {min(tracks)} to "
        f"{max(tracks)}, {env_name} env"
    ]
    for r in reports:
        of = lambda key: np.mean([e[key] for e in r["episodes"]])
        laps = f"{r['laps_finished']}/{len(r['episodes'])}"
        lines.append(
            f"{r['policy']:{wide}} {r['mean']:7.1f} ± {r['std']:5.1f} {r['median']:6.1f} "
            f"{r['worst']:6.1f} {laps:>7} {of('tiles_missed'):6.1f} {of('steps'):6.0f} "
            f"{of('plan_ms_p50'):7.1f}"
        )
    lines += sorted({f"weights of {r['models']}" for r in reports if r["models"]})
    return "\n".join(lines)
