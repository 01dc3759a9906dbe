"""Day 4, the demo: the car drives, and a graph shows which futures its world model finds possible.

The predictor rolls out from the latent of --ahead steps ago, with the actions taken since. The
energy of a proposed future is the mean squared error between that rollout and its latent.
Three futures are proposed: the true frames, frames of the car teleported on the same track, and
frames of a random place on another track. A window shows them live if there is a display. The end
writes ROOT/visuals/demo_energy.mp4, .gif and .png. It also prints how well the energy separates
true from false futures. Copy-last, which uses the old latent as rollout, stands beside it.

    python demo_energy.py
"""

if __name__ == "__main__":
    import support.start  # noqa: F401  first: Ctrl-C ends a script quietly while it imports

from collections import deque

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from car import FPS, MAX_STEPS, ZOOM_STEPS
from car.env import make_env
from car.telemetry import place_beside, telemetry_of
from drive_mpc import BaselineDriver, drive, load_driver
from support import window as ui
from support.checkpoints import find_models, latest, load_models, require_dir
from support.cli import Number, Stop, command, fail, parser, run_main, track_number
from support.device import set_up
from support.files import writable
from support.lap_view import VIDEO_FPS, LapView
from support.latents import encode_present
from support.pictures import VideoRecorder, ornament, pyplot, save_figure
from support.plan_config import planning

FUTURES = {  # name: (what it is, colour)
    "true": ("what comes", (90, 200, 120)),
    "teleported": ("same track", ui.WARM),
    "random": ("another track", (240, 90, 90)),
}
MIN_JUMP = 15  # tiles between the car and where it is teleported to, so that places differ
SMALL = 136  # px of a small picture
TRACE = 150  # futures that the graph shows


def arguments():
    p = parser(__doc__, models=True)
    p.epilog = ui.keys_text()
    add, steps = p.add_argument_group("task").add_argument, Number(int, 1, MAX_STEPS)
    add("--track_seed", type=track_number, default=100_000, help="first track; key r: the next")
    add("--steps", type=steps, default=MAX_STEPS, help="environment steps at most")
    add("--ahead", type=steps, default=5, help="latents between the present and the proposal")
    add("--headless", action="store_true", help="no window: as fast as it goes")
    planning(p)
    return p.parse_args()


class TeleportedCar:
    """Frames of a car that was teleported: the fast env's twin of a track, placed anew each time.

    Only the place differs. Offset, heading, speed and yaw rate are those of the real car. Its last
    actions are replayed. So neither the HUD nor the pose gives the false future away.
    """

    def __init__(self, track_seed, rng):
        self.env, self.rng = make_env("fast"), rng
        self.env.reset(seed=track_seed)
        for _ in range(ZOOM_STEPS):
            self.env.step(np.zeros(3, np.float32))

    def random_offset(self, least=0):
        """A random number of tiles to teleport by, at least so many either way round."""
        return int(self.rng.integers(least, len(self.env.unwrapped.track) - least))

    def frames(self, state, actions, count, offset):
        """(count, 64, 64, 3): the last frames of `teleport` with these arguments."""
        return teleport(self.env, state, actions, offset)[-count:]


def teleport(env, state, actions, offset):
    """Places the car of a fast env so many tiles further on -> frames (n, 64, 64, 3) of `actions`.

    state: {name: value} of the telemetry that it continues, but for the place.
    """
    tile, heading = state["tile_index"] + offset, -state["heading_error"]
    side, speed, yaw_rate = state["lateral_offset"], state["speed"], state["yaw_rate"]
    place_beside(env, tile, side, heading, speed, yaw_rate)
    # stepped without the time limit around it: the twin must not run out of steps
    return np.stack([env.unwrapped.step(a)[0] for a in actions])


class EnergyDriver:
    """Drives as `driver` does, and keeps the energies of futures that it proposes on the way."""

    def __init__(self, env, driver, nets, ahead, device, dtype, seed):
        self.env, self.driver, self.nets, self.device, self.dtype = env, driver, nets, device, dtype
        self.ahead, self.encoder, self.ms = ahead, nets["encoder"], []
        self.rng = np.random.default_rng(seed)
        self.seconds, self.energy, self.copied = [], [], []  # of all tracks, one after the other
        self.ahead_s = ahead * self.encoder.repeat / FPS

    def reset(self, track_seed):
        """Begins a drive: nothing is remembered but the energies."""
        need = self.encoder.span
        self.frames, self.actions = deque(maxlen=need), deque(maxlen=2 * need)  # every step
        self.z, self.z_actions = deque(maxlen=self.ahead + 1), deque(maxlen=self.ahead)
        self.twins = TeleportedCar(track_seed, self.rng), TeleportedCar(track_seed + 1, self.rng)
        self.began, self.t = self.seconds[-1] if self.seconds else 0.0, -ZOOM_STEPS
        self.pictures, self.trace = {}, deque(maxlen=TRACE)  # {name: frame}; energies (n, 3)
        self.driver.reset(track_seed)

    def act(self, frame):
        """frame (64, 64, 3) uint8 -> action (3,) float32; proposes futures every `repeat` steps."""
        self.frames.append(frame)
        action = self.driver.act(frame)
        if self.t >= 0 and self.t % self.encoder.repeat == 0:
            stacks = self.propose()
            self.pictures = {name: frames[-1] for name, frames in stacks.items()}
            latents = self.encode([*stacks.values()])
            if self.z:  # an expert acts anew in each step between two latents
                between = list(self.actions)[-self.encoder.repeat :]
                self.z_actions.append(np.mean(between, axis=0))
            self.z.append(latents[:1])
            if len(self.z) > self.ahead:
                self.measure(latents)
        self.t += 1
        self.actions.append(action)
        return action

    def propose(self):
        """{name: the last frames of a proposed future}, the true one first."""
        state = telemetry_of(self.env)  # for the false futures only
        same, other = self.twins
        near, far = same.random_offset(MIN_JUMP), other.random_offset()
        return {
            "true": np.stack(self.frames),
            "teleported": same.frames(state, self.actions, len(self.frames), near),
            "random": other.frames(state, self.actions, len(self.frames), far),
        }

    @torch.inference_mode()
    def encode(self, stacks):
        """Planned parts (n, planned) of n stacks of consecutive frames, the present one last."""
        z = encode_present(self.encoder, stacks, self.device, self.dtype)
        return z[:, : self.encoder.planned]

    @torch.inference_mode()
    def measure(self, latents):
        """Keeps the energies of latents (3, D): against the rollout, and against the old latent."""
        act = torch.from_numpy(np.stack(self.z_actions))[None].to(self.device)
        z_hat = self.nets["predictor"].rollout(self.z[0], act)[:, -1]
        error = lambda to: [float((z - to).pow(2).mean()) for z in latents.split(1)]
        self.energy.append(error(z_hat))
        self.copied.append(error(self.z[0]))
        self.seconds.append(self.began + (self.t + ZOOM_STEPS) / FPS)
        self.trace.append(self.energy[-1])

    def report(self, returns):
        """Prints how well true and false futures separate, by the rollout and by the old latent."""
        for what, energy in (("rollout", self.energy), ("copy-last", self.copied)):
            rows = separation(np.array(energy)).items()
            words = "{}: AUROC {:.4f}, costs more than the true one in {:.1%}"
            print(f"{what:10} " + "   ".join(words.format(name, *row) for name, row in rows))
        returns = ", ".join(f"{total:.1f}" for total in returns)
        print(f"{len(self.energy)} futures {self.ahead_s:.2f} s ahead, return {returns}")


class EnergyView(LapView):
    """Shows the car, the three proposed futures and the curve of their energies."""

    def compose(self, env, frame, driver):
        """The picture (H, W, 3) uint8 of a step."""
        canvas, (w, h) = self.draw_car(env, "", self.step <= ZOOM_STEPS), ui.VIEW
        ui.write(canvas, f"proposed futures, {driver.ahead_s:.2f} s ahead,", w + 14, 10)
        ui.write(canvas, "and their energy", w + 14, 32)
        for i, (name, frame) in enumerate(driver.pictures.items()):
            (what, color), x, y = FUTURES[name], w + SMALL + 30, 62 + i * (SMALL + 6)
            ui.paste(canvas, frame, w + 14, y, SMALL)
            ui.write(canvas, name, x, y + 8, color, 32)
            ui.write(canvas, what, x, y + 38, ui.DIM)
            if driver.trace:
                ui.write(canvas, f"{driver.trace[-1][i]:.3f}", x, y + 72, ui.INK, 44)

        # the curve
        if len(driver.trace) > 1:
            title = "energy, the newest at the right:"
            colors = {name: color for name, (_, color) in FUTURES.items()}
            ui.graph(canvas, title, colors, driver.trace, 76, h + 36, w + 326, TRACE)
        return canvas


def separation(energy):
    """{false future: (AUROC, share of pairs in which it costs more)} of energies (n, 3)."""
    labels, true, out = np.repeat([0, 1], len(energy)), energy[:, 0], {}
    for name, false in zip(list(FUTURES)[1:], energy.T[1:]):
        out[name] = roc_auc_score(labels, np.r_[true, false]), float((false > true).mean())
    return out


def draw_summary(energy, seconds, path, ahead_s):
    """Writes a PNG: energies (n, 3) over time, and their histograms."""
    size = dict(figsize=(11, 3.4), layout="constrained", width_ratios=[2, 1])
    fig, (left, right) = pyplot().subplots(1, 2, **size)
    edges = np.geomspace(energy.min(), energy.max(), 50)
    for (name, (what, color)), values in zip(FUTURES.items(), energy.T):
        color = np.array(color) / 255 * 0.85
        left.semilogy(seconds, values, color=color, lw=0.9, label=f"{name}: {what}")
        right.hist(values, edges, color=color, alpha=0.6)
    right.set(xscale="log", xlabel="energy", ylabel="futures")
    title = f"distance of proposed futures from the rollout {ahead_s:.2f} s ahead"
    left.set(xlabel="time, s", ylabel="energy", title=title)
    left.legend(fontsize=8)
    save_figure(fig, path)


def load(args, env):
    """(driver, nets, device, dtype): the planner drives, or without a cost model the expert."""
    models = find_models(args.root, args.models, say=lambda line: None)  # load_models says it
    if (models / "cost_model_final.pth").is_file() or not latest(models, "predictor").is_file():
        driver, _ = load_driver(args, args)
        return driver, driver.nets, driver.device, driver.dtype
    device, dtype = set_up(args)
    nets, _, _ = load_models(args.root, args.models, device, ("encoder", "predictor"))
    how = command("train_cost_model.py", args.root)
    print(f"{models}: no cost model, so the expert drives, who sees the state; {how} makes it")
    return BaselineDriver(env, "expert", 0.0, args.seed), nets, device, dtype


def run_demo(args, film, window):
    """Drives tracks in turn while the user asks for the next -> (EnergyDriver, their returns)."""
    env = make_env("fast")  # 1 ms a step, and the false futures come from the same renderer
    driver, nets, device, dtype = load(args, env)
    least = ZOOM_STEPS + args.ahead * nets["encoder"].repeat + 1
    if args.steps < least:
        fail(f"--steps {args.steps}, --ahead {args.ahead}: the first future comes in step {least}")
    driver = EnergyDriver(env, driver, nets, args.ahead, device, dtype, args.seed)
    view, returns, following = EnergyView(window, film, "demo"), [], True
    while following:
        track = args.track_seed + len(returns)
        view.reset(track)
        row = drive(env, driver, track, lambda *seen: view(*seen) and view.step < args.steps)
        returns.append(view.total)
        ended = row or view.step >= args.steps
        following = view.finish(row) if ended else not window.over
    return driver, returns


def main():
    args = arguments()
    require_dir(args.root)
    stop, stem = Stop(), writable(args.root / "visuals") / "demo_energy"
    film = VideoRecorder(VIDEO_FPS)
    window = ui.NoWindow() if args.headless else ui.open_window("TinyJEPA: the energy of futures")
    driver, returns = window.run(lambda: run_demo(args, film, window))

    files = film.save(stem)
    if driver.energy:
        driver.report(returns)
        with ornament(png := stem.with_suffix(".png")):
            draw_summary(np.array(driver.energy), np.array(driver.seconds), png, driver.ahead_s)
            files.append(png)
    else:
        print("ended before the first future")
    if files:
        print(", ".join(map(str, files)))
    return 130 if stop else 0


if __name__ == "__main__":
    run_main(main)
