"""The pictures of evaluations, which no list of addresses gets."""

from functools import cache
from pathlib import Path

from molmo2_nemo.catalogue.datasets import HeldOut, HubFiles
from molmo2_nemo.catalogue.raw import ROW_SUFFIXES, column_values
from molmo2_nemo.fetch import hub
from molmo2_nemo.fetch.web import Rules
from molmo2_nemo.files import locked


@cache
def held_out_lists(lists: tuple[HeldOut, ...], root: Path, rules: Rules) -> tuple[tuple[set[str], set[str]], bool]:
    """Addresses and hashes of pictures that training must not see; False: a list is not on the Hub.

    ValueError: a list cannot be read for now.
    """
    urls: set[str] = set()
    hashes: set[str] = set()
    whole = True
    for held in lists:
        wanted = HubFiles(repo=held.repo, revision=held.revision, split=held.split)
        folder = root / "raw" / ".held_out" / held.repo.replace("/", "--")
        try:
            repository = hub.open_repository(wanted, root, rules)
        except hub.NotOnHub:
            whole = False
            continue
        except ValueError as error:
            raise ValueError(f"the pictures held out for evaluation are not known: {error}") from error
        try:
            names = [name for names in hub.choose_files(repository, wanted).values() for name in names]
        except ValueError:  # all of its splits, then
            names = [name for name in repository.files if name.lower().endswith(ROW_SUFFIXES)]
        with locked(folder / ".lock", wait=True):
            hub.fetch_files(
                repository, names, folder / repository.revision, {}, rules, lambda n: None, lambda n, r: None
            )
        for name in names:
            for row in column_values(
                folder / repository.revision / name, [held.column, *([held.sha256] if held.sha256 else [])]
            ):
                value, digest = row.get(held.column), row.get(held.sha256 or "")
                urls.update(url for url in (value if isinstance(value, list) else [value]) if isinstance(url, str))
                if digest and isinstance(digest, str):
                    hashes.add(digest.lower())
        if not urls:
            raise ValueError(
                f"the pictures held out for evaluation are not known: {held.repo} has no column {held.column}."
            )
    return (urls, hashes), whole
