"""Day 4, the demo: the car drives, and a graph shows which futures its world model finds possible.

The energy of a proposed future is its distance from the dream: the predictor imagines from the
latent of --ahead steps ago, with the actions taken since, and the mean squared error to the
proposal is the energy. Proposed are the true frames, frames of the same car teleported on the same
track, and of a random place on another track. Live in a window (space pauses, s or right steps, q
quits); without a display, or with --headless, it writes ROOT/visuals/demo_energy.mp4, .gif and
.png. Prints how well the energy separates them, beside copy-last (the old latent itself).

    python demo_energy.py
"""

if __name__ == "__main__":
    import support.start  # noqa: F401  first: Ctrl-C ends a script quietly while it imports

import time
from collections import deque
from types import SimpleNamespace

import cv2
import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from car_env import (FPS, MAX_STEPS, TELEMETRY, ZOOM_STEPS, make_env, observe, place_beside,
                     telemetry)
from collect_race_data import Expert
from drive_mpc import (DIM, INK, PAPER, SIDE, STRIP, VIDEO_FPS, VIEW, WARM, Window,
                       load_driver, planning, plot, write)
from networks import fingerprint, latest, load_frozen, meanwhile, models_of, some_root, stack
from support.cli import Stop, command, fail, natural, parser, positive, run
from support.files import writable
from support.pictures import pyplot, save_figure, save_gif, save_mp4
from support.progress import progress
from support.training import autocast, set_up

FUTURES = {"true": (90, 200, 120), "teleported": WARM, "random": (240, 90, 90)}  # name: colour
MIN_JUMP = 15  # tiles between the car and where it is teleported to, so that places differ
CELL = 112  # px of a small picture
TRACE = 150  # judged futures that the graph shows
GIF_STRIDE, GIF_FRAMES = 5, 120  # recorded frames per frame of the GIF, frames at most


def arguments():
    p = parser(__doc__, models=True)
    g = p.add_argument_group("task")
    g.add_argument("--track_seed", type=natural, default=100_000, help="of the drive")
    g.add_argument("--steps", type=positive, default=1000, help="environment steps, at most 1000")
    g.add_argument("--ahead", type=positive, default=5, help="latents between dream and proposal")
    g.add_argument("--headless", action="store_true", help="files instead of a window")
    planning(p)
    return p.parse_args()


class Elsewhere:
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
        place_beside(env, state["tile_index"] + jump, state["lateral_offset"],
                     -state["heading_error"], state["speed"], state["yaw_rate"])
        # stepped without the time limit around it: the twin must not run out of steps
        return np.stack([env.unwrapped.step(a)[0] for a in actions][-count:])


class Judge:
    """Keeps latents and actions of the drive; energies of proposals against the dream."""

    def __init__(self, driver, ahead):
        self.driver, self.ahead = driver, ahead
        self.z, self.act = deque(maxlen=ahead + 1), deque(maxlen=ahead)

    @torch.inference_mode()
    def encode(self, frames):
        """The latent (1, D) of consecutive frames, every step; the last one is the present."""
        e = self.driver.encoder
        obs = torch.from_numpy(frames[::-1][::e.repeat][:e.history][::-1].copy())
        with autocast(self.driver.device, self.driver.dtype):
            return e(stack(obs.permute(0, 3, 1, 2)[None].to(self.driver.device), e.history))

    @torch.inference_mode()
    def energies(self, proposals):
        """{name: (energy against the dream, against the old latent)} of {name: z (1, D)}, or {}."""
        if len(self.z) <= self.ahead:
            return {}
        act = torch.from_numpy(np.stack(self.act))[None].to(self.driver.device)
        z_hat = self.driver.nets["predictor"].rollout(self.z[0], act)[:, -1]
        return {k: (float((z - z_hat).pow(2).mean()), float((z - self.z[0]).pow(2).mean()))
                for k, z in proposals.items()}


def compose(env, pictures, trace, total, step):
    """One picture (H, W, 3) uint8: the car, the three proposed futures, the graph of energies."""
    w, h = VIEW
    canvas = np.full((h + STRIP + 40, w + SIDE, 3), PAPER, np.uint8)
    canvas[:h, :w] = cv2.resize(env.unwrapped._render("rgb_array"), VIEW)
    write(canvas, "proposed futures and their energy", w + 12, 20)
    for i, (name, frame) in enumerate(pictures.items()):
        y = 32 + i * (CELL + 12)
        canvas[y:y + CELL, w + 12:w + 12 + CELL] = cv2.resize(
            frame, (CELL, CELL), interpolation=cv2.INTER_NEAREST)
        write(canvas, name, w + CELL + 28, y + 40, FUTURES[name], 0.6)
        if trace:
            write(canvas, f"{trace[-1][i]:.3f}", w + CELL + 28, y + 76, INK, 0.8)
    write(canvas, f"step {step:4}   return {total:6.1f}   energy (log scale), newest at the right",
          12, h + 20, DIM)
    if len(trace) > 1:
        t = np.log10(np.array(trace))  # (n, 3)
        low, high = np.floor(t.min()), np.ceil(t.max())
        box = (44, h + 32, w + SIDE - 60, STRIP - 8)
        for decade in np.arange(low, high + 0.5):
            y = int(box[1] + box[3] - (decade - low) / (high - low) * box[3])
            cv2.line(canvas, (box[0], y), (box[0] + box[2], y), (50, 50, 54), 1)
            write(canvas, f"{10.0 ** decade:g}", 6, y + 4, DIM, 0.36)
        plot(canvas, box, t.T, FUTURES.values(), low, high, TRACE)
    return canvas


def separation(energy):
    """(AUROC, share of pairs in which the fake costs more) of (n, 3) energies, one per fake."""
    out = {}
    for i, name in list(enumerate(FUTURES))[1:]:
        labels = np.r_[np.zeros(len(energy)), np.ones(len(energy))]
        out[name] = (roc_auc_score(labels, np.r_[energy[:, 0], energy[:, i]]),
                     float((energy[:, i] > energy[:, 0]).mean()))
    return out


def draw_summary(energy, seconds, path, seconds_ahead):
    """PNG: the energies over time and their histograms."""
    plt = pyplot()
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained",
                                      gridspec_kw={"width_ratios": [2, 1]})
    edges = np.geomspace(energy.min(), energy.max(), 50)
    for i, (name, color) in enumerate(FUTURES.items()):
        color = np.array(color) / 255 * 0.85
        left.semilogy(seconds, energy[:, i], color=color, lw=0.9, label=name)
        right.hist(energy[:, i], edges, color=color, alpha=0.6, label=name)
    right.set(xscale="log", xlabel="energy", ylabel="futures")
    right.tick_params(axis="x", which="both", labelsize=7, rotation=45)
    right.yaxis.get_major_locator().set_params(integer=True)
    left.set(xlabel="time, s", ylabel="energy",
             title=f"distance of proposed futures from the dream {seconds_ahead:.2f} s ahead")
    left.legend(fontsize=8)
    save_figure(fig, path)


def passenger(args, env, models):
    """Encoder and predictor of a folder that has no cost model yet; the expert drives them."""
    expert, (device, dtype) = Expert(0), set_up(args)
    encoder, _ = load_frozen(latest(models, "encoder_mixed"), "encoder", device,
                             "train_encoder.py")
    predictor, payload = load_frozen(latest(models, "predictor"), "predictor", device,
                                     "train_predictor.py")
    if payload.get("encoder_key") != fingerprint(encoder):
        fail(f"{models}: its predictor belongs to another encoder; run "
             f"{command('train_predictor.py', args.root, '--fresh')}{meanwhile(models)}")
    print(f"{models}: no cost model there, so the expert drives, who sees track and state; "
          f"{command('train_cost_model.py', args.root)} makes it")
    return SimpleNamespace(encoder=encoder, nets={"predictor": predictor}, device=device,
                           dtype=dtype, reset=lambda track_seed: expert.reset(env),
                           act=lambda frame: expert.act(env))


def main():
    args = arguments()
    some_root(args.root)
    env = make_env("official", render_mode="rgb_array")
    models = args.models = models_of(args.root, args.models)
    if latest(models, "predictor").is_file() and not (models / "cost_model_final.pth").is_file():
        driver = passenger(args, env, models)
    else:
        driver, _ = load_driver(args, args)
    least = ZOOM_STEPS + args.ahead * driver.encoder.repeat + 1
    args.steps = min(args.steps, MAX_STEPS)
    if args.steps < least:
        fail(f"--steps {args.steps}, --ahead {args.ahead}: the first futures are judged in step "
             f"{least}, of {MAX_STEPS} at most")
    visuals, stop = writable(args.root / "visuals"), Stop()
    rng = np.random.default_rng(args.seed)
    same, other = Elsewhere(args.track_seed, rng), Elsewhere(args.track_seed + 1, rng)
    judge, e = Judge(driver, args.ahead), driver.encoder
    window = None if args.headless else Window.open("TinyJEPA: the energy of futures")
    live = window is not None
    need = (e.history - 1) * e.repeat + 1  # consecutive frames that a latent looks back on
    film, rows, both, trace = [], [], [], deque(maxlen=TRACE)
    recent, actions = deque(maxlen=need), deque(maxlen=2 * need)
    paused, new = False, False  # new: the picture was not shown yet
    bar = progress(total=args.steps, desc="drive", unit="step", disable=live)

    obs, _ = env.reset(seed=args.track_seed)
    driver.reset(args.track_seed)
    total, step, ended = 0.0, 0, False
    while step < args.steps and not ended and not stop:
        if live and new:  # a step of the viewer goes to the next picture
            key = window.show(canvas)
            if key == "q":
                break
            paused ^= key == "space"
            if paused and key not in ("s", "right"):
                time.sleep(0.02)
                continue
            new = False
        frame = observe(env, obs)
        recent.append(frame)
        action = driver.act(frame)
        if step >= ZOOM_STEPS and (step - ZOOM_STEPS) % e.repeat == 0:
            state = dict(zip(TELEMETRY, telemetry(env).tolist()))  # for the fakes, not the driver
            stacks = {"true": np.stack(recent),
                      "teleported": same.frames(state, actions, need, same.jump(MIN_JUMP)),
                      "random": other.frames(state, actions, need, other.jump())}
            latents = {k: judge.encode(f) for k, f in stacks.items()}
            judge.z.append(latents["true"])
            found = judge.energies(latents)
            judge.act.append(action)
            if found:
                rows.append((step / FPS, *(v[0] for v in found.values())))
                both.append([v[1] for v in found.values()])
                trace.append(rows[-1][1:])
            canvas = compose(env, {k: f[-1] for k, f in stacks.items()}, trace, total, step)
            new = True
            if not live:
                film.append(canvas)
        actions.append(action)
        obs, reward, terminated, truncated, _ = env.step(action)
        total, step, ended = total + reward, step + 1, terminated or truncated
        bar.update()
    bar.close()
    if not rows:
        print(f"ended after {step} steps, before the first futures were judged; nothing is kept")
        return 130 if stop else 0
    energy = np.array(rows)
    for what, found in (("dream", energy[:, 1:]), ("copy-last", np.array(both))):
        table = separation(found)
        print(f"{what:10} " + "   ".join(f"{name}: AUROC {a:.4f}, costs more than the true one in "
                                         f"{p:.1%}" for name, (a, p) in table.items()))
    ahead_s = args.ahead * e.repeat / FPS
    print(f"{len(energy)} futures judged {ahead_s:.2f} s ahead, return {total:.1f}")
    if film:
        save_mp4(visuals / "demo_energy.mp4", film, VIDEO_FPS)
        save_gif(visuals / "demo_energy.gif",
                 [cv2.resize(f, None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA)
                  for f in film[::GIF_STRIDE][:GIF_FRAMES]], 2 * VIDEO_FPS / GIF_STRIDE)
        draw_summary(energy[:, 1:], energy[:, 0], visuals / "demo_energy.png", ahead_s)
        print(f"{visuals}/demo_energy.mp4, .gif, .png")
    return 0


if __name__ == "__main__":
    run(main)
