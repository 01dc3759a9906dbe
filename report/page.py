"""The report card as text and as a picture."""

import math

import numpy as np

from report.dreams import FAR
from report.episodes import JUDGES, OWN
from report.futures import COLOURS
from report.plans import FIGURES, POOLED
from report.probes import AHEAD, OFF_ROAD, PROBED
from support.pictures import plain, pyplot, save_figure

# ------------------------------------------------------------------ tables


def text(cell):
    """A cell as "value ± half its interval"."""
    if cell["value"] is None:
        return "-"
    if cell["low"] is None:
        return f"{cell['value']:.3f} ±   ?"
    return f"{cell['value']:.3f} ±{(cell['high'] - cell['low']) / 2:.2f}"


def table(title, columns, rows, first, wide=15):
    """Prints rows {name: [cell or text]} below their columns."""
    print(f"\n{title}\n{'':{first}}" + "".join(f"{c:>{wide}}" for c in columns))
    for name, row in rows.items():
        print(
            f"{name:{first}}"
            + "".join(f"{c if isinstance(c, str) else text(c):>{wide}}" for c in row),
            flush=True,
        )


def show_knows(rows):
    names, n = (*PROBED, OFF_ROAD), rows["this encoder, ridge"]["cells"]
    table(
        f"1. What the latent knows: R² where the road is in view (n = {n['speed']['n']}), AUC of "
        f"a wheel off the road (n = {n[OFF_ROAD]['n']})",
        names,
        {name: [row["cells"][q] for q in names] for name, row in rows.items()},
        34,
    )


def show_dreams(found):
    steps = (1, 2, 3, 5, 10, 15, 20, FAR)
    for source, rows in found.items():
        n = rows["copy-last"][0]["n"]
        table(
            f"2. How long dreams hold: squared error over copy-last's, {source} (n = {n})",
            [f"+{k}" for k in steps],
            {name: [row[k - 1] for k in steps] for name, row in rows.items()},
            22,
            13,
        )


def show_futures(found):
    for judge in JUDGES:
        table(
            f"3. Impossible futures: AUROC against true ones, {judge}",
            [f"+{h}" for h in AHEAD],
            {v: [by[judge][h]["auroc"] for h in AHEAD] for v, by in found.items()},
            28,
        )
    own = {v: by[OWN] for v, by in found.items()}
    figures = [(what, h) for what in ("tpr_at_1pct", "pairs") for h in AHEAD]
    table(
        "3. This model: share found at 1 % false alarms (f), share of pairs told apart (p)",
        [*(f"{what[0].replace('t', 'f')} +{h}" for what, h in figures), f"n +{max(AHEAD)}"],
        {
            v: [*(by[h][what] for what, h in figures), str(by[max(AHEAD)]["auroc"]["n"])]
            for v, by in own.items()
        },
        28,
        13,
    )


def show_plans(found):
    table(
        "4. Does its judgement match the world: rank correlation of low energy and true outcome "
        "within a state, regrets in tiles",
        list(found),
        {figure: [found[source][figure] for source in found] for figure in (*FIGURES, *POOLED)}
        | {"states": [str(found[source]["spearman"]["n"]) for source in found]},
        38,
    )


# ------------------------------------------------------------------ the page


def heat(ax, values, shade, rows, columns, title):
    """A table of numbers (n, m), nan blank, in colours: a shade of 1 is good, 0 is bad."""
    ax.imshow(np.clip(shade, 0, 1), cmap="RdYlGn", vmin=0, vmax=1, aspect="auto", alpha=0.75)
    for (i, j), v in np.ndenumerate(values):
        if np.isfinite(v):
            ax.text(
                j, i, f"{v:.2f}" if v > -9.95 else "< -9.9", ha="center", va="center", fontsize=7
            )
    ax.set_xticks(range(len(columns)), columns, fontsize=7)
    ax.set_yticks(range(len(rows)), rows, fontsize=7)
    ax.tick_params(length=0)
    ax.set_title(title, fontsize=9, loc="left")


def number(cell, which="value"):
    return math.nan if cell[which] is None else cell[which]


def page_knows(ax, rows):
    values = np.array(
        [[number(row["cells"][q]) for q in (*PROBED, OFF_ROAD)] for row in rows.values()]
    )
    columns = [q.replace("_", "\n") for q in PROBED] + ["off road\n(AUC)"]
    heat(
        ax,
        values,
        values,
        list(rows),
        columns,
        "1. What the latent knows: R² where the road is in view",
    )
    real = sum("imagined" not in name for name in rows)
    for y in range(real, len(rows), max(1, (len(rows) - real) // len(AHEAD))):
        ax.axhline(y - 0.5, color="white", lw=3)


def page_dreams(ax, found):
    steps = np.arange(1, FAR + 1)
    for i, (name, row) in enumerate(found["all"].items()):
        ax.plot(steps, [c["value"] for c in row], color=f"C{i}", lw=2, label=name)
        if name != "copy-last":
            low, high = ([number(c, which) for c in row] for which in ("low", "high"))
            ax.fill_between(steps, low, high, color=f"C{i}", alpha=0.15, lw=0)
    for (source, rows), style in zip(list(found.items())[1:], ("--", ":", "-.")):
        ax.plot(
            steps,
            [c["value"] for c in rows["this predictor"]],
            color="C0",
            lw=0.9,
            ls=style,
            label=f"this predictor, {source}",
        )
    ax.set(yscale="log", xlim=(1, FAR))
    ax.set_xlabel("latents ahead", fontsize=8)
    ax.set_ylabel("squared error over copy-last's", fontsize=8)
    ticks = [
        t
        for t in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
        if ax.get_ylim()[0] < t < ax.get_ylim()[1]
    ]
    ax.set_yticks(ticks, map(str, ticks))
    ax.set_yticks([], minor=True)
    ax.set_title("2. How long dreams hold", fontsize=9, loc="left")
    ax.grid(alpha=0.3)
    ax.tick_params(labelsize=7)
    ax.legend(fontsize=6.5, ncol=2)


def page_futures(ax, found):
    values = np.array(
        [[number(by[j][h]["auroc"]) for j in JUDGES for h in AHEAD] for by in found.values()]
    )
    columns = [f"+{h}" + (f"\n{j}" if h == AHEAD[1] else "") for j in JUDGES for h in AHEAD]
    control = np.array([v in COLOURS for v in found])[:, None]
    heat(
        ax,
        values,
        np.where(control, 1 - 2 * np.abs(values - 0.5), values),
        list(found),
        columns,
        "3. Impossible futures: AUROC against true ones (0.5: chance, and the control's place)",
    )
    for x in range(1, len(JUDGES)):
        ax.axvline(len(AHEAD) * x - 0.5, color="white", lw=3)
    ax.axhline(len(found) - len(COLOURS) - 0.5, color="white", lw=3)


def page_plans(ax, found, energy, true, spots, bins=8):
    """Mean true outcome, over a random plan's, by rank of dreamt energy within its state."""
    rank = (np.argsort(np.argsort(energy, axis=1), axis=1) + 0.5) / energy.shape[1]
    gain = true - true.mean(axis=1, keepdims=True)
    ax.scatter(rank.ravel(), gain.ravel(), s=4, alpha=0.25, color="grey", lw=0)
    edges = np.linspace(0, 1, bins + 1)
    for i, source in enumerate(dict.fromkeys(spots.source)):
        own = spots.source == source
        which = np.digitize(rank[own], edges[1:-1])
        mean = [gain[own][which == b].mean() if (which == b).any() else np.nan for b in range(bins)]
        r = found[source]["spearman"]["value"]
        ax.plot(
            (edges[1:] + edges[:-1]) / 2,
            mean,
            "o-",
            ms=3,
            color=f"C{i}",
            label=f"{source}: rank correlation {r:.2f}",
        )
    best = gain.max(axis=1).mean()
    ax.axhline(best, color="black", lw=0.9, ls="--", label="the simulator's best")
    ax.axhline(0, color="black", lw=0.9, label="a random plan")
    low, high = np.quantile(gain, [0.005, 0.995])
    ax.set(xlim=(0, 1), ylim=(low, 1.1 * max(high, best)))
    ax.set_xlabel("rank of the dreamt energy among a state's plans (0: lowest)", fontsize=8)
    ax.set_ylabel("true outcome, tiles over a random plan's", fontsize=8)
    ax.set_title("4. Plans: dreamt energy against true outcome", fontsize=9, loc="left")
    ax.tick_params(labelsize=7)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=6.5, loc="lower left")


def draw_page(pages, title, path):
    """All that there is on one page: `pages` is {part: draw(ax)}."""
    plt = pyplot()
    fig, axes = plt.subplot_mosaic(
        [["knows", "futures"], ["dreams", "plans"]],
        figsize=(15, 10),
        layout="constrained",
        height_ratios=[1.15, 1],
    )
    for name, ax in axes.items():
        if name in pages:
            pages[name](ax)
        else:
            ax.axis("off")
            ax.text(0.5, 0.5, f"{name}: left out", ha="center", color="grey")
    fig.suptitle(plain(title), fontsize=10)
    save_figure(fig, path)
