"""The log of a training run: one JSON object a line, and its curves as a picture."""

import json
import math
import shlex
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

from support.distributed import RANK
from support.files import git_commit, versions, writable
from support.pictures import pyplot, save_figure

POINTS = 20  # lines of a log at least, if the run has so many steps
STYLES = {  # prefix of a key: how its curve looks
    "": dict(lw=1, marker=".", ms=2, color="tab:blue", label="train"),
    "val_": dict(lw=1.5, marker="o", ms=3, color="tab:orange", label="held out"),
}
UNTRAINED_STYLE = dict(lw=1.2, ls="--", color="tab:gray", label="untrained")


class RunLog:
    """`ROOT/models/<stage>.jsonl` and `ROOT/visuals/<stage>_curves.png`.

    The first line of a run holds command, arguments, versions and commit. A resumed run appends.
    A fresh run starts the file anew. Rank 0 writes. A disk that refuses a line costs that line.
    """

    def __init__(self, args, stage, resumed=False):
        self.start, self.last, self.every = time.monotonic(), -math.inf, args.log_every
        self.lost = False  # whether the last line could not be written
        self.path = writable(args.root / "models") / f"{stage}.jsonl"
        self.png = writable(args.root / "visuals") / f"{stage}_curves.png"
        if not resumed and RANK == 0:
            self.path.unlink(missing_ok=True)
        head = dict(command=shlex.join(sys.argv), time=time.strftime("%F %T"))
        head["args"] = {k: str(v) for k, v in vars(args).items()}
        self._write(head | dict(versions=versions(), commit=git_commit()))

    def _write(self, row):
        if RANK:
            return
        try:
            with open(self.path, "a") as f:
                f.write(json.dumps(row) + "\n")
            self.lost = False
        except OSError as e:
            if not self.lost:
                tqdm.write(f"{self.path}: {e.strerror}; its lines are lost for now")
            self.lost = True

    def due(self, step, steps):
        """Whether rank 0 logs this step: every --log_every seconds, and POINTS times in a run."""
        regular = step % max(1, steps // POINTS) == 0
        return RANK == 0 and (regular or time.monotonic() - self.last >= self.every)

    def log(self, step, **values):
        """Writes a line. Tensors and numpy numbers become floats: here a GPU is waited for."""
        self.last = time.monotonic()
        numbers = {k: float(v.item() if torch.is_tensor(v) else v) for k, v in values.items()}
        values = {k: float(f"{v:.9g}") for k, v in numbers.items()}  # float32 to the last bit
        self._write({"step": int(step), "seconds": round(self.last - self.start, 1), **values})
        return values

    def rows(self):
        """The logged steps, in order. A line that a kill tore is left out."""
        rows = []
        for line in self.path.read_text().splitlines() if self.path.is_file() else ():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return sorted((r for r in rows if "step" in r), key=lambda r: r["step"])

    def curves(self):
        """Draws the picture: one panel per quantity x, with `val_x` and `untrained_x`."""
        rows = self.rows()
        keys = dict.fromkeys(k for r in rows for k in r if k not in ("step", "seconds"))
        panels = dict.fromkeys(k.removeprefix("val_").removeprefix("untrained_") for k in keys)
        if not panels:
            return
        plt = pyplot()
        cols = min(4, len(panels))
        size = dict(nrows=-(-len(panels) // cols), ncols=cols)
        figsize = 3.4 * size["ncols"], 2.5 * size["nrows"]
        fig, axes = plt.subplots(**size, squeeze=False, figsize=figsize, layout="constrained")
        for ax in axes.flat[len(panels) :]:
            ax.axis("off")
        for ax, name in zip(axes.flat, panels):
            draw_curve(ax, name, rows)

        # one legend for all panels
        handles = [ax.get_legend_handles_labels() for ax in axes.flat]
        lines = {label: line for lines, labels in handles for line, label in zip(lines, labels)}
        fig.legend(lines.values(), lines.keys(), loc="outside upper right", ncols=3, fontsize=8)
        fig.supxlabel("step", fontsize=8)
        save_figure(fig, self.png)


def draw_curve(ax, name, rows):
    """One panel: training, held out, and as a dashed line to beat the untrained net."""
    values = []
    for prefix, style in STYLES.items():
        points = np.array([(r["step"], r[prefix + name]) for r in rows if prefix + name in r])
        if len(points):
            ax.plot(*points.T, **style, clip_on=False)  # an AUC of 1 lies on the edge
            values.append(points[:, 1])
    untrained = [r["untrained_" + name] for r in rows if "untrained_" + name in r]
    for value in untrained[-1:]:
        ax.axhline(value, **UNTRAINED_STYLE)
        values.append([value])

    values = np.concatenate(values)
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() > 50 * values.min():
        ax.set_yscale("log")
    elif len(values):
        ax.set_ylim(*axis_limits(name, values.min(), values.max()))
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_title(name, fontsize=9)
    ax.tick_params(labelsize=7)
    ax.grid(alpha=0.3)


def axis_limits(name, low, high):
    """Ends of a linear axis, wide enough that noise does not look like learning.

    R² and AUC end at 1 and begin at 0.9 and 0.5 or below. Others span a tenth of their values.
    """
    if name.startswith("r2_"):
        return min(0.9, low - 0.05 * (1 - low)), 1.0
    if name.startswith("auc_"):
        return max(0.0, min(0.5, low - 0.02)), 1.0
    middle = (low + high) / 2
    half = max(0.55 * (high - low), 0.05 * max(abs(low), abs(high)), 1e-9)
    bottom = middle - half
    return (bottom if low < 0 else max(0.0, bottom)), middle + half
