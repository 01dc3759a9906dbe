"""The report card: what stands in it, and what it refuses."""

import json
import math
import shutil

import cv2
import pytest
import torch
from conftest import script

from evaluate import CARD, main, possible
from report.dreams import FAR
from report.futures import SCORERS, VIOLATIONS
from report.models import Models
from report.plans import POOLED
from report.probes import AHEAD, LOOKS, OFF_ROAD, PROBED, SUPERVISED
from support.cli import Refusal
from support.reconstruction import SCORES

TINY = (
    "--tracks 2 --train_frames 500 --frames 100 --windows 10 --states 1 --samples 16 "
    "--replayed_plans 4 --supervised_steps 3 --supervised_batch 8 --bootstrap 5 "
    "--autoencoder_steps 2"
).split()
SOURCES = ["data_race", "data_recovery", "data"]


@pytest.fixture(scope="module")
def card(chain):
    """(report.json, what was printed, ROOT/visuals) of the small chain."""
    root, _ = chain
    done = script("evaluate.py", *TINY, "--threads", "1", root=root)  # two would spin beside others
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((root / "visuals" / "report.json").read_text()), done.stdout, root / "visuals"


def sound(estimate, low=-math.inf, high=math.inf):
    """A figure that was measured, its interval around it or near."""
    assert estimate["n"] > 0 and estimate["tracks"] > 0
    assert low <= estimate["value"] <= high, estimate
    if estimate["tracks"] == 1:  # says nothing of others
        assert estimate["low"] is None and estimate["high"] is None, estimate
    else:
        assert estimate["low"] <= estimate["high"], estimate
    return estimate["value"]


def test_the_card_says_what_made_it(card):
    report, said, _ = card
    assert {"command", "commit", "versions", "args", "checkpoint", "encoder"} <= set(report)
    assert set(report["parts"]) == set(CARD)
    tracks = [t for source in SOURCES for t in report["tracks"][source]]
    assert tracks == list(range(200_000, 200_006))  # for choosing, a track an episode
    for words in (
        "1. Probes",
        "2. Rollouts",
        "3. Futures",
        "4. Plans",
        "5. Reconstructions",
        "5. Decoded rollouts",
        "report_dreams.png",
        "gas up to 0.5, stored with the cost model",
    ):
        assert words in said
    assert report["args"]["max_gas"] == "0.5"


@pytest.mark.slow
def test_without_episodes_or_nets_it_tests_the_weights_that_come_with_the_code(tmp_path):
    done = script(
        "evaluate.py",
        *TINY,
        "--parts",
        "probes",
        "--supervised_steps",
        "0",
        "--threads",
        "1",
        root=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "weights that come with the code" in done.stdout and "no episodes there" in done.stdout
    report = json.loads((tmp_path / "visuals" / "report_only_probes.json").read_text())
    assert "pretrained" in report["checkpoint"]
    assert report["parts"]["probes"]["this encoder"]["speed"]["value"] > 0.8


def test_every_probe_stands_in_the_card_and_one_saw_labels(card):
    rows = card[0]["parts"]["probes"]
    expected = {"this encoder", "untrained encoder", "PCA of the pixels", SUPERVISED}
    for h in AHEAD:
        expected |= {f"predicted +{h}, probe of {kind}" for kind in ("real", "predicted")}
        expected |= {f"not predicted +{h}, from z now"}
    assert set(rows) == expected
    for row in rows.values():
        assert set(row) == {*PROBED, OFF_ROAD, *LOOKS}
        for name in PROBED:
            sound(row[name], high=1)
        sound(row[OFF_ROAD], 0, 1)
    road = rows["this encoder"]
    assert road["speed"]["n"] < road[OFF_ROAD]["n"]  # off road is scored in all frames


def test_rollouts_are_measured_against_copy_last(card):
    found = card[0]["parts"]["dreams"]
    assert set(found) == {"all", *SOURCES}
    for rows in found.values():
        nulls = {"copy-last", "swapped actions", "untrained predictor"}
        assert set(rows) == {"this predictor", *nulls}
        assert all(len(row) == FAR and sound(c, 0) > 0 for row in rows.values() for c in row)
        assert all(c["value"] == c["low"] == c["high"] == 1 for c in rows["copy-last"])
    assert found["all"]["copy-last"][0]["n"] == sum(found[s]["copy-last"][0]["n"] for s in SOURCES)


def test_reconstructions_stand_beside_other_codes(card):
    found = card[0]["parts"]["reconstructions"]
    dim = card[0]["encoder"]["dim"]
    others = {"ridge regression", "ridge, untrained encoder", f"PCA of the pixels, {dim} numbers"}
    assert set(found["present"]) == {"this decoder", "autoencoder, 2 steps", *others}
    for row in found["present"].values():
        assert len(row) == len(SCORES)
        assert 5 < sound(row[0]) < 60  # dB
    assert set(found["rollouts"]) == {"all", *SOURCES}
    for rows in found["rollouts"].values():
        names = {"this predictor", "untrained predictor", "copy-last", "the true latent"}
        assert set(rows) == names and all(len(row) == max(AHEAD) for row in rows.values())
        assert rows["copy-last"][0]["value"] > rows["copy-last"][-1]["value"]


def test_every_violation_is_scored_by_all(card):
    found = card[0]["parts"]["futures"]
    assert set(found) == set(VIOLATIONS)
    for scorers in found.values():
        assert set(scorers) == set(SCORERS)
        for by_step in scorers.values():
            assert set(by_step) == {str(h) for h in AHEAD}
            for figures in by_step.values():
                assert set(figures) == {"auroc"}
                if figures["auroc"]["n"]:
                    sound(figures["auroc"], 0, 1)
    for blind in ("pixel error", "copy-last"):  # to actions
        for violation in ("swapped actions", "mirrored steering"):
            values = {f["auroc"]["value"] for f in found[violation][blind].values()}
            assert values <= {0.5, None} and 0.5 in values
    assert found["frozen"]["pixel error"]["15"]["auroc"]["value"] < 0.1  # the least of changes


def test_plans_are_driven_and_compared_with_the_best(card):
    found = card[0]["parts"]["plans"]
    assert "all" in found and len(found) >= 2
    for figures in found.values():
        assert set(POOLED) < set(figures)
        ranks = [name for name in figures if "regret" not in name and "std" not in name]
        assert len(ranks) == 10 and all(-1 <= sound(figures[name]) <= 1 for name in ranks)
        assert sound(figures["regret of the lowest energy"]) >= 0
        assert sound(figures["regret of a random plan"]) > 0
        assert sound(figures["std of the outcomes"]) > 0.01


@pytest.mark.parametrize("name", ["report.png", "report_dreams.png"])
def test_pictures_are_pictures(card, name):
    image = cv2.imread(str(card[2] / name))
    assert image is not None and min(image.shape[:2]) > 400 and image.std() > 5


# ------------------------------------------------------------------ what is refused or left out


def refused(done, *words):
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "Traceback" not in done.stderr, done.stderr
    assert all(word in said[0] for word in words), said[0]


def models_of(root, folder):
    return Models(root, folder, torch.device("cpu"), torch.float32, seed=0)


def test_weights_that_do_not_fit_are_refused(chain, tmp_path):
    payload = torch.load(chain[0] / "models" / "encoder_mixed_ep2.pth", weights_only=True)
    payload["nets"]["encoder"]["args"]["channels"] = 16
    torch.save(payload, tmp_path / "encoder_mixed_ep1.pth")
    with pytest.raises(Refusal, match="encoder_mixed_ep1.pth.*do not fit.*channels"):
        models_of(chain[0], tmp_path)
    with pytest.raises(Refusal, match="no encoder_mixed_ep"):
        models_of(chain[0], tmp_path / "none")


def test_tracks_for_reporting_are_refused():
    done = script("evaluate.py", "--track_seed", "100000")
    assert done.returncode == 2 and "from 200000 to 290000, found 100000" in done.stderr


def test_parts_without_a_matching_predictor_are_left_out(chain, tmp_path, monkeypatch, capsys):
    root = chain[0]
    for name in SOURCES:
        (tmp_path / name).symlink_to(root / name)
    models = tmp_path / "models"
    shutil.copytree(root / "models", models)
    (models / "encoder_mixed_ep2.pth").unlink()  # what predictor and cost model were trained on
    flags = [*TINY, "--supervised_steps", "0", "--root", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *flags])
    assert main() == 0
    said = capsys.readouterr().out
    assert "belongs to another encoder" in said
    assert all(f"left out: {part}" in said for part in ("dreams", "futures", "plans"))
    report = json.loads((tmp_path / "visuals" / "report_only_probes.json").read_text())
    assert report["checkpoint"].endswith("ep1.pth") and set(report["parts"]) == {"probes"}
    assert set(report["parts"]["probes"]) == {
        "this encoder",
        "untrained encoder",
        "PCA of the pixels",
    }
    assert cv2.imread(str(tmp_path / "visuals" / "report_only_probes.png")).std() > 5
    with pytest.raises(Refusal, match="--parts plans"):
        possible(models_of(tmp_path, None), ["plans"])
