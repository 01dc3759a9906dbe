"""The one format of checkpoints: written whole, loaded safely, found by name."""

import errno
import fcntl
import io
import itertools
import os
import re
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from networks import (
    CostModel,
    InverseModel,
    Predictor,
    Projector,
    TinyDecoder,
    TinyEncoder,
    WarpHead,
)
from support import REPO
from support.cli import Refusal, command, fail, typed
from support.files import git_commit, lock, replace_atomically, versions

PRETRAINED = REPO / "models" / "pretrained"
SCHEMA = 2  # of checkpoints; another one is refused
KEPT, KEPT_EVERY = 3, 10  # of a stage's checkpoints: the last so many, and each such epoch
YOUNG_S = 600  # a checkpoint younger than this is never deleted
TEMPORARY = re.compile(  # names of half-written checkpoints
    r"\.(\w+_ep[0-9]+|\w+_resume|cost_model_final)\.pth\.[0-9]+\.tmp", re.ASCII
)


# ------------------------------------------------------------------ checkpoints

NETS = {
    "encoder": TinyEncoder,
    "projector": Projector,
    "inverse": InverseModel,
    "warp": WarpHead,
    "decoder": TinyDecoder,
    "predictor": Predictor,
    "cost": CostModel,
}


def save(path, nets, **state):
    """Writes {name: net} and any tensors, numbers, strings, lists and dicts, whole or not at all.

    Each net is stored with its class and the arguments that rebuild it, beside versions and commit.
    Refuses nets that are not finite; where the disk is full, waits for room.
    """
    for name, net in nets.items():
        if broken := not_finite(net.state_dict()):
            fail(
                f"step {state.get('step')}: {name}'s {broken} is not finite; {path} was not "
                "written; use --precision fp32, or a lower --lr with --fresh"
            )
    _write(
        path,
        {
            "schema": SCHEMA,
            "versions": versions(),
            "commit": git_commit(),
            **state,
            "nets": {
                name: {"class": type(net).__name__, "args": net.args, "weights": net.state_dict()}
                for name, net in nets.items()
            },
        },
    )


def _write(path, payload):
    """The payload as a file; makes its folder again if that has vanished since the start."""
    if not path.parent.is_dir():
        path.parent.mkdir()
        tqdm.write(f"{path.parent}: was gone, is made again")
    body = io.BytesIO()  # torch.save hides what a full disk answers
    torch.save(payload, body)
    replace_atomically(path, lambda f: f.write(body.getbuffer()))


def not_finite(weights):
    """The name of the first tensor of a state_dict that is not finite, or None."""
    return next((name for name, t in weights.items() if not torch.isfinite(t).all()), None)


class Damaged(Refusal):
    """A checkpoint that is not there, or not whole."""


def mend(path, script, flags="", word="makes it"):
    """The end of a refusal of a checkpoint: what makes it, where its script is known."""
    if path.parent.resolve() == PRETRAINED.resolve():
        return "; `git checkout models/pretrained` brings it back"
    root = path.parent.parent if path.parent.name == "models" else Path(".")
    return f"; {command(script, root, flags)} {word}" if script else ""


def read(path, script=""):
    """The payload of a checkpoint, refused in one line, which names the script that makes it, if it
    is not one of ours."""
    path = Path(path)
    if path.is_dir():
        fail(f"{path}: expected a checkpoint, found a folder")
    if not path.exists():
        raise Damaged(f"{path}: not found{mend(path, script)}")
    try:
        with open(path, "rb") as f:
            torn = zipfile.ZipFile(f).testzip()  # torch does not look at the CRCs
            if torn:
                raise zipfile.BadZipFile(torn)
            f.seek(0)
            payload = torch.load(f, map_location="cpu", weights_only=True)
        schema = payload["schema"]
        if schema == SCHEMA and not all(
            {"class", "args", "weights"} <= set(net) for net in payload["nets"].values()
        ):
            raise KeyError("nets")
    except Exception as e:  # torch raises half a dozen types for damaged or hostile files
        if isinstance(e, OSError) and e.errno not in (None, errno.EINVAL):
            raise OSError(e.errno, os.strerror(e.errno), str(path)) from None  # it may be whole
        raise Damaged(
            f"{path}: expected a checkpoint of this project, found a damaged or foreign "
            f"file ({type(e).__name__}){mend(path, script, word='makes it anew')}"
        ) from e
    if schema != SCHEMA:
        fail(
            f"{path}: expected checkpoint schema {SCHEMA}, found {schema}, which is not this code's"
            f"{mend(path, script, word='makes it anew')}"
        )
    return payload


def build(payload, name, path=Path("checkpoint"), script=""):
    """The named net of a payload with its weights, refused in one line if they do not fit."""
    if name not in payload["nets"]:
        fail(f"{path}: expected a net named {name}, found {', '.join(payload['nets'])}")
    entry, kind = payload["nets"][name], NETS[name]
    if entry["class"] != kind.__name__:
        fail(
            f"{path}: expected {name} to be a {kind.__name__}, found a {entry['class']}"
            f"{mend(path, script)}"
        )
    try:
        net = kind(**entry["args"])
        net.load_state_dict(entry["weights"])
    except Exception as e:  # the arguments of a foreign file may be anything
        fail(
            f"{path}: the weights of {name} do not fit {entry['class']} with {entry['args']} "
            f"({last_line(e)}){mend(path, script, '--fresh', 'makes it anew')}"
        )
    if broken := not_finite(entry["weights"]):
        fail(
            f"{path}: {name}'s {broken} is not finite"
            f"{mend(path, script, '--fresh', 'makes it anew')}"
        )
    return net


def last_line(error):
    """The last line of an exception, which in torch's is the one that says most."""
    return (str(error).splitlines() or [type(error).__name__])[-1].strip()


def load_frozen(path, name, device, script=""):
    """(net, payload): a net from a checkpoint, on the device, in eval mode, without gradients."""
    payload = read(path, script)
    return build(payload, name, Path(path), script).to(device).eval().requires_grad_(False), payload


def hold(path):
    """The checkpoint as an open file, which `rotate` spares while it is open; None: it is gone."""
    with suppress(OSError):
        f = open(path, "rb")
        with suppress(OSError):  # a file system without locks: then rotation asks its age alone
            fcntl.flock(f, fcntl.LOCK_SH)
        return f


def numbered(folder, name):
    """[(N, path)] of the files of a folder that are called `name`, in order of the number N, which
    * stands for in it (-1 without *). Only what this code writes: no `_ep2 (copy).pth`, no
    `_ep02.pth`, no folder."""
    form = re.compile(re.escape(name).replace(r"\*", "(0|[1-9][0-9]{0,9})"))
    found = [(form.fullmatch(p.name), p) for p in Path(folder).glob(name)]
    return sorted((int(m[1]) if m.lastindex else -1, p) for m, p in found if m and p.is_file())


def rotate(folder, prefix, spared=()):
    """Deletes `prefix_ep{N}.pth` but the last KEPT, every KEPT_EVERY-th, the young ones, those of
    epochs in `spared`, and those that a process `hold`s; and what a kill left half written."""
    for epoch, path in numbered(folder, f"{prefix}_ep*.pth")[:-KEPT]:
        with suppress(OSError), open(path, "rb") as f:
            if (
                epoch % KEPT_EVERY
                and epoch not in spared
                and time.time() - os.fstat(f.fileno()).st_mtime > YOUNG_S
            ):
                if lock(f, wait=False):  # not where it is held
                    path.unlink()
    for path in folder.glob(".*.pth.*.tmp"):
        with suppress(OSError):
            if TEMPORARY.fullmatch(path.name) and time.time() - path.stat().st_mtime > YOUNG_S:
                path.unlink()


def back_up(folder, names):
    """Moves what an earlier run made, the files of these names (`numbered`), to a dated folder
    beside it; nothing is deleted."""
    stale = [p for name in names for _, p in numbered(folder, name)]
    if not stale:
        return
    for k in itertools.count():
        aside = folder / (time.strftime("replaced-%Y%m%d-%H%M%S") + f"-{k}" * (k > 0))
        with suppress(FileExistsError):
            aside.mkdir()
            break
    for p in stale:
        p.rename(aside / p.name)


def epoch_of(path):
    """The number in ..._ep{N}.pth, -1 if there is none."""
    m = re.search(r"_ep([0-9]+)\.pth\Z", path.name)
    return int(m.group(1)) if m else -1


def latest(folder, prefix):
    """Path of the highest `prefix_ep{N}.pth`; where there is none, the name of the first."""
    found = numbered(folder, f"{prefix}_ep*.pth")
    return found[-1][1] if found else Path(folder) / f"{prefix}_ep1.pth"


def require_dir(root):
    """The Path of a ROOT; refuses one that is not there, where other nets would drive instead."""
    if not Path(root).is_dir():
        fail(
            f"--root {root}: no such folder; leave --root out for the current one, or the weights "
            "that come with the code"
        )
    return Path(root)


def find_models(root, models=None, say=print):
    """The folder of --models, or ROOT/models, or where nothing was trained, the weights that come
    with the code; says so."""
    if models is not None:
        if not latest(models, "encoder_mixed").is_file():
            fail(
                f"--models {models}: no encoder_mixed_ep*.pth there; expected a folder of weights "
                "such as models/pretrained"
            )
        return Path(models)
    models = Path(root) / "models"
    if (models / "encoder_resume.pth").exists() and not latest(models, "encoder_mixed").exists():
        fail(
            f"{models}: its encoder has not finished an epoch; "
            f"{command('train_encoder.py', root)} goes on{pretrained_hint(models)}"
        )
    ours, shipped = (latest(folder, "encoder_mixed") for folder in (models, PRETRAINED))
    if shipped.exists() and not ours.exists():
        models = Path(os.path.relpath(PRETRAINED))
        say(f"{root}: no encoder there; takes the weights that come with the code, {models}")
    return models


def pretrained_hint(models):
    """The end of a line about nets that a folder lacks: how to take those that come with the code
    until they are trained."""
    if (
        Path(models).resolve() == PRETRAINED.resolve()
        or not latest(PRETRAINED, "encoder_mixed").is_file()
    ):
        return ""
    return (
        f"; meanwhile --models {typed(os.path.relpath(PRETRAINED))} takes the weights that come "
        "with the code"
    )


def need_nets(models, root):
    """Refuses a folder with an encoder that lacks what drives with it: says what makes that."""
    needed = {
        latest(models, "predictor"): "train_predictor.py",
        models / "cost_model_final.pth": "train_cost_model.py",
    }
    lacking = [path for path in needed if not path.is_file()]
    if lacking:
        names = " and ".join(map(str, lacking))
        made = " and ".join(command(needed[path], root) for path in lacking)
        fail(
            f"{names}: not found; {made} "
            + ("makes it" if len(lacking) == 1 else "make them")
            + pretrained_hint(models)
        )


def fingerprint(net):
    """16 hex digits that change with any weight or buffer of the net."""
    import hashlib

    h = hashlib.sha256()
    for name, t in sorted(net.state_dict().items()):
        h.update(name.encode())
        h.update(t.detach().cpu().contiguous().numpy().tobytes())
    return h.hexdigest()[:16]
