"""The one format of checkpoints: written whole, loaded safely, found by name.

A checkpoint is a dict: `schema`, `nets` ({name: {class, args, weights}}), and what the stage adds.
"""

import errno
import io
import os
import re
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from dream import DreamModel
from networks import CostModel, Predictor, TinyDecoder, TinyEncoder
from support import REPO
from support.cli import Refusal, command, fail, typed
from support.files import git_commit, replace_atomically, versions

PRETRAINED = REPO / "models" / "pretrained"
SCHEMA = 2  # of checkpoints; another one is refused
# what is built from a checkpoint; the encoder's heads serve its training only
NETS = {"encoder": TinyEncoder, "decoder": TinyDecoder, "predictor": Predictor, "cost": CostModel}
NETS |= {"dream": DreamModel}
KEPT, KEPT_EVERY = 3, 10  # rotation keeps a stage's last checkpoints, and every so-many-th epoch
YOUNG_S = 600  # seconds; rotation keeps younger checkpoints, which a watcher may be reading
TEMPORARY = re.compile(  # names of half-written checkpoints
    r"\.(\w+_ep[0-9]+|\w+_resume|cost_model_final)\.pth\.[0-9]+\.tmp", re.ASCII
)


class Damaged(Refusal):
    """A checkpoint that does not exist, or is not whole."""


# ------------------------------------------------------------------ writing


def save(path, nets, **state):
    """Writes {name: net} with the arguments that rebuild each, and `state`: tensors and plain data.

    Refuses weights that are not finite.
    """
    for name, net in nets.items():
        if broken := not_finite(net.state_dict()):
            retry = "use --precision fp32, or a lower --lr with --fresh"
            step = f"step {state.get('step')}: {name}'s {broken} is not finite"
            fail(f"{step}; {path} was not written; {retry}")
    nets = {
        name: {"class": type(net).__name__, "args": net.args, "weights": net.state_dict()}
        for name, net in nets.items()
    }
    head = {"schema": SCHEMA, "versions": versions(), "commit": git_commit()}
    write_payload(path, {**head, **state, "nets": nets})


def write_payload(path, payload):
    """Writes a payload; makes its folder again if it vanished."""
    if not path.parent.is_dir():
        path.parent.mkdir()
        tqdm.write(f"{path.parent}: was gone, is made again")
    body = io.BytesIO()  # torch.save itself hides the error of a full disk
    torch.save(payload, body)
    replace_atomically(path, lambda f: f.write(body.getbuffer()))


def not_finite(weights):
    """The name of the first tensor of a state_dict that is not finite, or None."""
    return next((name for name, t in weights.items() if not torch.isfinite(t).all()), None)


# ------------------------------------------------------------------ reading


def read(path, script=""):
    """The payload of a checkpoint. Refuses other files and names `script`, which makes it."""
    path = Path(path)
    if path.is_dir():
        fail(f"{path}: expected a checkpoint, found a folder")
    if not path.exists():
        raise Damaged(f"{path}: not found{hint(path, script)}")
    try:
        with open(path, "rb") as f:
            if torn := zipfile.ZipFile(f).testzip():  # torch does not check the CRCs
                raise zipfile.BadZipFile(torn)
            f.seek(0)
            payload = torch.load(f, map_location="cpu", weights_only=True)
        schema, parts = payload["schema"], {"class", "args", "weights"}
        if schema == SCHEMA and not all(parts <= set(net) for net in payload["nets"].values()):
            raise KeyError("nets")
    except Exception as e:  # torch raises half a dozen types for damaged or hostile files
        if isinstance(e, OSError) and e.errno not in (None, errno.EINVAL):
            raise OSError(e.errno, os.strerror(e.errno), str(path)) from None  # it may be whole
        raise Damaged(
            f"{path}: expected a checkpoint of this project, found a damaged or foreign file "
            f"({type(e).__name__}){hint(path, script, word='makes it anew')}"
        ) from e
    if schema != SCHEMA:
        anew = hint(path, script, "--fresh", "makes it anew")
        fail(f"{path}: expected checkpoint schema {SCHEMA}, found {schema}{anew}")
    return payload


def build(payload, name, path=Path("checkpoint"), script=""):
    """The named net of a payload, with its weights. Refuses weights that do not fit."""
    if name not in payload["nets"]:
        fail(f"{path}: expected a net named {name}, found {', '.join(payload['nets'])}")
    entry, kind = payload["nets"][name], NETS[name]
    anew = hint(path, script, "--fresh", "makes it anew")
    if entry["class"] != kind.__name__:
        fail(f"{path}: expected {name} to be a {kind.__name__}, found a {entry['class']}{anew}")
    try:
        net = kind(**entry["args"])
        net.load_state_dict(entry["weights"])
    except Exception as e:  # the arguments of a foreign file may be anything
        with_args = f"{entry['class']} with {entry['args']} ({last_line(e)})"
        fail(f"{path}: the weights of {name} do not fit {with_args}{anew}")
    if broken := not_finite(entry["weights"]):
        fail(f"{path}: {name}'s {broken} is not finite{anew}")
    return net


def load_frozen(path, name, device, script=""):
    """(net, payload): the net is on the device, in eval mode, without gradients."""
    payload = read(path, script)
    return build(payload, name, Path(path), script).to(device).eval().requires_grad_(False), payload


def fingerprint(net):
    """16 hex digits that change with any weight or buffer of the net."""
    import hashlib

    h = hashlib.sha256()
    for name, t in sorted(net.state_dict().items()):
        h.update(name.encode())
        h.update(t.detach().cpu().contiguous().numpy().tobytes())
    return h.hexdigest()[:16]


def last_line(error):
    """The last line of an exception; torch's last line says most."""
    return (str(error).splitlines() or [type(error).__name__])[-1].strip()


def hint(path, script, flags="", word="makes it"):
    """The end of a refusal: the command that makes this checkpoint, if its script is known."""
    if path.parent.resolve() == PRETRAINED.resolve():
        return "; `git checkout models/pretrained` brings it back"
    root = path.parent.parent if path.parent.name == "models" else Path(".")
    return f"; {command(script, root, flags)} {word}" if script else ""


# ------------------------------------------------------------------ names


def numbered(folder, name):
    """[(N, path)] of the files called `name`, in order of N, which * stands for (-1 without *).

    Finds only what this code writes: no `_ep2 (copy).pth`, no `_ep02.pth`, no folder.
    """
    form = re.compile(re.escape(name).replace(r"\*", "(0|[1-9][0-9]{0,9})"))
    found = [(form.fullmatch(p.name), p) for p in Path(folder).glob(name)]
    return sorted((int(m[1]) if m.lastindex else -1, p) for m, p in found if m and p.is_file())


def latest(folder, prefix):
    """Path of the highest `prefix_ep{N}.pth`; the name of the first one if there is none."""
    found = numbered(folder, f"{prefix}_ep*.pth")
    return found[-1][1] if found else Path(folder) / f"{prefix}_ep1.pth"


def rotate(folder, prefix, spared=()):
    """Deletes old `prefix_ep{N}.pth`, and what a kill left half written.

    Keeps the last KEPT, every KEPT_EVERY-th, those younger than YOUNG_S, and `spared` epochs.
    """
    old = lambda path: time.time() - path.stat().st_mtime > YOUNG_S
    for epoch, path in numbered(folder, f"{prefix}_ep*.pth")[:-KEPT]:
        with suppress(OSError):
            if epoch % KEPT_EVERY and epoch not in spared and old(path):
                path.unlink()
    for path in folder.glob(".*.pth.*.tmp"):
        with suppress(OSError):
            if TEMPORARY.fullmatch(path.name) and old(path):
                path.unlink()


# ------------------------------------------------------------------ which folder


def require_dir(root):
    """The Path of a ROOT. Refuses one that does not exist: other nets would drive instead."""
    if not Path(root).is_dir():
        fail(f"--root {root}: no such folder; leave --root out for the current folder")
    return Path(root)


def find_models(root, models=None, say=print):
    """The folder of weights: --models, ROOT/models, or models/pretrained if nothing was trained."""
    if models is not None:
        if not latest(models, "encoder_mixed").is_file():
            fail(f"--models {models}: no encoder_mixed_ep*.pth there, as in models/pretrained")
        return Path(models)
    models = Path(root) / "models"
    if latest(models, "encoder_mixed").exists():
        return models
    if (models / "encoder_resume.pth").exists():
        again = f"{command('train_encoder.py', root)} goes on{pretrained_hint(models)}"
        fail(f"{models}: its encoder has not finished an epoch; {again}")
    if latest(PRETRAINED, "encoder_mixed").exists():
        models = Path(os.path.relpath(PRETRAINED))
        say(f"{root}: no encoder there; takes the weights that come with the code, {models}")
    return models


def pretrained_hint(models):
    """The end of a refusal for a folder that lacks nets: how to use the shipped weights."""
    shipped = latest(PRETRAINED, "encoder_mixed").is_file()
    if not shipped or Path(models).resolve() == PRETRAINED.resolve():
        return ""
    return f"; --models {typed(os.path.relpath(PRETRAINED))} takes the weights that come with it"


def load_models(root, models, device, names=("encoder", "predictor", "cost"), optional=False):
    """({name: net}, {name: payload}, folder): frozen nets of `find_models`.

    Refuses a net that is missing or was trained on another net. With `optional` it prints a line
    and leaves the net out.
    """
    folder = find_models(root, models)
    sources = {
        "encoder": (latest(folder, "encoder_mixed"), "train_encoder.py"),
        "predictor": (latest(folder, "predictor"), "train_predictor.py"),
        "cost": (folder / "cost_model_final.pth", "train_cost_model.py"),
    }
    nets, payloads, hint = {}, {}, pretrained_hint(folder)
    lacking = [sources[n] for n in names[1:] if not (optional or sources[n][0].is_file())]
    if lacking:
        paths = " and ".join(str(path) for path, _ in lacking)
        how = " and ".join(command(script, root) for _, script in lacking)
        verb = "makes it" if len(lacking) == 1 else "make them"
        fail(f"{paths}: not found; {how} {verb}{hint}")
    say = print if optional else fail
    for name in names:
        path, script = sources[name]
        if optional and not path.is_file():
            say(f"no {name}: {path} is not there; {command(script, root)} makes it{hint}")
            continue
        net, payload = load_frozen(path, name, device, script)
        # a checkpoint holds the fingerprints of the nets that it was trained on
        keys = {on: fingerprint(nets[on]) for on in nets}
        if other := next((on for on in keys if payload.get(f"{on}_key") != keys[on]), None):
            wrong = f"what {script} wrote belongs to another {other} than {sources[other][0]}"
            say(f"{folder}: {wrong}; run {command(script, root, '--fresh')}{hint}")
            continue
        nets[name], payloads[name] = net, payload
    return nets, payloads, folder
