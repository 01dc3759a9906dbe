"""Day 4, the demo: the car drives, and a graph shows which futures its world model finds possible.

The energy of a proposed future is its distance from the dream: the predictor imagines from the
latent of --ahead steps ago, with the actions taken since, and the mean squared error to the
proposal is the energy. Proposed are the true frames, frames of the same car teleported on the same
track, and of a random place on another track. Live in a window where there is a display; at the end
it writes ROOT/visuals/demo_energy.mp4, .gif and .png, and prints how well the energy separates
them, beside copy-last (the old latent itself).

    python demo_energy.py
"""

if __name__ == "__main__":
    import support.start  # noqa: F401  first: Ctrl-C ends a script quietly while it imports

from collections import deque
from types import SimpleNamespace

import cv2
import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from car import FPS, MAX_STEPS, ZOOM_STEPS
from car.env import make_env, observe
from car.renderer import picture
from car.telemetry import TELEMETRY, place_beside, telemetry
from collect_race_data import Expert
from drive_mpc import load_driver, planning
from networks import stack_frames
from support.checkpoints import (
    find_models,
    fingerprint,
    latest,
    load_frozen,
    pretrained_hint,
    require_dir,
)
from support.cli import Number, Stop, command, fail, parser, run, track_number
from support.device import autocast, set_up
from support.files import writable
from support.lap_view import VIDEO_FPS
from support.pictures import VideoRecorder, ornament, pyplot, save_figure
from support.progress import progress
from support.window import (
    DIM,
    END_S,
    INK,
    KEYS_TEXT,
    VIEW,
    WARM,
    NoWindow,
    banner,
    blank,
    log_axis,
    open_window,
    plot,
    write,
)

FUTURES = {"true": (90, 200, 120), "teleported": WARM, "random": (240, 90, 90)}  # name: colour
MIN_JUMP = 15  # tiles between the car and where it is teleported to, so that places differ
WHERE = {"true": "what comes", "teleported": "same track", "random": "another track"}
CELL = 136  # px of a small picture
TRACE = 150  # judged futures that the graph shows


def arguments():
    p = parser(__doc__, models=True)
    p.epilog = KEYS_TEXT
    g = p.add_argument_group("task")
    g.add_argument(
        "--track_seed",
        type=track_number,
        default=100_000,
        help="of the drive; key r goes on to the next one",
    )
    g.add_argument(
        "--steps",
        type=Number(int, 1, MAX_STEPS),
        default=MAX_STEPS,
        help="environment steps at most",
    )
    g.add_argument(
        "--ahead",
        type=Number(int, 1, MAX_STEPS),
        default=5,
        help="latents between dream and proposal",
    )
    g.add_argument("--headless", action="store_true", help="no window: as fast as it goes")
    planning(p)
    return p.parse_args()


class TeleportedCar:
    """Frames of a car that was teleported: the fast env's twin of a track, placed anew each time.

    Only the place differs: offset, heading, speed and yaw rate are those of the real car, and its
    last actions are played, so that neither the instruments nor the pose give the fake away.
    """

    def __init__(self, track_seed, rng):
        self.env, self.rng = make_env("fast"), rng
        self.env.reset(seed=track_seed)
        for _ in range(ZOOM_STEPS):
            self.env.step(np.zeros(3, np.float32))

    def jump(self, least=0):
        """How many tiles to teleport by: at random, so many at least, either way round."""
        return int(self.rng.integers(least, len(self.env.unwrapped.track) - least))

    def frames(self, state, actions, count, jump):
        """(count, 64, 64, 3): the last frames of playing `actions` so many tiles further on.

        state: {name: value} of the real car's telemetry, on its own track.
        """
        env = self.env
        place_beside(
            env,
            state["tile_index"] + jump,
            state["lateral_offset"],
            -state["heading_error"],
            state["speed"],
            state["yaw_rate"],
        )
        # stepped without the time limit around it: the twin must not run out of steps
        return np.stack([env.unwrapped.step(a)[0] for a in actions][-count:])


class Judge:
    """Keeps latents and actions of the drive; energies of proposals against the dream."""

    def __init__(self, driver, ahead):
        self.driver, self.ahead = driver, ahead
        self.z, self.act = deque(maxlen=ahead + 1), deque(maxlen=ahead)

    @torch.inference_mode()
    def encode(self, stacks):
        """{name: z (1, D)} of {name: consecutive frames, every step}; the last is the present."""
        e = self.driver.encoder
        frames = np.stack([x[::-1][:: e.repeat][: e.history][::-1] for x in stacks.values()])
        obs = torch.from_numpy(frames).permute(0, 1, 4, 2, 3).to(self.driver.device)
        with autocast(self.driver.device, self.driver.dtype):
            return dict(zip(stacks, e(stack_frames(obs, e.history)).split(1)))

    @torch.inference_mode()
    def energies(self, proposals):
        """{name: (energy against the dream, against the old latent)} of {name: z (1, D)}, or {}."""
        if len(self.z) <= self.ahead:
            return {}
        act = torch.from_numpy(np.stack(self.act))[None].to(self.driver.device)
        z_hat = self.driver.nets["predictor"].rollout(self.z[0], act)[:, -1]
        return {
            k: (float((z - z_hat).pow(2).mean()), float((z - self.z[0]).pow(2).mean()))
            for k, z in proposals.items()
        }


def compose(env, pictures, trace, line, ahead_s):
    """One picture (H, W, 3) uint8: the car, the three proposed futures, the curve of energies.

    pictures: {name: frame}, {} before the first; trace: the energies so far, (n, 3); line: text.
    """
    canvas, (w, h) = blank(), VIEW
    canvas[:h, :w] = picture(env, VIEW)
    write(canvas, line, 12, h + 10)
    write(canvas, f"proposed futures, {ahead_s:.2f} s ahead,", w + 14, 10)
    write(canvas, "and their energy", w + 14, 32)
    for i, (name, frame) in enumerate(pictures.items()):
        y = 62 + i * (CELL + 6)
        canvas[y : y + CELL, w + 14 : w + 14 + CELL] = cv2.resize(
            frame, (CELL, CELL), interpolation=cv2.INTER_NEAREST
        )
        write(canvas, name, w + CELL + 30, y + 8, FUTURES[name], 32)
        write(canvas, WHERE[name], w + CELL + 30, y + 38, DIM)
        if len(trace):
            write(canvas, f"{trace[-1][i]:.3f}", w + CELL + 30, y + 72, INK, 44)
    if len(trace) > 1:
        box, t = (76, h + 64, w + 250, 118), np.array(trace)
        x = write(canvas, "energy, the newest at the right:", 12, h + 36, DIM)
        for name, color in FUTURES.items():
            x = write(canvas, name, x + 12, h + 36, color)
        low, high = log_axis(canvas, box, t)
        plot(canvas, box, np.log10(t).T, FUTURES.values(), low, high, TRACE)
    return canvas


def separation(energy):
    """(AUROC, share of pairs in which the fake costs more) of (n, 3) energies, one per fake."""
    out = {}
    for i, name in list(enumerate(FUTURES))[1:]:
        labels = np.r_[np.zeros(len(energy)), np.ones(len(energy))]
        out[name] = (
            roc_auc_score(labels, np.r_[energy[:, 0], energy[:, i]]),
            float((energy[:, i] > energy[:, 0]).mean()),
        )
    return out


def draw_summary(energy, seconds, path, seconds_ahead):
    """PNG: the energies over time and their histograms."""
    plt = pyplot()
    fig, (left, right) = plt.subplots(
        1, 2, figsize=(11, 3.4), layout="constrained", gridspec_kw={"width_ratios": [2, 1]}
    )
    edges = np.geomspace(energy.min(), energy.max(), 50)
    for i, (name, color) in enumerate(FUTURES.items()):
        color = np.array(color) / 255 * 0.85
        left.semilogy(seconds, energy[:, i], color=color, lw=0.9, label=f"{name}: {WHERE[name]}")
        right.hist(energy[:, i], edges, color=color, alpha=0.6)
    right.set(xscale="log", xlabel="energy", ylabel="futures")
    right.tick_params(axis="x", which="both", labelsize=7, rotation=45)
    right.yaxis.get_major_locator().set_params(integer=True)
    left.set(
        xlabel="time, s",
        ylabel="energy",
        title=f"distance of proposed futures from the dream {seconds_ahead:.2f} s ahead",
    )
    left.legend(fontsize=8)
    save_figure(fig, path)


def passenger(args, env, models):
    """Encoder and predictor of a folder that has no cost model yet; the expert drives them."""
    expert, (device, dtype) = Expert(0), set_up(args)
    encoder, _ = load_frozen(latest(models, "encoder_mixed"), "encoder", device, "train_encoder.py")
    predictor, payload = load_frozen(
        latest(models, "predictor"), "predictor", device, "train_predictor.py"
    )
    if payload.get("encoder_key") != fingerprint(encoder):
        fail(
            f"{models}: its predictor belongs to another encoder; run "
            f"{command('train_predictor.py', args.root, '--fresh')}{pretrained_hint(models)}"
        )
    print(
        f"{models}: no cost model there, so the expert drives, who sees track and state; "
        f"{command('train_cost_model.py', args.root)} makes it"
    )
    return SimpleNamespace(
        encoder=encoder,
        nets={"predictor": predictor},
        device=device,
        dtype=dtype,
        reset=lambda track_seed: expert.reset(env),
        act=lambda frame: expert.act(env),
    )


class Demo:
    """The drives, their film, and what they show: rows of energies, one for each judged step."""

    def __init__(self, args, env, driver, film, window, stop):
        self.args, self.env, self.driver = args, env, driver
        self.film, self.window, self.stop = film, window, stop
        self.rng = np.random.default_rng(args.seed)
        self.ahead_s = args.ahead * driver.encoder.repeat / FPS
        self.seconds, self.energy, self.copied = [], [], []  # of all tracks, one after the other
        self.returns = []

    def run(self):
        """Drives a track, and the next ones as long as the user asks for them."""
        track = self.args.track_seed
        while self.drive(track) == "next":
            track += 1

    def show(self, canvas, seconds, hold=0.0):
        if self.window.recording and hold:
            self.film.hold(canvas, hold)
        elif self.window.recording:
            self.film.add(canvas)
        return self.window.show(canvas, seconds + hold)

    def drive(self, track):
        """One track -> the key that ended it, "next" or "quit", or ""."""
        args, env, driver, e = self.args, self.env, self.driver, self.driver.encoder
        need = (e.history - 1) * e.repeat + 1  # consecutive frames that a latent looks back on
        same, other = TeleportedCar(track, self.rng), TeleportedCar(track + 1, self.rng)
        judge, trace = Judge(driver, args.ahead), deque(maxlen=TRACE)
        recent, actions = deque(maxlen=need), deque(maxlen=2 * need)
        before = self.seconds[-1] if self.seconds else 0.0
        obs, _ = env.reset(seed=track)
        driver.reset(track)
        total, step, ended, key, pictures = 0.0, 0, False, "", {}
        bar = progress(total=args.steps, desc="drive", unit="step", leave=False)
        while step < args.steps and not ended and not key and not self.stop:
            frame = observe(env, obs)
            recent.append(frame)
            action = driver.act(frame)
            judged = step >= ZOOM_STEPS and (step - ZOOM_STEPS) % e.repeat == 0
            if judged:
                state = dict(zip(TELEMETRY, telemetry(env).tolist()))  # for the fakes only
                stacks = {
                    "true": np.stack(recent),
                    "teleported": same.frames(state, actions, need, same.jump(MIN_JUMP)),
                    "random": other.frames(state, actions, need, other.jump()),
                }
                pictures = {k: f[-1] for k, f in stacks.items()}
                latents = judge.encode(stacks)
                judge.z.append(latents["true"])
                found = judge.energies(latents)
                judge.act.append(action)
                if found:
                    self.seconds.append(before + step / FPS)
                    self.energy.append([v[0] for v in found.values()])
                    self.copied.append([v[1] for v in found.values()])
                    trace.append(self.energy[-1])
            if judged or step < ZOOM_STEPS and step % e.repeat == 0:
                line = f"track {track}   step {step}   return {total:.1f}"
                canvas = compose(env, pictures, trace, line, self.ahead_s)
                if step < ZOOM_STEPS:
                    banner(canvas, "waiting for the zoom")
                key = self.show(canvas, step / FPS)
            actions.append(action)
            obs, reward, terminated, truncated, info = env.step(action)
            total, step, ended = total + reward, step + 1, terminated or truncated
            bar.update()
        bar.close()
        self.returns.append(total)
        if key or self.stop:
            return key
        what = (
            f"stopped after {step} steps"
            if not terminated
            else "lap finished"
            if info.get("lap_finished")
            else "left the field"
        )
        banner(canvas, what, f"return {total:.1f}   {step / FPS:.1f} s")
        return self.show(canvas, step / FPS, END_S)

    def report(self):
        """Prints how well true and false futures separate, by the dream and by the old latent."""
        for what, energy in (("dream", self.energy), ("copy-last", self.copied)):
            print(
                f"{what:10} "
                + "   ".join(
                    f"{name}: AUROC {a:.4f}, costs more than the true one in {p:.1%}"
                    for name, (a, p) in separation(np.array(energy)).items()
                )
            )
        print(
            f"{len(self.energy)} futures judged {self.ahead_s:.2f} s ahead, return "
            + ", ".join(f"{total:.1f}" for total in self.returns)
        )


def main():
    args = arguments()
    require_dir(args.root)
    stop, stem = Stop(), writable(args.root / "visuals") / "demo_energy"
    film = VideoRecorder(VIDEO_FPS)
    window = NoWindow() if args.headless else open_window("TinyJEPA: the energy of futures")
    demo = window.run(lambda: run_demo(args, film, window, stop))
    files = film.save(stem)
    if demo.energy:
        demo.report()
    else:
        print("ended before the first futures were judged")
    if len(demo.energy) > 1:
        with ornament(png := stem.with_suffix(".png")):
            draw_summary(np.array(demo.energy), np.array(demo.seconds), png, demo.ahead_s)
            files.append(png)
    if files:
        print(", ".join(map(str, files)))
    return 130 if stop else 0


def run_demo(args, film, window, stop):
    """Loads the nets and drives -> the Demo."""
    env = make_env("fast")  # 1 ms a step, and the fakes come from the same renderer
    models = find_models(args.root, args.models, say=lambda line: None)  # load_driver says it
    if latest(models, "predictor").is_file() and not (models / "cost_model_final.pth").is_file():
        driver = passenger(args, env, models)
    else:
        driver, _ = load_driver(args, args)
    least = ZOOM_STEPS + args.ahead * driver.encoder.repeat + 1
    if args.steps < least:
        fail(
            f"--steps {args.steps}, --ahead {args.ahead}: the first futures are judged in step "
            f"{least}, of {MAX_STEPS} at most"
        )
    demo = Demo(args, env, driver, film, window, stop)
    demo.run()
    return demo


if __name__ == "__main__":
    run(main)
