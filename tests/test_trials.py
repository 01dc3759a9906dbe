"""The trials of the driver: recovery, energies of behaviours, the energy landscape."""

import json

import cv2
import pytest
import torch
from conftest import script

from report.trials import draw_landscape
from support.pictures import pyplot
from support.plan_config import to_action


def test_trials_judge_every_driver_by_the_same_starts(tmp_path):
    done = script(
        "report.trials",
        "--starts",
        "4",
        "--turns",
        "2",
        "--tracks",
        "2",
        "--samples",
        "8",
        "--horizon",
        "4",
        "--threads",
        "1",
        root=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "visuals" / "trials.json").read_text())
    assert [r["all"]["n"] for r in found["recovery"].values()] == [4, 4, 4]
    assert found["recovery"]["expert"]["all"]["share"] >= 0.75  # it sees all, and comes back
    for r in found["recovery"].values():
        assert 0 <= r["all"]["low"] <= r["all"]["share"] <= r["all"]["high"] <= 1
    assert {name: r["n"] for name, r in found["turned"].items()} == {
        "mpc": 2,
        "mpc without its memory": 2,
    }
    energies = found["behaviours"]
    for name in ("creeping", "standing on the road", "circling on the grass"):
        for kind in ("density", "classifier"):
            assert energies[name][kind][1] > energies["lapping"][kind][1], (name, kind)
    wrong, same = (energies[f"the {way} way at 45 units/s"]["way"][1] for way in ("wrong", "same"))
    assert wrong > 3 * same
    straight, *_, fast = found["landscape"].values()
    assert abs(straight["steer"]) < 0.15 and straight["gas"] > 0  # as a driver would
    assert fast["brake"] > 0
    image = cv2.imread(str(tmp_path / "visuals" / "energy_landscape.png"))
    assert image is not None and image.std() > 5


def test_a_landscape_has_the_units_that_it_prints_and_no_gas_that_is_forbidden(tmp_path):
    done = script(
        "report.trials",
        "--parts",
        "landscape",
        "--max_gas",
        "0.35",
        "--samples",
        "8",
        "--threads",
        "1",
        root=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "visuals" / "trials.json").read_text())["landscape"]
    assert max(best["gas"] for best in found.values()) == 0.35  # the straight wants more
    for name, best in found.items():
        line = next(x for x in done.stdout.splitlines() if x.startswith(name))
        assert f"steer {best['steer']:+.2f} rad" in line and f"gas {best['gas']:.2f}" in line
        assert abs(best["steer"]) <= 0.5 and 0 <= best["brake"] <= 0.4
    image = cv2.imread(str(tmp_path / "visuals" / "energy_landscape.png"))
    assert image is not None and image.std() > 5


@pytest.mark.parametrize("gas", [1.0, 0.5])
def test_the_lowest_place_is_drawn_where_it_is_printed(gas):
    steer, throttle = torch.linspace(-1, 1, 31), torch.linspace(-1, gas, 31)
    act = to_action(torch.stack(torch.meshgrid(steer, throttle, indexing="ij"), -1)).numpy()
    energy = 1 + 10 * (act[..., 0] - 0.2) ** 2 + (act[..., 1] - 0.9) ** 2 + act[..., 2]
    ax = pyplot().subplots()[1]
    best = draw_landscape(ax, act, energy)
    marker = next(line for line in ax.lines if line.get_label() == "lowest energy")
    assert marker.get_xdata()[0] == pytest.approx(best["steer"]) == pytest.approx(0.2, abs=0.02)
    assert (
        marker.get_ydata()[0]
        == pytest.approx(best["gas"])
        == pytest.approx(min(gas, 0.9), abs=0.05)
    )
    assert "rad" in ax.get_xlabel() and ax.get_xlim() == (-0.5, 0.5)
    assert ax.get_ylim() == pytest.approx((-0.4, gas))
    drawn = ax.collections[0].get_datalim(ax.transData)
    assert drawn.ymax == pytest.approx(gas) and drawn.ymin == pytest.approx(-0.4)
    pyplot().close(ax.figure)
