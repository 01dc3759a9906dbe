"""The report card as tables, printed and drawn.

An estimate is {value, low, high, n, tracks}, as `bootstrap_intervals` makes it.
"""

from typing import NamedTuple

import numpy as np

from report.dreams import FAR
from report.episodes import TRAINED
from report.futures import COLOURS, SCORERS
from report.plans import STD
from report.probes import AHEAD, LOOKS, OFF_ROAD, PROBED
from support.pictures import plain, pyplot, save_figure
from support.reconstruction import SCORES

PIXEL_STEPS = (1, 2, 3, 5, 10, 15)  # in the table of decoded rollouts
STEPS = (1, 2, 3, 5, 10, 15, 20, FAR)  # latents ahead in the table of rollout errors


class Table(NamedTuple):
    """One part of the card."""

    title: str
    columns: list
    rows: dict  # {name: [estimate of each column]}
    low_is_good: bool = False
    uncoloured: tuple = ()  # rows that are neither good nor bad


def probes_table(found):
    n = found["this encoder"]["speed"]["n"]
    title = f"1. Probes: R² where the road is in view (n = {n}), AUC of a wheel off the road"
    columns = [*PROBED, OFF_ROAD, *LOOKS]
    return Table(title, columns, {name: [*row.values()] for name, row in found.items()})


def rollouts_table(found):
    n, own = found["all"]["copy-last"][0]["n"], "this predictor"
    title = f"2. Rollouts: squared error over copy-last's, latents ahead (n = {n})"
    rows = found["all"] | {f"{own}, {s}": rows[own] for s, rows in found.items() if s != "all"}
    rows = {name: [row[k - 1] for k in STEPS] for name, row in rows.items()}
    return Table(title, [f"+{k}" for k in STEPS], rows, low_is_good=True)


def futures_table(found):
    last = max(AHEAD)
    columns = [(TRAINED, h) for h in AHEAD] + [(scorer, last) for scorer in SCORERS[1:]]
    rows = {v: [by[scorer][h]["auroc"] for scorer, h in columns] for v, by in found.items()}
    names = [f"{scorer} +{h}" for scorer, h in columns]
    return Table("3. Futures: AUROC against true ones", names, rows, uncoloured=COLOURS)


def plans_table(found):
    rows = {figure: [by[figure] for by in found.values()] for figure in found["all"]}
    n = found["all"]["spearman"]["n"]
    title = f"4. Plans: rank correlation of low energy and outcome in {n} states; regrets in tiles"
    tiles = tuple(name for name in rows if "regret" in name or name == STD)
    return Table(title, list(found), rows, uncoloured=tiles)


def present_table(found):
    rows = found["present"]
    title = f"5. Reconstructions of the present (n = {rows['this decoder'][0]['n']} frames)"
    return Table(title, list(SCORES), rows, uncoloured=tuple(rows))


def pixels_table(found):
    found = found["rollouts"]
    title = f"5. Decoded rollouts: PSNR in dB (n = {found['all']['copy-last'][0]['n']})"
    rows = {f"{name}, {s}": row for s, by in found.items() for name, row in by.items()}
    rows = {name: [row[k - 1] for k in PIXEL_STEPS] for name, row in rows.items()}
    return Table(title, [f"+{k}" for k in PIXEL_STEPS], rows, uncoloured=tuple(rows))


def long_dreams_table(part, title):
    """The table of a part of `evaluate_long_dreams`."""

    def table(found):
        rows = {name: [*row.values()] for name, row in found[part].items()}
        columns = list(next(iter(found[part].values())))
        plain_rows = tuple(rows) if part in ("samples", "drivers") else ()
        return Table(f"6. Long dreams: {title}", columns, rows, part == "roads", plain_rows)

    return table


def as_text(estimate):
    """An estimate as "value ± half its interval"; a text stays as it is."""
    if isinstance(estimate, str):
        return estimate
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    if value is None:
        return "-"
    return f"{value:.3f} ±   ?" if low is None else f"{value:.3f} ±{(high - low) / 2:.2f}"


def print_table(title, columns, rows):
    """Prints rows {name: [estimate or text]} below their columns."""
    lines = {name: [as_text(cell) for cell in row] for name, row in rows.items()}
    lines = {"": columns} | lines
    first = max(map(len, lines)) + 2
    width = max(len(cell) for row in lines.values() for cell in row) + 2
    print(f"\n{title}")
    for name, row in lines.items():
        print(f"{name:{first}}" + "".join(f"{cell:>{width}}" for cell in row), flush=True)


def draw_table(ax, table):
    """The same table in colours: green is good, red is bad."""
    rows = table.rows.values()
    values = np.array([[estimate["value"] for estimate in row] for row in rows], float)
    shade = np.clip(1 - values if table.low_is_good else values, 0, 1)
    shade[[name in table.uncoloured for name in table.rows]] = np.nan
    ax.imshow(shade, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto", alpha=0.75)
    for i, row in enumerate(rows):
        for j, estimate in enumerate(row):
            ax.text(j, i, as_text(estimate), ha="center", va="center", fontsize=7)
    names = [column.replace(", ", ",\n") for column in table.columns]  # narrow columns
    ax.set_xticks(range(len(names)), names, fontsize=7)
    ax.set_yticks(range(len(table.rows)), table.rows, fontsize=7)
    ax.tick_params(length=0)
    ax.set_title(table.title, fontsize=9, loc="left")


def draw_page(tables, title, path):
    """Draws the tables below each other."""
    heights = [len(table.rows) + 2 for table in tables]
    options = dict(squeeze=False, height_ratios=heights, layout="constrained")
    fig, axes = pyplot().subplots(len(tables), figsize=(12, 0.28 * sum(heights) + 1), **options)
    for table, ax in zip(tables, axes.flat):
        draw_table(ax, table)
    fig.suptitle(plain(title), fontsize=10)
    save_figure(fig, path)
