"""The README's commands run small, in its order; what they write, resume, and refuse."""

import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import cv2
import pytest
import torch
from conftest import CHAIN, REPO, SMALL, script

DRIVE = ["--episodes", "1", "--track_seed", "200000", "--samples", "16", "--horizon", "6"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def picture(path):
    image = cv2.imread(str(path))
    assert image is not None and image.std() > 5, path  # neither unreadable nor blank
    return image


def weights(path):
    return torch.load(path, weights_only=True)["nets"]


def test_collectors_reach_their_targets_and_say_so(chain):
    root, said = chain
    for name, folder, frames in (
        ("collect_race_data.py", "data_race", 2500),
        ("collect_recovery_data.py", "data_recovery", 2500),
        ("collect_data.py", "data", 3200),
    ):
        assert "frames/s" in said[name]
        done = script("buffer.py", root / folder)
        assert done.returncode == 0, done.stdout
        counts = re.search(r"(\d+) held out, \d+ laps, ([\d,]+) frames", done.stdout)
        assert int(counts[2].replace(",", "")) >= frames and int(counts[1]) >= 1
    assert "recovered" in said["collect_recovery_data.py"]
    again = script("collect_data.py", *CHAIN["collect_data.py"], root=root)
    assert "target is reached" in again.stdout
    again = script("collect_race_data.py", "--frames", 2500, "--pace", "0.2", root=root)
    assert "episodes of --pace 0.1\n" in again.stdout  # other flags than those that drove them


def test_seeds_of_collectors_are_never_for_evaluation(chain):
    from buffer import index

    chunks = [c for f in ("data", "data_race", "data_recovery") for c in index(chain[0] / f)[0]]
    seeds = [c.meta["track_seed"] for c in chunks]
    assert min(seeds) >= 10_000_000 and len(set(seeds)) == len(seeds)
    race = [c.meta["policy"] for c in chunks if c.meta["source"] == "data_race"]
    assert {(p["pace"], p["max_offset"]) for p in race} == {(0.1, 3), (0.2, 3)}


def test_training_leaves_checkpoints_logs_and_pictures(chain):
    root, said = chain
    models, visuals = root / "models", root / "visuals"
    for stage, last in (
        ("encoder", "encoder_mixed_ep2.pth"),
        ("decoder", "decoder_ep2.pth"),
        ("predictor", "predictor_ep2.pth"),
        ("dream", "dream_ep2.pth"),
        ("cost_model", "cost_model_final.pth"),
    ):
        head, *rows = lines(models / f"{stage}.jsonl")
        assert {"command", "args", "versions", "commit"} <= set(head) and rows
        assert weights(models / last)
        picture(visuals / f"{stage}_curves.png")
        assert "min" in said[f"train_{stage}.py"].splitlines()[-1]
    for name in ("reconstruct_ep1", "reconstruct_ep2", "dream_ep2", "energy_histogram"):
        picture(visuals / f"{name}.png")
    assert (visuals / "output_dream.gif").read_bytes()[:4] == b"GIF8"
    assert not [p for p in root.rglob(".*") if p.is_file()]  # no temporary file is left
    payload = torch.load(models / "cost_model_final.pth", weights_only=True)
    assert payload["max_gas"] == 0.5  # nets of 40 steps imagine little
    assert "gas up to 0.5: 15 steps ahead" in said["train_cost_model.py"]
    assert "copy-last" in said["train_predictor.py"] and "AUC" in said["train_cost_model.py"]
    assert "TinyEncoder" in script("tools.checkpoint", models / "encoder_mixed_ep2.pth").stdout


def test_a_finished_stage_is_not_repeated(chain):
    root, _ = chain
    before = (root / "models" / "encoder_mixed_ep2.pth").stat().st_mtime_ns
    done = script("train_encoder.py", *CHAIN["train_encoder.py"], root=root)
    assert done.returncode == 0 and "already trained" in done.stdout
    assert (root / "models" / "encoder_mixed_ep2.pth").stat().st_mtime_ns == before
    again = script("train_decoder.py", *CHAIN["train_decoder.py"], root=root)
    assert again.returncode == 0 and "nothing to draw" in again.stdout


def test_driving_writes_scores_and_films(chain, tmp_path):
    root, _ = chain
    done = script("drive_mpc.py", *DRIVE, "--json", tmp_path / "s.json", root=root)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "s.json").read_text())
    row = report["episodes"][0]
    assert report["env_id"] == "CarRacing-v3" and report["versions"]["gymnasium"] == "1.4.0"
    assert set(row) == {
        "track_seed",
        "return",
        "steps",
        "tiles",
        "tiles_missed",
        "lap_finished",
        "plan_ms_p50",
        "plan_ms_p99",
    }
    assert row["track_seed"] == 200000 and row["plan_ms_p50"] > 0
    assert report["mean"] == row["return"] and report["laps_finished"] == row["lap_finished"]
    N = row["tiles"] + row["tiles_missed"]
    left = row["steps"] < 1000 and not row["lap_finished"]  # the field: costs 100
    expected = 1000 * row["tiles"] / N - 0.1 * row["steps"] - 100 * left
    assert row["return"] == pytest.approx(expected, abs=5)
    video = cv2.VideoCapture(str(root / "visuals" / "drive_mpc.mp4"))
    ok, frame = video.read()
    assert ok and frame.std() > 5 and video.get(cv2.CAP_PROP_FRAME_COUNT) >= row["steps"] // 2 - 1
    assert (root / "visuals" / "drive_mpc.gif").read_bytes()[:4] == b"GIF8"


def test_the_expert_is_far_above_random(tmp_path):
    flags = (
        "--policy random --compare expert --episodes 1 --track_seed 200001 --env fast --no_video"
    )
    done = script("drive_mpc.py", *flags.split(), "--json", tmp_path / "s.json", root=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    means = {name.split()[0]: row["mean"] for name, row in rows.items()}
    assert means["expert"] > 850 and means["random"] < 100


def test_rows_to_compare_with_come_from_the_same_code(chain, tmp_path):
    root, _ = chain
    done = script(
        "drive_mpc.py",
        *DRIVE,
        "--policy",
        "no_model",
        "--compare",
        "untrained",
        "imitation",
        "--env",
        "fast",
        "--no_video",
        "--json",
        tmp_path / "s.json",
        root=root,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "s.json").read_text())
    assert report["policy"] == "no_model" and set(report["rows"]) == {
        "no_model",
        "untrained",
        "imitation",
    }
    assert report["env_id"] == "CarRacing-v3 fast"  # not to be taken for the official one's
    assert all(
        r["mean"] < 500 and r["episodes"][0]["plan_ms_p50"] > 0 for r in report["rows"].values()
    )


def test_demo_energy_writes_its_pictures(chain):
    root, _ = chain
    done = script(
        "demo_energy.py",
        "--headless",
        "--steps",
        "140",
        "--samples",
        "16",
        "--horizon",
        "6",
        root=root,
    )
    assert done.returncode == 0 and done.stdout.count("AUROC") == 4, done.stderr
    picture(root / "visuals" / "demo_energy.png")
    assert (root / "visuals" / "demo_energy.mp4").stat().st_size > 10_000


@pytest.mark.slow
def test_resume_equals_no_interruption(chain, tmp_path):
    """Ctrl-C in the middle, the same command again: the same weights to the bit."""
    for name in ("data", "data_race", "data_recovery"):
        (tmp_path / name).symlink_to(chain[0] / name)
    args = [*CHAIN["train_encoder.py"], "--root", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, str(REPO / "train_encoder.py"), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log, deadline = tmp_path / "models" / "encoder.jsonl", time.time() + 120
    while time.time() < deadline and not (log.exists() and len(log.read_text().splitlines()) > 1):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on" in said, said
    step = torch.load(tmp_path / "models" / "encoder_resume.pth", weights_only=True)["step"]
    assert 0 < step < 40, step
    done = script("train_encoder.py", *CHAIN["train_encoder.py"], root=tmp_path)
    assert done.returncode == 0 and f"from {step}" in done.stdout
    for a, b in zip(
        *(weights(r / "models" / "encoder_mixed_ep2.pth").values() for r in (chain[0], tmp_path))
    ):
        assert all(torch.equal(a["weights"][k], b["weights"][k]) for k in a["weights"])
    other = script("train_encoder.py", *CHAIN["train_encoder.py"], "--lr", "0.5", root=tmp_path)
    assert other.returncode == 2 and "--lr" in other.stderr


@pytest.mark.slow
def test_a_stopped_decoder_goes_on_where_it_was(chain, tmp_path):
    for name in ("data", "data_race", "data_recovery"):
        (tmp_path / name).symlink_to(chain[0] / name)
    models = tmp_path / "models"
    models.mkdir()
    shutil.copy(chain[0] / "models" / "encoder_mixed_ep2.pth", models)
    args = [
        sys.executable,
        str(REPO / "train_decoder.py"),
        "--once",
        "--steps",
        "300",
        "--channels",
        "8",
        "--batch_size",
        "8",
        "--root",
        str(tmp_path),
    ]
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log, deadline = models / "decoder.jsonl", time.time() + 120
    while time.time() < deadline and not (log.exists() and len(log.read_text().splitlines()) > 1):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    half = torch.load(models / "decoder_resume.pth", weights_only=True)
    assert process.returncode == 130 and 0 < half["step"] < 300
    again = subprocess.run(args, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and f"{half['step']}/300" in again.stderr, again.stderr
    picture(tmp_path / "visuals" / "reconstruct_ep2.png")
    assert not (models / "decoder_resume.pth").exists()
    subprocess.run([*args[:-2], "--fresh", *args[-2:]], check=True, capture_output=True)
    aside = {p.name for p in models.glob("replaced-*/*")}
    assert {"decoder_ep2.pth", "decoder.jsonl"} <= aside  # nothing is deleted
    assert (models / "decoder_ep2.pth").exists()


def test_more_data_does_not_renumber_what_is_trained(chain, tmp_path):
    shutil.copytree(chain[0] / "models", tmp_path / "models")
    from buffer import index

    for name in ("data", "data_race", "data_recovery"):
        (tmp_path / name).mkdir()
        chunks = index(chain[0] / name)[0]
        if name == "data":  # one episode less than what the encoder was trained on
            chunks.remove(next(c for c in chunks if not c.held_out))
        for c in chunks:
            (tmp_path / name / c.path.name).symlink_to(c.path)
    done = script("train_encoder.py", *CHAIN["train_encoder.py"], root=tmp_path)
    assert done.returncode == 0 and "the data has changed" in done.stdout, done.stderr
    assert "already trained" in done.stdout


def test_an_encoder_with_congealing_trains(chain, tmp_path):
    for name in ("data", "data_race", "data_recovery"):
        (tmp_path / name).symlink_to(chain[0] / name)
    args = [*SMALL, "--epochs", "1", "--steps_per_epoch", "6"]
    done = script("train_encoder.py", *args, "--congeal", "5", root=tmp_path)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "models" / "encoder.jsonl").read_text().splitlines()
    assert 0 < json.loads(log[-1])["val_congeal"] < 2
    bend = weights(tmp_path / "models" / "encoder_mixed_ep1.pth")["warp"]
    assert bend["args"]["aligned"] and bend["weights"]["net.bias"].abs().max() > 0
    other = script("train_encoder.py", *args, root=tmp_path)
    refused(other, "--congeal 5.0", "0.0")


@pytest.mark.slow
def test_plain_vicreg_trains_too(chain, tmp_path):
    for name in ("data", "data_race", "data_recovery"):
        (tmp_path / name).symlink_to(chain[0] / name)
    done = script(
        "train_encoder.py",
        *SMALL,
        "--objective",
        "vicreg",
        "--epochs",
        "1",
        "--steps_per_epoch",
        "6",
        root=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "projector" in weights(tmp_path / "models" / "encoder_mixed_ep1.pth")
    explode = script(
        "train_encoder.py",
        *SMALL,
        "--epochs",
        "9",
        "--steps_per_epoch",
        "40",
        "--lr",
        "1e12",
        "--fresh",
        root=tmp_path,
    )
    refused(explode, "nothing was saved over the last good file")
    aside = list((tmp_path / "models").glob("replaced-*/encoder_mixed_ep1.pth"))
    assert len(aside) == 1  # --fresh deletes nothing


# ------------------------------------------------------------------ bad input: one line, exit 2


def refused(done, *words):
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in said[0], said[0]


@pytest.mark.parametrize("name", ["train_encoder.py", "train_cost_model.py"])
def test_missing_input_names_the_command_that_makes_it(tmp_path, name):
    refused(script(name, root=tmp_path), "data_race", "collect_race_data.py", f"--root {tmp_path}")
    refused(script(name, "--data", "rides", root=tmp_path), "rides", "data_race", "data_recovery")


def test_missing_checkpoints_name_the_command_that_makes_them(chain, tmp_path):
    for name in ("data", "data_race", "data_recovery"):
        (tmp_path / name).symlink_to(chain[0] / name)
    refused(script("train_predictor.py", root=tmp_path), "encoder_mixed", "train_encoder.py")
    refused(script("train_decoder.py", "--once", root=tmp_path), "train_encoder.py")
    shutil.copytree(chain[0] / "models", tmp_path / "models", dirs_exist_ok=True)
    (tmp_path / "models" / "cost_model_final.pth").unlink()
    refused(script("drive_mpc.py", root=tmp_path), "cost_model_final.pth", "train_cost_model.py")
    for path in (tmp_path / "models").glob("predictor*.pth"):
        path.unlink()
    refused(script("train_cost_model.py", root=tmp_path), "predictor", "train_predictor.py")
    refused(
        script("train_cost_model.py", "--data", "data_race", "data", root=tmp_path), "data_recovery"
    )


def test_damaged_chunks_are_named(chain, tmp_path):
    for name in ("data", "data_race", "data_recovery"):
        shutil.copytree(chain[0] / name, tmp_path / name)
    paths = sorted((tmp_path / "data_race").glob("*.npz"))
    paths[0].write_bytes(paths[0].read_bytes()[:1000])
    (tmp_path / "data_race" / "notes.npz").write_text("not a chunk")
    refused(script("train_encoder.py", *SMALL, root=tmp_path), "unreadable", "buffer.py")
    done = script("buffer.py", tmp_path / "data_race")
    assert done.returncode == 1 and "notes.npz" in done.stdout and paths[0].name in done.stdout
    assert paths[0].stat().st_size == 1000  # nothing was touched


def test_checkpoints_of_other_nets_are_refused(chain, tmp_path):
    shutil.copytree(chain[0] / "models", tmp_path / "models")
    encoder = tmp_path / "models" / "encoder_mixed_ep2.pth"
    shutil.copy(chain[0] / "models" / "encoder_mixed_ep1.pth", encoder)
    refused(script("drive_mpc.py", root=tmp_path), "another encoder")
    shutil.copytree(chain[0] / "models", tmp_path / "b" / "models")
    models = tmp_path / "b" / "models"
    shutil.copy(models / "predictor_ep1.pth", models / "predictor_ep2.pth")
    refused(script("drive_mpc.py", root=tmp_path / "b"), "another predictor", "train_cost_model.py")
    for path in models.glob("encoder_mixed_ep*.pth"):
        path.unlink()
    refused(script("drive_mpc.py", root=tmp_path / "b"), "has not finished an epoch")


def test_a_device_that_is_not_there(chain):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    refused(script("train_encoder.py", "--device", "cuda", root=chain[0]), "cuda", "no such GPU")
    refused(script("drive_mpc.py", "--device", "tpu0", root=chain[0]), "tpu0")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused(script("collect_data.py", "--frames", "300", root=tmp_path / "file"), "cannot write")


@pytest.mark.parametrize(
    "command,words",
    [
        ("collect_data.py --frames 0", ["--frames", "from 1 to"]),
        ("train_encoder.py --dim 10", ["--dim 10 --hud_pca 8 --scene_pca 2", "leaves 0 numbers"]),
        ("train_encoder.py --batch_size 2", ["--batch_size 2", "data"]),
        ("train_encoder.py --objective vicreg --batch_size 3", ["--batch_size 3", "4 or more"]),
        ("train_encoder.py --targets 1 900", ["1800 steps", "the longest has", "--targets"]),
        (
            "train_predictor.py --horizon 900",
            ["1800 steps", "the longest has", "--horizon", "--repeat"],
        ),
        ("train_encoder.py --congeal 40 --warp 0", ["--congeal 40 --warp 0"]),
        ("train_predictor.py --shares 0.5 0.5", ["--shares 0.5 0.5", "3 numbers", "data_recovery"]),
        ("train_cost_model.py --hidden 7", ["--hidden 256", "repeat its arguments"]),
        ("demo_energy.py --headless --steps 60", ["--steps 60", "step 61"]),
    ],
)
def test_odd_arguments(chain, command, words):
    name, *args = command.split()
    if name == "demo_energy.py":
        args += ["--ahead", "5"]
    refused(script(name, *args, root=chain[0]), *words)


def test_a_folder_that_is_not_there_does_not_drive_other_nets(tmp_path):
    for name in ("drive_mpc.py", "evaluate.py"):
        refused(script(name, root=tmp_path / "typo"), "typo: no such folder")
    assert not (tmp_path / "typo").exists()


def test_a_last_file_that_is_gone_or_damaged_is_written_anew(chain, tmp_path):
    shutil.copytree(chain[0] / "models", tmp_path / "models")
    for name in ("data", "data_race", "data_recovery"):
        (tmp_path / name).symlink_to(chain[0] / name)
    for name, last in (
        ("train_encoder.py", "encoder_mixed_ep2.pth"),
        ("train_predictor.py", "predictor_ep2.pth"),
        ("train_dream.py", "dream_ep2.pth"),
        ("train_cost_model.py", "cost_model_final.pth"),
    ):
        path = tmp_path / "models" / last
        if name == "train_predictor.py":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:5000])
        done = script(name, *CHAIN[name], root=tmp_path)
        assert done.returncode == 0 and "written anew" in done.stdout, done.stderr
        ours, was = (
            torch.load(f / "models" / last, weights_only=True) for f in (tmp_path, chain[0])
        )
        assert ours.keys() == was.keys()
        for key in ("step", "epoch", "epochs", "done", "data_key", "frames_seen", "auc", "max_gas"):
            assert ours.get(key) == was.get(key), key
        for net, entry in was["nets"].items():
            assert all(
                torch.equal(ours["nets"][net]["weights"][k], v) for k, v in entry["weights"].items()
            )


MODULES = "vicreg.py", "networks.py", "dream.py"
SCRIPTS = sorted(p.name for p in REPO.glob("*.py") if p.name not in MODULES)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_gives_a_reason_for_every_flag(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name[:-3]).main()
    assert ended.value.code == 0
    options = re.split(r"\n(?=  -)", capsys.readouterr().out)[1:]
    assert len(options) > (name != "buffer.py")  # which has none but --help
    for option in options:
        head, *more = option.splitlines()
        reason = re.split(r"\s{2,}", head.strip())[1:]
        reason += [line.strip() for line in more if line[:20].isspace()]
        assert len(" ".join(reason)) > 8, option


def test_without_nets_it_drives_with_the_weights_that_come_with_the_code(tmp_path):
    done = script(
        "drive_mpc.py",
        "--episodes",
        1,
        "--track_seed",
        200_000,
        "--env",
        "fast",
        "--samples",
        64,
        "--threads",
        1,
        "--no_video",
        "--json",
        tmp_path / "s.json",
        root=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "weights that come with the code" in done.stdout
    report = json.loads((tmp_path / "s.json").read_text())
    assert "pretrained" in report["models"] and report["mean"] > 500  # at random: -30
