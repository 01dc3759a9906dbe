"""The log of a run, and its curves."""

import json
import math
import shlex
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

from support.cli import optional
from support.distributed import RANK
from support.files import git_commit, versions, writable
from support.pictures import pyplot, save_figure

POINTS = 20  # lines of a log at least, where there are so many steps


class RunLog:
    """`ROOT/models/<stage>.jsonl`, one JSON object a line, and `ROOT/visuals/<stage>_curves.png`.

    The first line of a run holds command, arguments, versions and commit. Lines are appended, so
    a resumed run continues its curves; a fresh run starts the file anew. With --tensorboard the
    same goes to `ROOT/models/tensorboard/<stage>`. Of several ranks the first one writes. Where it
    cannot be written, a line says so and the run goes on.
    """

    def __init__(self, args, stage, resumed=False):
        self.start, self.last, self.every = time.monotonic(), -math.inf, args.log_every
        self.lost = False  # whether the last line could not be written
        self.path = writable(args.root / "models") / f"{stage}.jsonl"
        self.png = writable(args.root / "visuals") / f"{stage}_curves.png"
        if not resumed and RANK == 0:
            self.path.unlink(missing_ok=True)
        self._write(
            {
                "command": shlex.join(sys.argv),
                "time": time.strftime("%F %T"),
                "args": {k: str(v) for k, v in vars(args).items()},
                "versions": versions(),
                "commit": git_commit(),
            }
        )
        self.board = summary_writer(args, stage, self.rows()) if args.tensorboard else None

    def _write(self, row):
        if RANK:
            return
        try:
            with open(self.path, "a") as f:
                f.write(json.dumps(row) + "\n")
            self.lost = False
        except OSError as e:
            if not self.lost:
                tqdm.write(
                    f"{self.path}: {e.strerror}; lines of the log are lost until it can be "
                    "written again"
                )
            self.lost = True

    def rows(self):
        """The steps logged so far, in order; a line that a kill tore is passed over."""
        rows = []
        for line in self.path.read_text().splitlines() if self.path.is_file() else ():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return sorted((r for r in rows if "step" in r), key=lambda r: r["step"])

    def due(self, step, steps):
        """Whether this step is logged: --log_every seconds after the last line, and POINTS times in
        all steps, so that short runs have curves too; on the first rank."""
        return RANK == 0 and (
            step % max(1, steps // POINTS) == 0 or time.monotonic() - self.last >= self.every
        )

    def log(self, step, **values):
        """One line; tensors and numpy numbers become floats (this is where the device waits)."""
        self.last = time.monotonic()
        numbers = {
            k: v.item() if isinstance(v, torch.Tensor) else float(v) for k, v in values.items()
        }
        values = {k: float(f"{v:.9g}") for k, v in numbers.items()}  # float32 to the last bit
        self._write({"step": int(step), "seconds": round(self.last - self.start, 1), **values})
        if self.board:
            for k, v in values.items():
                self.board.add_scalar(k, v, int(step))
        return values

    def curves(self):
        """Redraws the picture: one panel a quantity, `val_x` over `x`, and `untrained_x`, what a
        net had before its training, as a dashed line: the one to beat."""
        rows = self.rows()
        names = [
            k for k in dict.fromkeys(k for r in rows for k in r) if k not in ("step", "seconds")
        ]
        panels = dict.fromkeys(n.removeprefix("val_").removeprefix("untrained_") for n in names)
        if not panels:
            return
        plt = pyplot()
        cols = min(4, len(panels))
        fig, axes = plt.subplots(
            -(-len(panels) // cols),
            cols,
            squeeze=False,
            figsize=(3.4 * cols, 2.5 * -(-len(panels) // cols)),
            layout="constrained",
        )
        for ax in axes.flat[len(panels) :]:
            ax.axis("off")
        for ax, name in zip(axes.flat, panels):
            for key, style in (
                (name, dict(lw=1, marker=".", ms=2, color="tab:blue", label="train")),
                (
                    "val_" + name,
                    dict(lw=1.5, marker="o", ms=3, color="tab:orange", label="held out"),
                ),
            ):
                pts = np.array([(r["step"], r[key]) for r in rows if key in r])
                if len(pts):
                    ax.plot(*pts.T, **style, clip_on=False)  # an AUC of 1 lies on the edge
            for untrained in [r["untrained_" + name] for r in rows if "untrained_" + name in r][
                -1:
            ]:
                ax.axhline(untrained, color="tab:gray", ls="--", lw=1.2, label="untrained")
            pts = np.array(
                [r[k] for r in rows for k in (name, "val_" + name, "untrained_" + name) if k in r]
            )
            pts = pts[np.isfinite(pts)]
            if len(pts) and (pts > 0).all() and pts.max() > 50 * pts.min():
                ax.set_yscale("log")
            elif len(pts):
                ax.set_ylim(*span(name, pts.min(), pts.max()))
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.set_title(name, fontsize=9)
            ax.tick_params(labelsize=7)
            ax.grid(alpha=0.3)
        shown = {
            label: line for ax in axes.flat for line, label in zip(*ax.get_legend_handles_labels())
        }
        fig.legend(shown.values(), shown.keys(), loc="outside upper right", ncols=3, fontsize=8)
        fig.supxlabel("step", fontsize=8)
        save_figure(fig, self.png)


def span(name, low, high):
    """The ends of a linear axis for values from low to high, so wide that noise does not look like
    learning: R² and AUC up to 1, from 0.9 and 0.5 or below; else a tenth of the values at least."""
    if name.startswith("r2_"):
        return min(0.9, low - 0.05 * (1 - low)), 1.0
    if name.startswith("auc_"):
        return max(0.0, min(0.5, low - 0.02)), 1.0
    middle, half = (low + high) / 2, max(0.55 * (high - low), 0.05 * max(abs(low), abs(high)), 1e-9)
    bottom = middle - half
    return (bottom if low < 0 else max(0.0, bottom)), middle + half


def summary_writer(args, stage, rows):
    """TensorBoard's writer for rank 0; it hides what an earlier run showed beyond its last row."""
    board = optional("torch.utils.tensorboard", "tensorboard")
    folder = args.root / "models" / "tensorboard" / stage
    end = rows[-1]["step"] if rows else 0
    return board.SummaryWriter(folder, purge_step=end + 1) if RANK == 0 else None
