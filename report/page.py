"""The report card as tables of text and as a picture of four panels.

An estimate is {value, low, high, n, tracks}, as `bootstrap_intervals` makes it.
"""

import numpy as np

from report.dreams import FAR
from report.episodes import TRAINED
from report.futures import COLOURS, SCORERS
from report.plans import STD
from report.probes import AHEAD, OFF_ROAD, PROBED
from support.pictures import plain, pyplot, save_figure

STEPS = (1, 2, 3, 5, 10, 15, 20, FAR)  # latents ahead in the table of rollout errors

# ------------------------------------------------------------------ tables


def as_text(estimate):
    """An estimate as "value ± half its interval"; a text stays as it is."""
    if isinstance(estimate, str):
        return estimate
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    if value is None:
        return "-"
    return f"{value:.3f} ±   ?" if low is None else f"{value:.3f} ±{(high - low) / 2:.2f}"


def print_table(title, columns, rows, width=15):
    """Prints rows {name: [estimate or text]} below their columns, each `width` wide."""
    first = max(map(len, rows)) + 2
    print(f"\n{title}\n{'':{first}}" + "".join(f"{c:>{width}}" for c in columns))
    for name, row in rows.items():
        print(f"{name:{first}}" + "".join(f"{as_text(c):>{width}}" for c in row), flush=True)


def print_probes(found):
    counts = found["this encoder"]
    print_table(
        "1. Probes: R² where the road is in view "
        f"(n = {counts['speed']['n']}), AUC of a wheel off the road (n = {counts[OFF_ROAD]['n']})",
        (*PROBED, OFF_ROAD),
        {name: row.values() for name, row in found.items()},
    )


def print_rollouts(found):
    for source, rows in found.items():
        print_table(
            "2. Rollouts: squared error over copy-last's, "
            f"{source} (n = {rows['copy-last'][0]['n']})",
            [f"+{k}" for k in STEPS],
            {name: [row[k - 1] for k in STEPS] for name, row in rows.items()},
        )


def print_futures(found):
    for scorer in SCORERS:
        print_table(
            f"3. Futures: AUROC against true ones, {scorer}",
            [f"+{h}" for h in AHEAD],
            {v: [by[scorer][h]["auroc"] for h in AHEAD] for v, by in found.items()},
        )
    last, own = max(AHEAD), {v: by[TRAINED] for v, by in found.items()}
    shares = {v: [by[h]["tpr_at_1pct"] for h in AHEAD] for v, by in own.items()}
    print_table(
        f"3. Futures: share found at 1 % false alarms, {TRAINED}",
        [*(f"+{h}" for h in AHEAD), f"n +{last}"],
        {v: [*row, str(own[v][last]["auroc"]["n"])] for v, row in shares.items()},
    )


def print_plans(found):
    rows = {figure: [by[figure] for by in found.values()] for figure in found["all"]}
    print_table(
        "4. Plans: rank correlation of low energy and outcome within a state, regrets in tiles",
        list(found),
        rows | {"states": [str(by["spearman"]["n"]) for by in found.values()]},
    )


# ------------------------------------------------------------------ the picture


def number(estimate, key="value"):
    return np.nan if estimate[key] is None else estimate[key]


def draw_table(ax, values, shade, rows, columns):
    """A table of numbers (n, m), nan blank, in colours: a shade of 1 is good, 0 is bad."""
    ax.imshow(np.clip(shade, 0, 1), cmap="RdYlGn", vmin=0, vmax=1, aspect="auto", alpha=0.75)
    for (i, j), v in np.ndenumerate(values):
        if np.isfinite(v):
            label = f"{v:.2f}" if v > -9.95 else "< -9.9"
            ax.text(j, i, label, ha="center", va="center", fontsize=7)
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)
    ax.tick_params(length=0)


def draw_probes(ax, found):
    values = np.array([[number(x) for x in row.values()] for row in found.values()])
    columns = [q.replace("_", "\n") for q in PROBED] + ["off road\n(AUC)"]
    draw_table(ax, values, values, list(found), columns)
    ax.set_title("1. Probes: R² where the road is in view")


def draw_rollouts(ax, found):
    steps = np.arange(1, FAR + 1)
    for i, (name, row) in enumerate(found["all"].items()):
        ax.plot(steps, [x["value"] for x in row], color=f"C{i}", lw=2, label=name)
        if name != "copy-last":
            low, high = ([number(x, key) for x in row] for key in ("low", "high"))
            ax.fill_between(steps, low, high, color=f"C{i}", alpha=0.15, lw=0)
    for (source, rows), style in zip(list(found.items())[1:], ("--", ":", "-.")):
        values = [x["value"] for x in rows["this predictor"]]
        ax.plot(steps, values, style, color="C0", lw=0.9, label=f"this predictor, {source}")
    ax.set(yscale="log", xlim=(1, FAR), xlabel="latents ahead")
    ax.set(ylabel="squared error over copy-last's", title="2. Rollouts")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.grid(alpha=0.3)
    ax.legend(ncol=2)


def draw_futures(ax, found):
    columns = [(scorer, h) for scorer in SCORERS for h in AHEAD]
    values = np.array([[number(by[s][h]["auroc"]) for s, h in columns] for by in found.values()])
    control = np.array([v in COLOURS for v in found])[:, None]
    shade = np.where(control, 1 - 2 * np.abs(values - 0.5), values)
    labels = [f"+{h}" + (f"\n{s}" if h == AHEAD[1] else "") for s, h in columns]
    draw_table(ax, values, shade, list(found), labels)
    ax.set_title("3. Futures: AUROC against true ones (controls belong at chance, 0.5)")
    for x in range(1, len(SCORERS)):
        ax.axvline(len(AHEAD) * x - 0.5, color="white", lw=3)
    ax.axhline(len(found) - len(COLOURS) - 0.5, color="white", lw=3)


def draw_plans(ax, found):
    """The rank correlations; the regrets are in the tables of text only."""
    names = [name for name in found["all"] if "regret" not in name and name != STD]
    values = np.array([[number(by[name]) for by in found.values()] for name in names])
    draw_table(ax, values, values, names, list(found))
    ax.set_title("4. Plans: rank correlation of low energy and true outcome")


def draw_page(found, title, path):
    """Draws the parts found on one page."""
    names = "probes", "futures", "dreams", "plans"
    draw = draw_probes, draw_futures, draw_rollouts, draw_plans
    sizes = {"xtick.labelsize": 7, "ytick.labelsize": 7, "axes.labelsize": 8, "legend.fontsize": 7}
    plt = pyplot()
    with plt.rc_context(sizes | {"axes.titlesize": 9, "axes.titlelocation": "left"}):
        fig, axes = plt.subplots(2, 2, figsize=(15, 10), layout="constrained")
        for name, draw_part, ax in zip(names, draw, axes.flat):
            if name in found:
                draw_part(ax, found[name])
            else:
                ax.axis("off")
                ax.text(0.5, 0.5, f"{name}: left out", ha="center", color="grey")
        fig.suptitle(plain(title), fontsize=10)
        save_figure(fig, path)
