"""Ways through the stages that users take: longer training, folders that are not there yet, files
of their own among the checkpoints, pictures that cannot be written, a second run, odd numbers."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from conftest import REPO, script
from test_chain import picture
from test_chain import refused as refused_script
from test_night import QUICK, WRITTEN, Run, losses, prepare, refused

from networks import TinyEncoder
from support.checkpoints import latest, numbered, read, rotate, save, write_payload
from support.files import back_up
from support.run import cosine

pytest_plugins = ["test_night"]  # its fixtures: given, whole
SLOW = ["--epochs", 99, "--steps_per_epoch", 100]  # until something ends it


def rows(root, stage):
    return [json.loads(line) for line in (root / "models" / f"{stage}.jsonl").open()]


# ------------------------------------------------------------------ longer training


@pytest.mark.parametrize(
    "stage", [s for s in QUICK if s == "predictor" or s.values[0] != "decoder"]
)
def test_more_epochs_go_on_and_fewer_are_said_to_be_done(whole, tmp_path, stage):
    root = tmp_path / "root"
    shutil.copytree(whole(stage), root, symlinks=True)
    last = root / "models" / f"{WRITTEN[stage]}.pth"
    before = last.stat().st_mtime_ns
    done = Run(stage, root, "--epochs", 3).wait(300)
    assert done.code == 0 and "3 epochs instead of 2" in done.said, done.said
    assert "cosine over all 180 steps" in done.said
    later = [r for r in rows(root, stage) if r.get("step", 0) >= 120 and "lr" in r]
    assert len(later) == 60
    for row in later:
        peak = 2e-3 if stage == "cost_model" else 1e-3
        assert row["lr"] == pytest.approx(cosine(row["step"], 180, peak), rel=1e-6)
    newest = last if stage == "cost_model" else latest(root / "models", last.name[:-8])
    assert read(newest)["step"] == 180
    if stage != "cost_model":
        assert newest.name.endswith("_ep3.pth") and read(newest)["done"]
    if stage == "encoder":  # the decoder's watcher does not end with the second any more
        assert not read(last)["done"] and last.stat().st_mtime_ns == before
    size = len(rows(root, stage))
    again = Run(stage, root, "--epochs", 1).wait()
    assert again.code == 0 and "already trained" in again.said, again.said
    assert "3 epochs, 1 were asked for" in again.said and len(rows(root, stage)) == size
    refused(Run(stage, root, "--epochs", 4, "--lr", 0.5), "--lr", "0.5", "--fresh")


def test_a_run_of_older_code_that_lacks_an_argument_goes_on_where_its_nets_fit(whole, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(whole("predictor"), root, symlinks=True)
    path = root / "models" / "predictor_resume.pth"
    payload = read(path)
    del payload["args"]["dropout"]
    write_payload(path, payload)
    done = Run("predictor", root, "--epochs", 3).wait(300)
    assert done.code == 0 and "3 epochs instead of 2" in done.said, done.said
    del payload["args"]["hidden"]
    write_payload(path, payload)
    refused(Run("predictor", root, "--epochs", 3, "--hidden", 24), "does not fit", "--fresh")


# ------------------------------------------------------------------ folders that are there


def test_stages_take_the_folders_that_are_there(given, tmp_path):
    prepare(tmp_path, given, "predictor")
    (tmp_path / "data_race").unlink()
    (tmp_path / "data_recovery").unlink()
    (tmp_path / "data_recovery").mkdir()  # nothing in it yet
    for stage in ("encoder", "decoder", "predictor"):
        run = Run(
            stage,
            tmp_path,
            *([] if stage == "decoder" else ["--steps_per_epoch", 2]),
            *(["--fresh"] if stage == "encoder" else []),
        ).wait()
        assert run.code == 0, run.said
        for name in ("data_race", "data_recovery"):
            assert f"goes on without {tmp_path / name}" in run.said
            assert f"`python collect_{name[5:]}_data.py --root" in run.said
    refused(
        Run("cost_model", tmp_path),
        "needs data_race, data and data_recovery",
        "no episode of data_race and data_recovery",
        "collect_race_data.py --root",
    )
    refused(
        Run("predictor", tmp_path, "--data", "data", "data_race"),
        "data_race",
        "collect_race_data.py",
    )


def without(root, models, *names):
    """ROOT with these nets of models only."""
    (root / "models").mkdir(parents=True)
    for path in models.glob("*.pth"):
        if path.name.startswith(names):
            shutil.copy2(path, root / "models")
    return root


def test_without_a_cost_model_the_demo_is_driven_by_the_expert(chain, tmp_path):
    root = without(tmp_path / "root", chain[0] / "models", "encoder_mixed", "predictor_ep")
    done = script("demo_energy.py", "--headless", "--steps", 90, "--threads", 1, root=root)
    assert done.returncode == 0, done.stderr
    assert "the expert drives" in done.stdout and "train_cost_model.py" in done.stdout
    assert done.stdout.count("AUROC") == 4
    picture(root / "visuals" / "demo_energy.png")


def test_what_lacks_nets_says_so_and_how_to_drive_meanwhile(chain, tmp_path):
    eye = without(tmp_path / "eye", chain[0] / "models", "encoder_mixed")
    refused_script(
        script("drive_mpc.py", root=eye),
        "predictor_ep1.pth and",
        "cost_model_final.pth",
        f"train_predictor.py --root {eye}",
        f"train_cost_model.py --root {eye}",
        "--models models/pretrained",
    )
    refused_script(
        script("drive_mpc.py", "--models", tmp_path, root=eye),
        f"--models {tmp_path}",
        "encoder_mixed_ep*.pth",
    )


@pytest.mark.slow
def test_models_of_a_folder_are_driven_and_judged(chain, tmp_path):
    eye = without(tmp_path / "eye", chain[0] / "models", "encoder_mixed")
    for name in ("demo_energy.py", "report.trials"):
        refused_script(
            script(name, root=eye),
            "cost_model_final.pth",
            "train_cost_model.py",
            "--models models/pretrained",
        )
    done = script("evaluate.py", "--parts", "plans", root=eye)
    assert done.returncode == 2 and "--models models/pretrained" in done.stdout
    shipped = ["--models", "models/pretrained", "--samples", 8, "--threads", 1]
    done = script("demo_energy.py", *shipped, "--headless", "--steps", 75, root=eye)
    assert done.returncode == 0 and done.stdout.count("AUROC") == 4, done.stderr
    done = script(
        "drive_mpc.py",
        *shipped,
        "--env",
        "fast",
        "--episodes",
        1,
        "--no_video",
        "--json",
        tmp_path / "s.json",
        root=eye,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "s.json").read_text())["models"] == "models/pretrained"


# ------------------------------------------------------------------ files of the user's own

OWN = (
    "encoder_mixed_ep2_best.pth",
    "encoder_mixed_ep2 (copy).pth",
    "encoder_mixed_ep02.pth",
    "encoder_mixed_ep_before_lunch.pth",
    "encoder_mixed_ep٣.pth",
    "encoder_mixed_ep5.pth\n",
    "my_encoder_mixed_ep6.pth",
    "encoder_mixed_ep-1.pth",
    "encoder_mixed_ep7.pth.bak",
    "predictor_ep1 (copy).pth",
    "predictor_ep99x.pth",
    "decoder_ep9_best.pth",
    "latents_notes.txt",
    "latents_0123456789abcdef.f16",
    "latents_mine-p1-fp32.f16",
    ".notes.pth.1.tmp",
    ".encoder_mixed_ep2.pth.old.tmp",
    "replaced-notes",
)
FOLDER = (
    "encoder_mixed_ep8.pth",
    "predictor_ep8.pth",
    "decoder_ep8.pth",
    "latents_backup",
    "latents_0123456789abcdef-p1-fp32.f16",
    "replaced-20200101-000000",
)


def put_own(models):
    for name in OWN:
        (models / name).write_text("mine")
        os.utime(models / name, (0, 0))
    for name in FOLDER:
        (models / name).mkdir()


def own_is_there(models):
    return all((models / name).read_text() == "mine" for name in OWN) and all(
        (models / name).is_dir() for name in FOLDER
    )


@pytest.mark.parametrize("stage", QUICK)
def test_what_the_program_did_not_write_is_left_alone(given, tmp_path, stage):
    prepare(tmp_path, given, stage)
    models = tmp_path / "models"
    put_own(models)
    (models / "latents_0123456789abcdef-p2-bf16.f16").write_text("another encoder's")
    short = ["--steps", 2] if stage == "decoder" else ["--epochs", 2, "--steps_per_epoch", 2]
    run = Run(stage, tmp_path, *short, "--fresh").wait()
    assert run.code == 0 and "Traceback" not in run.said, run.said
    assert own_is_there(models)
    if stage in ("predictor", "cost_model"):
        assert not (models / "latents_0123456789abcdef-p2-bf16.f16").exists()  # that is its own


def test_lists_of_checkpoints_hold_exact_names(tmp_path):
    eye = TinyEncoder(8, 1, 2, 8, (8, 1, 1, 1))
    for epoch in range(1, 8):
        path = tmp_path / f"encoder_mixed_ep{epoch}.pth"
        save(path, {"encoder": eye})
        os.utime(path, (0, 0))
    put_own(tmp_path)
    assert [n for n, _ in numbered(tmp_path, "encoder_mixed_ep*.pth")] == list(range(1, 8))
    assert latest(tmp_path, "encoder_mixed").name == "encoder_mixed_ep7.pth"
    rotate(tmp_path, "encoder_mixed")
    assert [n for n, _ in numbered(tmp_path, "encoder_mixed_ep*.pth")] == [5, 6, 7]
    for _ in range(2):  # in the same second: nothing is overwritten
        back_up(tmp_path, [p for _, p in numbered(tmp_path, "encoder_mixed_ep*.pth")])
        save(tmp_path / "encoder_mixed_ep7.pth", {"encoder": eye})
    assert own_is_there(tmp_path)
    assert len(list(tmp_path.glob("replaced-*-*/encoder_mixed_ep7.pth"))) == 2


# ------------------------------------------------------------------ results before pictures


def test_training_goes_on_without_its_pictures(given, tmp_path):
    prepare(tmp_path, given, "predictor")
    visuals = tmp_path / "visuals"
    (tmp_path / "models" / "decoder_ep2.pth").write_text("garbage")  # is for pictures only
    run = Run("predictor", tmp_path, "--epochs", 9, "--steps_per_epoch", 20)
    run.until(lambda: (visuals / "predictor_curves.png").exists())
    shutil.rmtree(visuals, ignore_errors=True)
    run.until(lambda: (visuals / "predictor_curves.png").exists())  # the folder is made again
    picture(visuals / "predictor_curves.png")
    visuals.rename(tmp_path / "away")
    visuals.write_text("in the way")
    assert run.wait().code == 0 and "Traceback" not in run.said, run.said
    assert "predictor_curves.png: not drawn" in run.said
    assert "skipped: " in run.said and "decoder_ep2.pth" in run.said
    assert read(tmp_path / "models" / "predictor_ep9.pth")["done"]


def test_models_that_vanish_are_made_again(given, tmp_path):
    prepare(tmp_path, given, "predictor")
    models = tmp_path / "models"
    run = Run("predictor", tmp_path, "--epochs", 4, "--steps_per_epoch", 20).until(
        lambda: (models / "predictor_ep1.pth").exists()
    )
    models.rename(tmp_path / "away")
    assert run.wait().code == 0 and "Traceback" not in run.said, run.said
    assert f"{models}: was gone, is made again" in run.said
    assert read(models / "predictor_ep4.pth")["step"] == 80
    assert read(models / "predictor_resume.pth")["step"] == 80


@pytest.mark.slow
def test_a_checkpoint_of_tomorrow_is_drawn_once(given, tmp_path):
    prepare(tmp_path, given, "predictor")  # one checkpoint
    path, tomorrow = tmp_path / "models" / "encoder_mixed_ep2.pth", time.time() + 86400
    os.utime(path, (tomorrow, tomorrow))
    for said in ("reconstruct_ep2.png: ", "nothing to draw"):
        run = Run("decoder", tmp_path, "--steps", 2).wait()
        assert run.code == 0 and said in run.said, run.said
        run.log.unlink()


# ------------------------------------------------------------------ one run a root and stage


@pytest.mark.parametrize("stage", QUICK)
def test_a_second_run_in_one_root_is_refused(given, tmp_path, stage):
    prepare(tmp_path, given, stage)
    slow = ["--steps", 10**6] if stage == "decoder" else SLOW
    first = Run(stage, tmp_path, *slow).until(lambda: losses(tmp_path, stage))
    before = first.said
    second = Run(stage, tmp_path, *slow)
    second.wait()
    assert second.code == 2 and "Traceback" not in second.said
    assert f"another train_{stage}.py is at work there" in second.said.removeprefix(before)
    assert first.process.is_alive()
    first.process.terminate()
    assert first.wait(60).code == 130


# ------------------------------------------------------------------ what is read afterwards


def test_a_file_gets_few_lines_of_progress_and_a_short_run_twenty_points(given, tmp_path):
    prepare(tmp_path, given, "predictor")
    with open(tmp_path / "said", "w") as said:
        subprocess.run(
            [
                sys.executable,
                REPO / "train_predictor.py",
                "--root",
                tmp_path,
                "--epochs",
                "1",
                "--steps_per_epoch",
                "60",
                "--hidden",
                "32",
                "--horizon",
                "4",
                "--batch_size",
                "48",
                "--threads",
                "1",
            ],
            stdout=said,
            stderr=said,
            check=True,
            timeout=120,
        )
    bars = re.findall(r"\d+/\d+ \[", (tmp_path / "said").read_text())
    assert 0 < len(bars) <= 6 and "\r" not in (tmp_path / "said").read_text(), bars
    assert len(losses(tmp_path, "predictor")) >= 20


def test_networks_prints_names_and_a_command_that_can_be_typed(given, tmp_path, capsys):
    root = tmp_path / "my demo"
    root.mkdir()
    prepare(root, given, "predictor")
    assert Run("predictor", root, "--steps_per_epoch", 1, "--epochs", 2).wait().code == 0
    first, second = (root / "models" / f"predictor_ep{n}.pth" for n in (1, 2))
    said = script("tools.checkpoint", first, second).stdout
    assert said.index(str(first)) < said.index(str(second))
    line = re.search(r"python (train_predictor\.py .*)", said)[1]
    assert f"--root '{root}'" in line and "--data data_race data_recovery data" in line
    assert "{'root'" not in said
    done = subprocess.run(
        f"{sys.executable} {line}",
        shell=True,
        cwd=REPO,
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0 and "already trained" in done.stdout, done.stderr


# ------------------------------------------------------------------ numbers

NUMBERS = {
    "train_encoder": "channels dim embedding history hud_pca scene_pca repeat targets pred std "
    "cov inverse warp congeal mirror sim epochs batch_size steps_per_epoch lr weight_decay seed "
    "threads save_every log_every shares",
    "train_decoder": "channels steps batch_size autoencoder_steps lr seed threads",
    "train_predictor": "hidden state dropout horizon epochs batch_size lr weight_decay",
    "train_dream": "hidden width depth horizon epochs batch_size lr weight_decay",
    "train_cost_model": "hidden shrinkage epochs batch_size lr weight_decay",
    "evaluate": "track_seed tracks train_frames frames windows states replayed_plans "
    "supervised_steps "
    "supervised_batch autoencoder_steps bootstrap off_road",
    "report.trials": "starts track_seed tracks",
    "benchmark": "repeats frames steps train_steps tracks",
}


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_a_range(monkeypatch, capsys, name):
    parse = (
        getattr(importlib.import_module(name), "arguments", None)
        or importlib.import_module(name).parse_args
    )
    for flag in NUMBERS[name].split():
        for value in ("-1", "nan", "inf", "-inf", "1e31", "9" * 20 + "e20", "two", ""):
            monkeypatch.setattr(
                sys, "argv", [f"{name}.py", *["env"] * (name == "benchmark"), f"--{flag}={value}"]
            )
            with pytest.raises(SystemExit) as ended:
                parse()
            said = capsys.readouterr().err
            assert ended.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
            assert f"--{flag}" in said and " to " in said, said
