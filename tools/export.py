"""Episodes for other programs.

python -m tools.export    # the dataset of Minari (minari.farama.org)
"""

import json
import os
import re
import shutil
from pathlib import Path

import gymnasium
import numpy as np

from buffer import FRAME, MADE_BY, episode_key, index, read_ahead
from support.cli import Parser, fail, optional, run_main
from support.files import writable
from support.progress import progress


def minari_episodes(minari, chunks):
    """Minari's EpisodeBuffer of each Chunk; a line names the folders of damaged ones."""
    for chunk, data in read_ahead(progress(chunks, desc="export", unit="episode")):
        if data is None:
            continue
        yield minari.data_collector.EpisodeBuffer(
            seed=chunk.meta["track_seed"],
            options={"meta": json.dumps(chunk.meta)},
            observations=data["obs"],
            actions=data["act"],
            rewards=data["reward"],
            terminations=data["terminated"],
            truncations=data["truncated"],
            infos={"telemetry": data["telemetry"]},
        )


def export_minari(folders, out, name):
    """Writes the episodes of folders as the dataset `name` of Minari (minari.farama.org) in `out`.

    The dataset appears whole or not at all. Every array stays as it is, 12 KB a frame; telemetry
    goes to the infos, the meta to the options. Damaged chunks are named and left out. Refusal for
    a bad name, no whole chunk, a dataset that is there, or a missing package.
    """
    out = out.resolve()  # Minari writes relative to a folder of its own
    if not re.fullmatch(r"[\w.-]*\w-v\d+", name):
        fail(f"--name {name}: expected a name that ends in a version, such as carracing-v0")
    minari = optional("minari", "minari>=0.5.4")
    optional("h5py", "h5py")

    # an episode that is in two folders counts once
    episodes = {episode_key(c.meta): c for folder in folders for c in index(folder)[0]}
    if not episodes:
        fail("no episodes in these folders; `python collect_race_data.py` makes some")
    if (out / name).exists():
        fail(f"{out / name}: exists already; choose another --name or --out")

    tmp = writable(out / f".{name}.{os.getpid()}.tmp")
    os.environ["MINARI_DATASETS_PATH"] = str(tmp)
    try:
        minari.create_dataset_from_buffers(
            name,
            minari_episodes(minari, episodes.values()),
            data_format="hdf5",
            jpeg_encoding=False,
            observation_space=gymnasium.spaces.Box(0, 255, FRAME, np.uint8),
            action_space=gymnasium.spaces.Box(np.float32([-1, 0, 0]), np.float32([1, 1, 1])),
            description="gymnasium's CarRacing-v3 in 64x64 pixels, collected by TinyJEPA",
            requirements=["gymnasium[box2d]"],
        )
        os.rename(tmp / name, out / name)
    finally:
        shutil.rmtree(tmp)
    load = f'import minari; print(minari.load_dataset("{name}").total_steps)'
    print(f"{out / name}: {len(episodes)} episodes; MINARI_DATASETS_PATH={out} python -c '{load}'")


def main():
    p = Parser(description="episodes for other programs")
    folders = dict(nargs="*", type=Path, default=[Path(name) for name in MADE_BY])
    p.add_argument("folders", **folders, help=f"of chunks (default: {' '.join(MADE_BY)})")
    p.add_argument("--out", type=Path, default=Path("minari"), help="where datasets are kept")
    p.add_argument("--name", default="carracing-v0", help="Minari's dataset id, ends in a version")
    args = p.parse_args()
    export_minari(args.folders, args.out, args.name)
    return 0


if __name__ == "__main__":
    run_main(main)
