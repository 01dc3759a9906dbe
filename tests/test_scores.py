"""The table of scores and its file, and the numbers that drives are asked for."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO
from processes import DIST_TIMEOUT, QUICK, finish, start, wait_for

import demo_energy
import drive_mpc
from car.env import make_env
from networks import CostModel
from support.cli import Refusal, Stop
from support.scores import Report, compare, row_name, score_settings, top_speed_return
from support.window import NoWindow


def scores(path):
    return {
        name: [e["return"] for e in r["episodes"]]
        for name, r in json.loads(path.read_text())["rows"].items()
    }


@pytest.mark.parametrize(
    "signals",
    [
        [signal.SIGHUP],
        pytest.param([signal.SIGKILL, signal.SIGTERM, signal.SIGINT], marks=pytest.mark.slow),
    ],
)
def test_scores_are_kept_after_each_drive_and_gone_on_with(tmp_path, signals):
    """Hung up, killed and stopped: the same command drives what is missing, and nothing twice."""
    path, episodes = tmp_path / "s.json", len(signals) + 3
    args = [*QUICK, "--no_video", "--policy", "random", "--episodes", episodes, "--json", path]
    kept = lambda: len(scores(path)["random"]) if path.exists() else 0
    for sig in signals:
        before = kept()
        process = start("drive_mpc.py", *args, root=tmp_path)
        wait_for(lambda: kept() > before)
        process.send_signal(sig)
        code, out, err = finish(process)
        assert code == (-9 if sig == signal.SIGKILL else 130), err
        assert not json.loads(path.read_text())["finished"] and kept() < episodes
    left = kept()
    code, out, err = finish(start("drive_mpc.py", *args, root=tmp_path))
    assert code == 0 and f"goes on behind {left} drives" in out, err
    env, report = make_env("fast"), json.loads(path.read_text())
    driver = drive_mpc.BaselineDriver(env, "random", 1.0, 0)
    for row in report["episodes"]:
        assert drive_mpc.drive(env, driver, row["track_seed"]) == row
    assert report["finished"] and len(report["episodes"]) == episodes
    assert report["mean"] == pytest.approx(np.mean(scores(path)["random"]), abs=0.01)
    assert not (tmp_path / "visuals").exists()  # nothing was to be drawn

    report["finished"] = False  # as if it had been stopped, of another seed
    path.write_text(json.dumps(report))
    other = drive_mpc_args("--policy", "random", "--episodes", str(episodes), "--seed", "1")
    assert report_of(path, other).rows == {"random": {}}


def report_of(path, args, policies=("random",), nets=None):
    """The Report of these flags and {policy: {name: net}}."""
    return Report(path, score_settings(args, nets or {}), dict.fromkeys(policies))


ROW = {  # of a drive, without its track and return
    "steps": 9,
    "tiles": 3,
    "tiles_missed": 0,
    "lap_finished": True,
    "plan_ms_p50": 1.0,
    "plan_ms_p99": 1.0,
}


def test_scores_of_other_nets_are_not_taken(tmp_path):
    args = drive_mpc_args()
    path = tmp_path / "s.json"
    report = report_of(path, args, ["mpc"])
    row = ROW | {"track_seed": 5, "return": 1.0}
    report.add("mpc", row)
    assert report_of(path, args, ["mpc"]).rows == {"mpc": {5: row}}
    nets = {"mpc": {"cost": CostModel(2)}}
    assert report_of(path, args, ["mpc"], nets).rows == {"mpc": {}}


def test_no_score_is_lost_to_a_stop_or_to_a_new_drive(tmp_path, monkeypatch):
    flags = [
        "--policy",
        "random",
        "--compare",
        "expert",
        "--env",
        "fast",
        "--no_video",
        "--episodes",
        "2",
        "--root",
        str(tmp_path),
        "--json",
        str(tmp_path / "s.json"),
    ]
    args, path, row = drive_mpc_args(*flags), tmp_path / "s.json", ROW
    policies = ["random", "expert"]
    report = report_of(path, args, policies)
    for name, n in (("random", 2), ("expert", 1)):
        for i in range(n):
            report.add(name, row | {"track_seed": 100_000 + i, "return": 1.0 * i})
    monkeypatch.setattr(Stop, "requested", True)
    again = drive_mpc.drive_all(args, policies, None, NoWindow())
    again.save(last=True)  # stopped before the first drive
    assert scores(path) == {"random": [0.0, 1.0], "expert": [0.0]}
    report.add("expert", row | {"track_seed": 100_001, "return": 2.0})
    assert json.loads(path.read_text())["finished"]
    assert report_of(path, args, policies).rows == {"random": {}, "expert": {}}
    assert not path.exists()
    (aside,) = tmp_path.glob("replaced-*/s.json")
    assert scores(aside) == {"random": [0.0, 1.0], "expert": [0.0, 2.0]}
    path.write_text(
        json.dumps({"env_id": 1, "policy": 2, "versions": 3, "episodes": 4, "finished": False})
    )
    with pytest.raises(Refusal, match="no report of drive_mpc.py"):
        report_of(path, args)


def drive_mpc_args(*flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["drive_mpc.py", *flags])
        return drive_mpc.arguments()


def refused(capsys, call, *flags):
    """The one line that refuses these flags."""
    with pytest.raises(SystemExit) as e:
        call(*flags)
    said = capsys.readouterr().err
    assert e.value.code == 2 and said.count("\n") == 1 and said.startswith("error: "), said
    return said


def test_outputs_that_cannot_be_written_are_refused_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for path, why in (
        (tmp_path, "found a folder"),
        (f"{tmp_path}/new/", "found a folder"),
        (tmp_path / "file" / "s.json", "cannot write there"),
        (tmp_path / ("x" * 300), "File name too long"),
        ("/proc/s.json", "/proc"),
    ):
        assert why in refused(capsys, drive_mpc_args, "--json", str(path))
    assert drive_mpc_args("--json", str(tmp_path / "made" / "s.json")).json.parent.is_dir()
    assert drive_mpc_args("--json", "/dev/null").json == Path("/dev/null")
    for text in ("mine", "[1]", '{"a": 1}'):
        (tmp_path / "file").write_text(text)
        args = drive_mpc_args("--json", str(tmp_path / "file"))
        with pytest.raises(Refusal, match="no report of drive_mpc.py"):
            report_of(args.json, args)
        assert (tmp_path / "file").read_text() == text
    (tmp_path / "empty").touch()
    assert report_of(tmp_path / "empty", args).rows == {"random": {}}


@pytest.mark.parametrize(
    "flag,values",
    [
        ("--episodes", ["0", "10" * 9]),
        ("--track_seed", ["-1", "9" * 20]),
        ("--film", ["-1"]),
        ("--pace", ["2", "nan"]),
        ("--seed", ["9" * 20]),
    ],
)
def test_numbers_have_ranges(flag, values, capsys):
    for value in values:
        assert "from" in refused(capsys, drive_mpc_args, flag, value)


def test_the_demos_numbers_have_ranges(monkeypatch, capsys):
    for flag, value in (("--ahead", "0"), ("--ahead", "9" * 9), ("--steps", "1001")):
        monkeypatch.setattr(sys, "argv", ["demo_energy.py", flag, value])
        assert "from 1 to 1000" in refused(capsys, demo_energy.arguments)


def test_a_calm_expert_says_so_in_its_row(tmp_path):
    code, out, err = finish(
        start(
            "drive_mpc.py",
            *QUICK,
            "--no_video",
            "--policy",
            "expert",
            "--pace",
            "0.9",
            "--episodes",
            "1",
            "--json",
            tmp_path / "s.json",
            root=tmp_path,
        )
    )
    assert code == 0 and "\nexpert, pace 0.9 " in out, err
    report = json.loads((tmp_path / "s.json").read_text())
    assert report["policy"] == "expert, pace 0.9" and list(report["rows"]) == ["expert, pace 0.9"]
    args = drive_mpc_args()
    assert args.pace == 1 and row_name("expert", args.pace) == "expert"
    assert row_name("random", 0.9) == "random"


@pytest.mark.parametrize("into", ["a pipe", "a file"])
def test_scores_go_to_stdout_whatever_it_is(tmp_path, into):
    with open(tmp_path / "out", "w") as file:
        done = subprocess.run(
            [
                sys.executable,
                REPO / "drive_mpc.py",
                *QUICK,
                "--no_video",
                "--policy",
                "random",
                "--episodes",
                "1",
                "--json",
                "/dev/stdout",
                "--root",
                tmp_path,
            ],
            text=True,
            cwd=REPO,
            stdout=subprocess.PIPE if into == "a pipe" else file,
            timeout=DIST_TIMEOUT,
        )
    said = done.stdout if into == "a pipe" else (tmp_path / "out").read_text()
    assert done.returncode == 0
    report, _ = json.JSONDecoder().raw_decode(said[said.index("{") :])
    assert report["finished"] and len(report["episodes"]) == 1
    assert "driver" in said and "100000" in said  # and all else that was printed


def test_the_table_says_how_far_below_top_speed_a_driver_is():
    """300 tiles of 3.5 units at 100 units/s take 525 steps, which cost 52.5."""
    assert top_speed_return(300) == pytest.approx(947.5)
    rows = [{"tiles": 300 - m, "tiles_missed": m, "return": 930.0 + m} for m in (0, 2)]
    for i, row in enumerate(rows):
        row |= {"track_seed": i, "steps": 700, "plan_ms_p50": 1.0}
    numbers = dict.fromkeys(("mean", "std", "median", "worst"), 931.0)
    report = numbers | {"policy": "mpc", "laps_finished": 1, "models": None, "episodes": rows}
    line = compare([report], "fast").splitlines()[1]
    assert "16.5 ±  1.0" in line
