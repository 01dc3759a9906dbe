"""Drive yourself, in the simulator or in the dream of the world model.

Tab changes between the two, 25 times a second each. A dream starts from the present frames: the
dream model samples the next latent from the last ones and your actions, and the decoder draws it.
Without a dream model the predictor makes the next latent, which holds for two seconds. The
simulator runs on below the dream under the same actions, as its ghost (key g). Speed and yaw rate
are read off dreamt latents by ridge probes, which are fitted in seconds at the start.

Writes visuals/play.mp4 and .gif of what was recorded (key v). With --data FOLDER, recorded driving
also becomes episodes there, a source to train on, of tracks from 10,000,000 on. --headless --keys
FILE replays a script of keys and writes visuals/play.json, what happened in each tick. A line of it
is "seconds key", "seconds key down" or "seconds key up".

    python play.py
    python play.py --headless --keys keys.txt
"""

if __name__ == "__main__":
    import support.start  # noqa: F401  first: Ctrl-C ends a script quietly while it imports

import json
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch

from buffer import MADE_BY, history_rows, index
from car import FPS, MAX_STEPS, ZOOM_STEPS
from car.env import make_env
from car.episode import EpisodeRecorder, run_episode
from car.telemetry import TELEMETRY, telemetry, telemetry_of
from collect_recovery_data import FaultyExpert
from demo_energy import MIN_JUMP, teleport
from dream import TEMPERATURE
from drive_mpc import load_driver, save_episode
from support.checkpoints import require_dir
from support.cli import Stop, fail, parser, run_main, track_number, weight
from support.dreams import load_dream
from support.files import replace_atomically, writable
from support.lap_view import VIDEO_FPS
from support.latents import encode, ridge
from support.pictures import VideoRecorder
from support.plan_config import planning, to_action
from support.play_keys import ARROWS, DIGITS, KEYS, KeyScript, PlayWindow
from support.play_view import AHEAD, BRAKE, STEER, TICK, TRACE, compose
from support.window import keys_text, open_window
from support.workers import FIRST_SEED

SWITCHES = {"tab": "dreaming", "g": "ghost", "a": "autopilot", "e": "energies", "space": "paused"}
GAS = 0.6  # of a held key: full gas spins the car
RAMP = np.array((0.08, 0.06, 0.05))  # most change of steer, gas and brake in a tick
TICK_MS, PLAN_MS = 1000 * TICK, (4.0, 30.0)  # of a tick; least and most of it for a plan
REFRESH = 2.0  # s for which a dream of the predictor holds
USUAL = 5  # of the keys 0 to 9: the one of TEMPERATURE
SPARE_MS = 4.0  # of a tick that stay free
LEAST_SAMPLES = 16  # candidates of a plan on a slow machine
PROBE_EPISODES, PROBE_STEPS = 16, 250  # driving from which the probes are fitted
READ = "speed", "yaw_rate"  # what they read
LEAST_EPISODE = 2 * ZOOM_STEPS  # steps; the trainers leave out the first ZOOM_STEPS of each


def arguments():
    p = parser(__doc__, models=True)
    p.epilog = keys_text(KEYS)
    add = p.add_argument_group("task").add_argument
    add("--track_seed", type=track_number, help="first track; key r: the next")
    add("--dream", action="store_true", help="begin in the dream")
    refresh = "s of a dream after which it starts from the simulator again, 0: never (default: 0,"
    add("--refresh", type=weight, help=f"{refresh} or {REFRESH:g} without a dream model)")
    add("--data", type=Path, help="folder in ROOT for the episodes that are recorded")
    add("--keys", type=Path, help="file of keys that are pressed, for --headless")
    add("--headless", action="store_true", help="no window: needs --keys, records all of it")
    planning(p)
    p.set_defaults(policy_share=0.0)  # proposals take a twelfth of a tick
    args = p.parse_args()
    if args.headless != bool(args.keys):
        p.error("--headless and --keys belong together")
    if args.data and (args.track_seed or FIRST_SEED) < FIRST_SEED:
        p.error(f"--data: tracks below {FIRST_SEED} are never learned from")
    if args.data and (owner := MADE_BY.get(args.data.name)):
        p.error(f"--data {args.data}: belongs to {owner}; choose another name")
    return args


def first_track(folder):
    """The track to begin with: behind those whose driving is in the folder already."""
    if not folder:
        return 100_000
    return max([FIRST_SEED - 1, *(c.meta["track_seed"] for c in index(folder)[0])]) + 1


# ------------------------------------------------------------------ the game


def fit_probes(driver, seed=FIRST_SEED):
    """Ridge probes of READ from planned latents (n, planned) -> predict(z) (n, 2), and their R².

    Fitted on the driving of the faulty expert, but for its last episode, on which R² is measured.
    """
    env, e, parts = make_env("fast"), driver.encoder, []
    columns = [list(TELEMETRY).index(name) for name in READ]
    for i in range(PROBE_EPISODES):
        policy, rng = FaultyExpert(pace=i / PROBE_EPISODES), np.random.default_rng(i)
        policy.max_steps = PROBE_STEPS
        arrays, _ = run_episode(env, policy, seed + i, rng)
        steps = np.arange(ZOOM_STEPS, len(arrays["obs"]))
        obs = torch.from_numpy(arrays["obs"]).permute(0, 3, 1, 2)
        obs = obs[history_rows(steps, e.history, e.repeat)]
        z = encode(e, obs, driver.device, driver.dtype)[:, : e.planned]
        parts.append((z.cpu().numpy(), arrays["telemetry"][steps][:, columns]))
    x, y = (np.concatenate(part) for part in zip(*parts[:-1]))
    probes = ridge(x, y, alpha=10.0)
    return probes.predict, probes.score(*parts[-1])


class Game:
    """A car in the simulator and in a dream of it; `tick` plays 40 ms of it.

    The simulator runs in a dream too, under the same actions. `z` (1, D) is the present latent,
    seen or dreamt.
    """

    def __init__(self, args, driver, folder):
        self.args, self.driver, self.folder = args, driver, folder
        self.encoder, self.predictor = driver.nets["encoder"], driver.nets["predictor"]
        self.cost, self.env = driver.nets["cost"], make_env("fast").unwrapped
        self.model = load_dream(Path(driver.models), self.encoder, driver.device)
        self.refresh = args.refresh
        if self.refresh is None:
            self.refresh = 0.0 if self.model else REFRESH
        self.temperature, self.generator = TEMPERATURE, torch.Generator(driver.device)
        self.probes, self.probes_r2 = fit_probes(driver)
        self.rng, self.recorder, self.plan_ms = np.random.default_rng(args.seed), None, PLAN_MS[0]
        self.autopilot = self.energies = self.paused = self.single = False
        self.ghost, self.dreaming = True, args.dream
        self.track = (args.track_seed or first_track(folder)) - 1
        self.reset()

    def reset(self):
        """Begins the next track, behind the opening zoom."""
        self.end_episode()
        self.track += 1
        obs, _ = self.env.reset(seed=self.track)
        self.driver.reset(self.track)
        self.generator.manual_seed(self.args.seed + self.track)
        self.driver.frames.append(obs)
        self.manual = True  # until a tick has a plan
        self.total, self.ended, self.trace = 0.0, "", deque(maxlen=TRACE)
        self.pedals, self.actions = np.zeros(3), deque(maxlen=2 * self.encoder.span)
        for _ in range(ZOOM_STEPS):
            self.step(np.zeros(3, np.float32))
        self.look()

    def look(self):
        """Takes the latent of the simulator's frames; a dream begins anew there."""
        self.z, self.dream_ticks, self.memory = self.driver.encode(), 0, None
        self.past = deque(maxlen=AHEAD + 1)

    def tick(self, held, pressed, recording=False):
        """Plays a tick with these keys down, and these pressed; `recording` keeps an episode."""
        for key in pressed:
            self.press(key)
        if self.paused and not self.single:
            return
        self.single = False

        # an episode begins or ends
        if self.folder and recording and not self.recorder and not self.ended:
            self.recorder = EpisodeRecorder()
            self.recorder.add(self.driver.frames[-1], telemetry(self.env))
            self.drivers = set()
        if self.recorder and not recording:
            self.end_episode()

        # plan, act, see
        if self.autopilot or self.energies:
            self.plan()
        self.action = self.controls(held | (ARROWS & {*pressed}))
        for _ in range(self.encoder.repeat):
            self.step(self.action)
        self.advance()

    def press(self, key):
        """A key that changes something, other than the arrows."""
        if key in SWITCHES:
            setattr(self, SWITCHES[key], not getattr(self, SWITCHES[key]))
        if key == "tab":
            self.look()
        elif key == "t" and not self.ended:
            self.teleport()
        elif key == "r":
            self.reset()
        elif key == "s":
            self.paused = self.single = True
        elif key in DIGITS:
            self.temperature = TEMPERATURE * int(key) / USUAL

    def plan(self):
        """Plans from the present latent, takes the time."""
        start = time.perf_counter()
        self.driver.plan_from(self.z)
        self.plan_ms = 1000 * (time.perf_counter() - start)

    def fit_plans(self, tick_ms):
        """Sets how many candidates the next plan has, from what the last tick took of the time."""
        cfg = self.driver.cfg
        share = np.clip(TICK_MS - SPARE_MS - tick_ms + self.plan_ms, *PLAN_MS) / self.plan_ms
        cfg.samples = int(np.clip(cfg.samples * share**0.5, LEAST_SAMPLES, self.args.samples))

    def controls(self, held):
        """The action (3,) of held arrow keys, along ramps, or of the autopilot."""
        self.manual = bool(held & ARROWS) or not self.autopilot
        if self.recorder:
            self.drivers.add("human" if self.manual else "autopilot")
        if not self.manual:
            self.pedals = to_action(self.driver.u[0]).cpu().numpy()
            return self.pedals
        turn = ("right" in held) - ("left" in held)
        target = np.array((STEER * turn, GAS * ("up" in held), BRAKE * ("down" in held)))
        self.pedals = self.pedals + np.clip(target - self.pedals, -RAMP, RAMP)
        return self.pedals.astype(np.float32)

    def step(self, action):
        """A step of the simulator, as long as its lap goes on."""
        if self.ended:
            return
        obs, reward, terminated, _, info = self.env.step(action)
        self.driver.frames.append(obs)
        self.actions.append(action)
        self.total += reward
        if self.recorder:
            self.recorder.add(obs, telemetry(self.env), action, reward)
            if len(self.recorder.actions) >= MAX_STEPS:
                self.end_episode()  # the next tick begins another one
        if terminated:
            self.ended = "lap finished" if info.get("lap_finished") else "left the field"
            self.end_episode(terminated)

    @torch.inference_mode()
    def advance(self):
        """The next latent, and its energies."""
        act = torch.from_numpy(self.action)[None, None].to(self.driver.device)
        self.past.append((self.z, act))
        z = self.dream(act) if self.dreaming else None
        refresh = self.refresh and self.dream_ticks * TICK >= self.refresh
        if z is None:
            self.z = self.driver.encode()
        elif refresh and not self.ended or not z.isfinite().all():
            self.look()
        else:
            self.z, self.dream_ticks = z, self.dream_ticks + 1
        if self.energies and len(self.past) > AHEAD:
            planned = lambda z: z[:, : self.encoder.planned]
            acts = torch.cat([a for _, a in list(self.past)[1:]], dim=1)
            z_hat = self.predictor.rollout(planned(self.past[1][0]), acts)[:, -1]
            surprise = (z_hat - planned(self.z)).pow(2).mean()
            best = self.cost.energy(self.driver.rollout()).mean()
            self.trace.append([float(e) for e in (self.cost.energy(self.z), best, surprise)])

    def dream(self, act):
        """The latent that follows on the present one under act (1, 1, 3)."""
        if self.model is None:
            return self.predictor.rollout(self.z, act)[:, 0]
        of = self.memory, self.temperature, self.generator
        z, self.memory = self.model.step(self.z, act[:, 0], *of)
        return z

    def teleport(self):
        """Places the car elsewhere on its track; a dream begins anew there."""
        self.end_episode()
        state = telemetry_of(self.env)
        jump = int(self.rng.integers(MIN_JUMP, len(self.env.track) - MIN_JUMP))
        self.driver.frames.extend(teleport(self.env, state, list(self.actions), jump))
        self.z, self.dream_ticks, self.memory = self.driver.encode(), 0, None

    def end_episode(self, terminated=False):
        """Writes what was recorded as an episode of --data, if it is long enough to learn from."""
        recorder, self.recorder = self.recorder, None
        if recorder and len(recorder.actions) < LEAST_EPISODE:
            print(f"{len(recorder.actions) / FPS:.1f} s are too short for an episode: not kept")
        elif recorder:
            recorder.ends = terminated, not terminated
            row = dict(track_seed=self.track, lap_finished=self.ended == "lap finished")
            save_episode(self.folder, "-".join(sorted(self.drivers)), "fast", row, recorder)

    def read(self):
        """{name: (in the dream or seen, in the simulator)} of READ."""
        z = self.z[:, : self.encoder.planned].cpu().numpy()
        state = telemetry_of(self.env)
        return {n: (float(x), state[n]) for n, x in zip(READ, self.probes(z)[0])}


# ------------------------------------------------------------------ main


def play(args, window, film):
    """Plays until the user quits -> (rows of what happened, if headless; ms of each tick)."""
    driver, decoder = load_driver(args, args)
    if decoder is None:
        fail("a dream needs a decoder of this encoder, see the line above")
    if driver.encoder.repeat / FPS != TICK:
        fail(f"play.py shows a latent each {TICK_MS:.0f} ms: train an encoder with --repeat 2")
    game = Game(args, driver, writable(args.root / args.data) if args.data else None)
    print(f"speed and yaw rate are read off latents with R² {game.probes_r2:.3f}")
    rows, ms, tick = [], [], 0
    try:
        while not window.over:
            began, seconds = time.perf_counter(), tick * TICK
            held, pressed = window.take(seconds)
            if "v" in pressed:
                window.recording = not window.recording
            game.tick(held, pressed, window.recording)
            canvas = compose(game, decoder)
            if window.recording:
                film.add(canvas)

            # a script replays the same way on any machine: its plans stay as large as they are
            if args.headless:
                rows.append(row_of(game, seconds, held, pressed))
            if not game.paused:
                ms.append(1000 * (time.perf_counter() - began))
                if not args.headless:
                    game.fit_plans(ms[-1])
            window.show(canvas, seconds)
            tick += 1
    finally:
        game.end_episode()
    return rows, ms


def row_of(game, seconds, held, pressed):
    """What happened in a tick, for the JSON."""
    read = {n: [round(v, 3) for v in pair] for n, pair in game.read().items()}
    return {
        "seconds": round(seconds, 2),
        "keys": sorted(held) + pressed,
        "dreaming": game.dreaming,
        "dream_seconds": round(game.dream_ticks * TICK, 2),
        "autopilot": game.autopilot,
        "paused": game.paused,
        "track": game.track,
        "manual": game.manual,
        "action": [round(float(a), 4) for a in game.pedals],
        **read,
        "energies": [float(f"{e:.4g}") for e in game.trace[-1]] if game.trace else None,
        "return": round(game.total, 1),
    }


def main():
    args = arguments()
    require_dir(args.root)
    stem, film, stop = writable(args.root / "visuals") / "play", VideoRecorder(VIDEO_FPS), Stop()
    if args.headless:
        window = KeyScript(args.keys)
    elif not (window := open_window("TinyJEPA: drive the dream", PlayWindow, "")).visible:
        fail("play.py needs a window, or --headless --keys FILE")
    try:
        rows, ms = window.run(lambda: play(args, window, film))
    finally:
        files = film.save(stem)

    if ms:
        p50, p99 = np.percentile(ms, (50, 99))
        print(f"{len(ms)} ticks, p50 {p50:.1f} ms, p99 {p99:.1f} ms of {TICK_MS:.0f}")
    if args.headless:
        text = json.dumps({"keys": str(args.keys), "ticks": rows, "ms": ms}, indent=1).encode()
        replace_atomically(path := stem.with_suffix(".json"), lambda f: f.write(text))
        files.append(path)
    if files:
        print(", ".join(map(str, files)))
    return 130 if stop else 0


if __name__ == "__main__":
    run_main(main)
