"""Checks of the folders and addresses that a configuration names. All of them raise ConfigError."""

from pathlib import Path

from molmo2_nemo import storage
from molmo2_nemo.config.errors import refuse
from molmo2_nemo.config.schema import Config


def check_addresses(cfg: Config) -> None:
    """Refuse an address of object storage where a folder is needed, and one that cannot be. Raises ConfigError."""
    run_dir, upload_to = str(cfg.run_dir), cfg.train.upload_to
    refuse(
        storage.is_remote(run_dir),
        f"run_dir={storage.shown(run_dir)} is an address, and a run works in a folder: leave run_dir out, or name a"
        f" folder, and set train.upload_to={storage.shown(run_dir)}, which copies each checkpoint there.",
    )
    if upload_to is not None:
        refuse(
            not storage.is_remote(upload_to),
            f"train.upload_to={upload_to} is no address of object storage: write s3://BUCKET/PATH, gs://BUCKET/PATH or"
            " msc://PROFILE/PATH.",
        )
        storage.check(upload_to, "train.upload_to")
    given = cfg.train.init_from
    places = {"run_dir": run_dir, "train.init_from": given, "data.root": cfg.data.root}
    places |= {f"data.{name}": path for name, path in cfg.data.own.items()}
    for key, path in places.items():
        is_url = isinstance(path, str) and path.startswith("file:")  # would become a folder of this name
        refuse(is_url, f"{key}={path} is a local path with a scheme: write it without file://.")
    for address in given if isinstance(given, list) else [given]:
        if isinstance(address, str) and storage.is_remote(address):
            storage.check(address, "train.init_from")


def check_run_dir(cfg: Config) -> None:
    """Refuse a run in the folder of something else, which then would be two things. Raises ConfigError."""
    holds = {"config.json": "a Hugging Face model", ".nv-meta": "shards of data"}
    other = next((what for name, what in holds.items() if (Path(cfg.run_dir) / name).exists()), None)
    refuse(
        other is not None,
        f"run_dir={cfg.run_dir} holds {other}: leave run_dir out, or name a folder of its own for the run.",
    )
