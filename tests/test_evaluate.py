"""The report card: what stands in it, what it refuses, and that its figures can be wrong."""

import argparse
import json
import math
import shutil
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import script
from sklearn.metrics import roc_auc_score

from car import FPS
from car.env import make_env
from car.episode import restore_state, run_episode, save_state
from car.telemetry import TELEMETRY, centre_line, place_car
from collect_race_data import Expert
from collect_recovery_data import FaultyExpert
from evaluate import PARTS, main, possible
from report.dreams import FAR, linear_dream
from report.episodes import (
    JUDGES,
    OWN,
    TWIN,
    Episode,
    Recorder,
    Samples,
    choose_samples,
    numbered,
    on_grid,
    other_episode,
)
from report.futures import FILMS, VIOLATIONS, Scale, detection_metrics, scales
from report.models import Models
from report.page import text
from report.plans import (
    AFTER,
    FIGURES,
    POOLED,
    along,
    lived_frames,
    outcome,
    play,
    taught_outcome,
    way,
)
from report.probes import AHEAD, OFF_ROAD, PROBED, Labels, probe, score_probe
from report.statistics import auc, cells, spearman
from support.cli import Refusal
from support.workers import FIRST_SEED

TINY = (
    "--tracks 2 --train_frames 500 --frames 100 --windows 10 --states 1 --samples 16 "
    "--replayed_plans 4 --supervised_steps 3 --supervised_batch 8 --bootstrap 5"
).split()
SOURCES = ["data_race", "data_recovery", "data"]


@pytest.fixture(scope="module")
def card(chain):
    """(report.json, what was printed, ROOT/visuals) of the small chain."""
    root, _ = chain
    done = script("evaluate.py", *TINY, "--threads", "1", root=root)  # two would spin beside others
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((root / "visuals" / "report.json").read_text()), done.stdout, root / "visuals"


def sound(cell, low=-math.inf, high=math.inf):
    """A figure that was measured, its interval around it or near."""
    assert cell["n"] > 0 and cell["tracks"] > 0
    assert low <= cell["value"] <= high, cell
    if cell["tracks"] == 1:  # says nothing of others
        assert cell["low"] is None and cell["high"] is None, cell
    else:
        assert cell["low"] <= cell["high"], cell
    return cell["value"]


def test_the_card_says_what_made_it(card):
    report, said, _ = card
    assert {"command", "commit", "versions", "args", "checkpoint", "encoder"} <= set(report)
    assert set(report["parts"]) == set(PARTS)
    tracks = [t for source in SOURCES for t in report["tracks"][source]]
    assert tracks == list(range(200_000, 200_006))  # for choosing, a track an episode
    for words in (
        "What the latent knows",
        "How long dreams hold",
        "Impossible futures",
        "match the world",
        "report_dreams.png",
        "gas up to 0.5, stored with the cost model",
    ):
        assert words in said
    assert report["args"]["gas"] == "0.5"


@pytest.mark.slow
def test_without_episodes_or_nets_it_judges_the_weights_that_come_with_the_code(tmp_path):
    done = script(
        "evaluate.py",
        *TINY,
        "--parts",
        "knows",
        "--supervised_steps",
        "0",
        "--threads",
        "1",
        root=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "weights that come with the code" in done.stdout and "no episodes there" in done.stdout
    report = json.loads((tmp_path / "visuals" / "report_only_knows.json").read_text())
    assert "pretrained" in report["checkpoint"]
    assert report["parts"]["knows"]["this encoder, ridge"]["cells"]["speed"]["value"] > 0.8


def test_every_probe_stands_in_the_card_and_one_saw_labels(card):
    rows = card[0]["parts"]["knows"]
    nets = ("this encoder", "untrained encoder", "PCA of the pixels", "ceiling, saw the labels")
    expected = {f"{n}, {kind}" for n in nets for kind in ("ridge", "mlp")}
    for h in AHEAD:
        expected |= {
            f"imagined +{h}, probe of real",
            f"imagined +{h}, probe of imagined",
            f"not imagined +{h}, from z now",
        }
    assert set(rows) == expected
    assert {n for n, row in rows.items() if row["saw_labels"]} == {
        "ceiling, saw the labels, ridge",
        "ceiling, saw the labels, mlp",
    }
    for row in rows.values():
        assert set(row["cells"]) == {*PROBED, OFF_ROAD}
        for name in PROBED:
            sound(row["cells"][name], high=1)
        sound(row["cells"][OFF_ROAD], 0, 1)
    road = rows["this encoder, ridge"]["cells"]
    assert road["speed"]["n"] < road[OFF_ROAD]["n"]  # off road is judged in all frames


def test_dreams_are_measured_against_copy_last(card):
    found = card[0]["parts"]["dreams"]
    assert set(found) == {"all", *SOURCES}
    for rows in found.values():
        assert set(rows) == {
            "this predictor",
            "copy-last",
            "swapped actions",
            "untrained predictor",
            "linear predictor",
        }
        assert all(len(row) == FAR and sound(c, 0) > 0 for row in rows.values() for c in row)
        assert all(c["value"] == c["low"] == c["high"] == 1 for c in rows["copy-last"])
    assert found["all"]["copy-last"][0]["n"] == sum(found[s]["copy-last"][0]["n"] for s in SOURCES)


def test_every_violation_is_judged_by_all(card):
    found = card[0]["parts"]["futures"]
    assert set(found) == set(VIOLATIONS)
    for judges in found.values():
        assert set(judges) == set(JUDGES)
        for by_step in judges.values():
            assert set(by_step) == {str(h) for h in AHEAD}
            for figures in by_step.values():
                assert {"auroc", "tpr_at_1pct", "pairs"} == set(figures)
                if figures["auroc"]["n"]:
                    assert all(0 <= c["value"] <= 1 for c in figures.values())
    for blind in ("pixel error", "copy-last"):  # to actions
        for lie in ("swapped actions", "mirrored steering"):
            values = {f["auroc"]["value"] for f in found[lie][blind].values()}
            assert values <= {0.5, None} and 0.5 in values
    assert found["frozen"]["pixel error"]["15"]["auroc"]["value"] < 0.1  # the least of changes


def test_plans_are_driven_and_compared_with_the_best(card):
    found = card[0]["parts"]["plans"]
    assert "all" in found and len(found) >= 2
    for figures in found.values():
        assert set(figures) == {*FIGURES, *POOLED}
        ranks = [name for name in figures if "regret" not in name and "spread" not in name]
        assert len(ranks) == 10 and all(-1 <= sound(figures[name]) <= 1 for name in ranks)
        assert sound(figures["regret of the simulator's best"]) == 0
        assert sound(figures["regret of the lowest energy"]) >= 0
        assert sound(figures["regret of a random plan"]) > 0
        assert sound(figures["spread of the outcomes"]) > 0.01


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


def test_bad_checkpoints_are_refused(chain, tmp_path):
    models = chain[0] / "models"
    refused(
        script("evaluate.py", "--checkpoint", models / "predictor_ep2.pth", root=chain[0]),
        "predictor_ep2.pth",
        "expected a net named encoder",
    )
    with pytest.raises(Refusal, match="none.pth: not found; .*train_encoder.py"):
        Models(flags(chain[0], tmp_path / "none.pth"))
    payload = torch.load(models / "encoder_mixed_ep2.pth", weights_only=True)
    payload["nets"]["encoder"]["args"]["channels"] = 16
    torch.save(payload, tmp_path / "wide.pth")
    with pytest.raises(Refusal, match="wide.pth.*do not fit.*channels"):
        Models(flags(chain[0], tmp_path / "wide.pth"))


def flags(root, checkpoint):
    """What Subject looks at."""
    return argparse.Namespace(
        root=root,
        models=None,
        checkpoint=checkpoint,
        device="cpu",
        precision="fp32",
        threads=0,
        seed=0,
        parts=["plans"],
    )


def test_tracks_for_reporting_are_refused():
    done = script("evaluate.py", "--track_seed", "100000")
    assert done.returncode == 2 and "from 200000 to 299999, found 100000" in done.stderr


def test_parts_without_a_matching_predictor_are_left_out(chain, tmp_path, monkeypatch, capsys):
    root = chain[0]
    for name in SOURCES:
        (tmp_path / name).symlink_to(root / name)
    models = tmp_path / "models"
    shutil.copytree(root / "models", models)
    monkeypatch.setattr(
        "sys.argv",
        [
            "evaluate.py",
            *TINY,
            "--supervised_steps",
            "0",
            "--root",
            str(tmp_path),
            "--checkpoint",
            str(models / "encoder_mixed_ep1.pth"),
        ],
    )
    assert main() == 0
    said = capsys.readouterr().out
    assert "trained on another encoder" in said
    assert all(f"left out: {part}" in said for part in ("dreams", "futures", "plans"))
    report = json.loads((tmp_path / "visuals" / "report_only_knows.json").read_text())
    assert report["checkpoint"].endswith("ep1.pth") and set(report["parts"]) == {"knows"}
    assert not any("imagined" in row or "ceiling" in row for row in report["parts"]["knows"])
    assert cv2.imread(str(tmp_path / "visuals" / "report_only_knows.png")).std() > 5
    args = flags(root, models / "encoder_mixed_ep1.pth")
    with pytest.raises(Refusal, match="--parts plans"):
        possible(Models(args), args)


# ------------------------------------------------------------------ that the figures can be wrong


def test_auc_is_that_of_scikit_learn_ties_included():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, 200), rng.integers(2, 12, 300)
    labels = np.r_[np.zeros(200), np.ones(300)]
    assert abs(auc(b, a) - roc_auc_score(labels, np.r_[a, b])) < 1e-12


def test_a_future_swapped_with_itself_is_not_found():
    true = np.random.default_rng(0).random(500)
    assert detection_metrics(true, true)[[0, 2]].tolist() == [0.5, 0.5]
    assert detection_metrics(true, true)[1] <= 0.01
    assert detection_metrics(true, true + 2).tolist() == [1, 1, 1]


def test_films_show_what_their_names_say():
    j = np.array([-2, -1, 0, 1, 2])
    assert FILMS["frozen"](j).tolist() == [-2, -1, 0, 0, 0]
    assert FILMS["time reversed"](j).tolist() == [-2, -1, 0, -1, -2]
    assert FILMS["double speed"](j).tolist() == [-2, -1, 0, 2, 4]


def test_probes_find_what_is_there_and_nothing_else():
    rng, args = np.random.default_rng(0), argparse.Namespace(seed=0, bootstrap=20)
    z = [rng.normal(size=(n, 8)) for n in (800, 300)]
    labels = [
        Labels(x[:, :6] * 3 + 1, np.ones(len(x), bool), x[:, 6] > 0, np.arange(len(x)) % 7)
        for x in z
    ]
    found = score_probe(probe("ridge", z[0], labels[0], 0), z[1], labels[1], args)
    assert all(found[q]["value"] > 0.999 for q in PROBED) and found[OFF_ROAD]["value"] > 0.97
    noise = [rng.normal(size=x.shape) for x in z]
    found = score_probe(probe("ridge", noise[0], labels[0], 0), noise[1], labels[1], args)
    assert all(found[q]["value"] < 0.1 for q in PROBED)
    assert abs(found[OFF_ROAD]["value"] - 0.5) < 0.15


def episodes_of_a_linear_world(count, K=60, D=4):
    rng = np.random.default_rng(0)
    turn, push = np.linalg.qr(rng.normal(size=(D, D)))[0], rng.normal(size=(3, D))
    out = []
    for i in range(count):
        act, z = rng.normal(size=(K - 1, 3)).astype(np.float32) * 0.2, [rng.normal(size=D)]
        for a in act:
            z.append(z[-1] @ turn + a @ push)
        out.append(
            Episode(
                "data",
                i,
                np.zeros((K, 1, 1, 3), np.uint8),
                act,
                np.zeros((K, 20)),
                25,
                z={OWN: torch.from_numpy(np.array(z, np.float32))},
            )
        )
    return out


def test_the_linear_predictor_solves_a_linear_world():
    world = episodes_of_a_linear_world(12)
    fit = choose_samples(world[:10], 120, 0, ahead=5)
    ask = choose_samples(world[10:], 30, 0, ahead=5)
    z = ask.z(0, 5)
    error = (linear_dream(fit, z[:, 0], ask.act(5), 5) - z[:, 1:]).pow(2).mean()
    assert error < 0.01 * (z[:, :1] - z[:, 1:]).pow(2).mean()


def test_swapped_actions_are_of_another_episode():
    spots = Samples(episodes_of_a_linear_world(3), np.repeat([0, 1, 2], [20, 3, 2]), np.arange(25))
    assert (spots.e[other_episode(spots, 0)] != spots.e).all()


def test_a_restored_state_goes_on_as_the_first_one_did():
    """The same positions after 30 steps, in a twin that drove other plans before."""
    env, twin, rng = make_env("physics"), make_env("physics"), np.random.default_rng(0)
    driver = FaultyExpert(1.0)
    env.reset(seed=200_003), twin.reset(seed=200_003)
    driver.reset(env, rng)
    saved, acts, at = [], [], []
    for _ in range(400):
        saved.append(save_state(env))
        at.append((*env.unwrapped.car.hull.position, env.unwrapped.car.hull.angle))
        acts.append(driver.act(env))
        env.step(acts[-1])
    worst, careless = [], []
    for t in range(60, 360, 20):
        restore_state(twin, saved[t])
        *_, car = play(twin, acts[t : t + 30])
        worst.append(np.abs(np.subtract((*car.hull.position, car.hull.angle), at[t + 30])).max())
        place_car(twin, *at[t])  # without speeds and wheels
        *_, car = play(twin, acts[t : t + 30])
        careless.append(np.abs(np.subtract(car.hull.position, at[t + 30][:2])).max())
    assert np.median(worst) < 1e-4 and max(worst) < 1e-3, worst
    assert min(careless) > 1


class Weaver:
    """Holds each action for two steps, on and off the gas, left and right."""

    max_steps = 160

    def reset(self, env, rng):
        self.t = 0

    def act(self, env):
        self.t += 1
        half = (self.t - 1) // 2
        return np.array([0.1 * math.sin(half / 3), 0.3 * (half % 7 > 1), 0], np.float32)


def test_what_really_came_is_filmed_as_it_was():
    env, twin, driver = make_env("fast"), make_env("fast"), Recorder(Weaver(), 2)
    arrays, _ = run_episode(env, driver, 200_004, np.random.default_rng(0))
    episode = on_grid("data", 200_004, arrays, 2, driver.saved)
    twin.reset(seed=200_004)
    plans = np.stack([episode.act[40:55], episode.act[25:40]])
    came = lived_frames(twin, episode, 40, plans, 2).astype(int)
    off = np.abs(came - episode.obs[41:56]).mean(axis=(1, 2, 3, 4))
    assert off[0] < 0.5 and off[1] > 2 * off[0] + 0.2, off  # grey levels, of 255


def test_outcomes_tell_driving_from_standing_and_from_the_grass():
    env = make_env("physics")
    env.reset(seed=200_000)
    _, beta, x, y = env.unwrapped.track[10]
    place_car(env, x, y, beta, speed=40)
    start = save_state(env)
    on = outcome(env, start, np.tile(np.float32((0, 0.3, 0)), (30, 1)), 17)
    braked = outcome(env, start, np.tile(np.float32((0, 0, 0.8)), (30, 1)), 17)
    assert 5 < on < 9 and braked < on - 2  # 0.6 s at 40 units/s are 6.9 tiles
    place_car(env, x + 30 * np.cos(beta), y + 30 * np.sin(beta), beta, speed=40)
    grass = save_state(env)
    act = np.tile(np.float32((0, 0.3, 0)), (30, 1))
    assert abs(outcome(env, grass, act, 0) - outcome(env, grass, act, 17) - 17 * 0.6) < 0.5


def test_an_expert_goes_on_from_where_a_plan_ended():
    env, expert, given = make_env("physics"), Expert(0.5), []
    env.reset(seed=200_000)
    expert.reset(env)
    _, beta, x, y = env.unwrapped.track[10]
    place_car(env, x, y, beta, speed=40)
    start, plan = save_state(env), np.tile(np.float32((0, 0.3, 0)), (10, 1))
    scribe = SimpleNamespace(
        act=lambda env: given.append(expert.act(env)) or given[-1], nearest=expert.nearest
    )
    made = outcome(env, start, plan, 17, scribe)
    assert len(given) == AFTER * FPS
    assert made == pytest.approx(outcome(env, start, np.concatenate([plan, given]), 17), abs=1e-3)
    assert made > outcome(env, start, plan, 17) + 5 * AFTER
    outcome(env, start, np.tile(np.float32((0.3, 0.3, 0)), (60, 1)), 17, expert)  # elsewhere
    assert made == outcome(env, start, plan, 17, expert)


def test_a_judge_that_saw_the_labels_tells_the_outcome():
    """From latents that hold no more than tiles made and wheels off the road, of another track."""
    env, parts = make_env("fast"), []
    column = list(TELEMETRY).index
    for track in range(FIRST_SEED, FIRST_SEED + 6):
        arrays, _ = run_episode(env, FaultyExpert(1.0), track, np.random.default_rng(track))
        parts.append(on_grid("data_recovery", track, arrays, 2))
        state, line = parts[-1].state, centre_line(env.unwrapped)
        at = [line.along(*xy) for xy in state[:, [column("x"), column("y")]].tolist()]
        made = [0] + [way(*step, len(env.unwrapped.track)) for step in zip(at, at[1:])]
        z = torch.tensor(np.c_[made, state[:, column("wheels_off_road")]]).float()
        parts[-1].z = {OWN: z}
    told = taught_outcome(
        SimpleNamespace(encoder=SimpleNamespace(repeat=2)),
        parts[:5],
        env,
        SimpleNamespace(ceiling_steps=1, train_frames=2000, seed=0, off_road=17),
    )
    z = z[1:].unfold(0, 15, 1).transpose(1, 2)
    truth = (z[..., 0] - 17 * z[..., 1] / 4 / 25).sum(dim=1).numpy()
    assert truth.std() > 2 and spearman(told(z), truth) > 0.98
    assert np.abs(told(z) - truth).mean() < 0.5  # tiles
    assert np.isnan(taught_outcome(None, parts, env, SimpleNamespace(ceiling_steps=0))(z)).all()


def test_a_shortcut_over_the_grass_makes_no_tiles():
    """From one part of the track over to another, dozens of tiles further along or back."""
    env = make_env("physics")
    env.reset(seed=200_000)
    track, line = env.unwrapped.track, centre_line(env.unwrapped)
    for _, beta, x, y in track:
        at = lambda s: (x - s * np.cos(beta), y - s * np.sin(beta))  # s units to the left
        tile = lambda s: line.place(*at(s))[0]
        apart = lambda s: abs(
            (tile(s) - tile(s - 1) + len(track) / 2) % len(track) - len(track) / 2
        )
        border = next((s for s in range(15, 60) if apart(s) > 20), None)
        if border:
            break
    place_car(env, *at(border - 8), beta + np.pi / 2, speed=40)
    before, _ = along(env)
    saved = save_state(env)
    made = outcome(env, saved, np.zeros((30, 3), np.float32), 0)
    assert abs(along(env)[0] - before) > 20 and abs(made) < 10


def test_rank_correlation_and_its_interval():
    made = np.random.default_rng(0).normal(size=64)
    assert spearman(made.copy(), made) == pytest.approx(1) and spearman(np.ones(64), made) == 0
    args = argparse.Namespace(seed=0, bootstrap=50)
    tracks = np.repeat(np.arange(8), 8)
    one, again = (cells(np.mean, tracks, (made,), args)[0] for _ in range(2))
    assert one == again and one["low"] < one["value"] < one["high"]
    assert one["n"] == 64 and one["tracks"] == 8
    alone = cells(np.mean, np.zeros(64), (made,), args)[0]
    assert alone["value"] == one["value"] and alone["low"] is None and alone["tracks"] == 1
    assert "?" in text(alone) and "?" not in text(one)


def test_tracks_of_the_kinds_never_meet_and_stay_in_their_range():
    within = range(200, 230)
    tracks = numbered(225, 4, within)
    seeds = [t for own in tracks.values() for t in own]
    assert set(tracks) == set(SOURCES) and len(set(seeds)) == 12
    assert seeds[0] == 225 and set(seeds) <= set(within)


def test_scales_are_of_the_steps_and_nets_they_are_asked_for():
    """Of random walks, one three times as wide, and dreams that stay where they are."""
    rng, K = np.random.default_rng(0), 120
    walk = lambda width: torch.from_numpy(width * rng.normal(size=(K, 4)).cumsum(axis=0)).float()
    episodes = [
        Episode(
            "data",
            i,
            np.zeros((K, 1, 1, 3)),
            np.zeros((K - 1, 3)),
            np.zeros((K, 20)),
            25,
            z={OWN: walk(1), TWIN: walk(3)},
        )
        for i in range(60)
    ]
    subject = SimpleNamespace(
        pairs=lambda: dict.fromkeys((OWN, TWIN), (None, None)),
        imagine=lambda _, z, act: z[:, None].expand(-1, act.shape[1], -1),
    )
    found = scales(subject, episodes[:50], SimpleNamespace(train_frames=2000, seed=0))
    z = {
        judge: choose_samples(episodes[50:], 400, 0, ahead=15).z(0, 15, judge)
        for judge in found
        if judge != "copy-last"
    }
    z["copy-last"] = z[OWN]

    def seen(judge, h, a, of):
        came, now = z[of][:, h], z[of][:, 0]
        return np.median(found[judge](came, now, now, a))

    for judge in found:
        for a, h in enumerate(AHEAD):
            assert 0.7 < seen(judge, h, a, judge) < 1.4
    assert seen(OWN, 15, 0, OWN) > 8 and seen(OWN, 5, 1, TWIN) > 5


def test_surprise_is_in_units_of_the_usual_error():
    """About 1 for errors like those it was fitted to; a rare direction counts more than a usual,
    and the same error more where errors are usually small."""
    rng = torch.Generator().manual_seed(0)
    size = torch.tensor([3.0, 1.0, 0.5, 0.5])
    now = torch.randn(4000, 4, generator=rng)
    size = size * torch.exp(now[:, :1, None])  # large in some moments
    came = size * torch.randn(4000, len(AHEAD), 4, generator=rng)
    scale = Scale(now, torch.zeros_like(came), came)
    of = lambda z, now: scale(z, now, torch.zeros_like(z), 1)
    for half in (now[:, 0] > 0.3, now[:, 0] < -0.3):
        assert 0.8 < np.median(of(came[half, 1], now[half])) < 1.25
    usual, rare, hard = torch.eye(4)[:1], torch.eye(4)[3:], torch.eye(4)[:1]
    assert of(rare, -hard) > 25 * of(usual, -hard)
    assert of(rare, -hard) > 40 * of(rare, hard)  # exp(4), shrunk a little
