"""``rsmtdf cache``: build, describe, verify, grow and share stores of teacher features. One file = one kind of work."""

from __future__ import annotations

import typer

from rsmtdf_cli.console import new_app
from rsmtdf_cli.lazy import Entry, lazy_group

__all__ = ["COMMANDS", "app"]

#: Name of each command → where it lives and its line in the help.
COMMANDS: dict[str, Entry] = {
    "plan": Entry("cache.plan", "plan", "Say what `cache build` with the same options takes: bytes, time."),
    "tune": Entry("cache.tune", "tune", "Say which layers, scales and codec are worth their bytes."),
    "build": Entry("cache.build", "build", "Run frozen teachers over every tile and store their features."),
    "watch": Entry("cache.watch", "watch", "Follow a build until it ends, from any machine that sees its store."),
    "info": Entry("cache.look", "info", "Describe a store: dataset, teachers, arrays, sizes, snapshot."),
    "verify": Entry("cache.audit", "verify", "Check a store against its ledger."),
    "preview": Entry("cache.look", "preview", "Draw what the teachers see: PCA colours, norms, similarity."),
    "fidelity": Entry("cache.fidelity", "fidelity", "Compare what a store returns with what its teachers give."),
    "drop": Entry("cache.growth", "drop", "Let arrays count no more; `cache gc` frees their bytes."),
    "gc": Entry("cache.growth", "gc", "Delete what neither the present content nor a pin needs."),
    "pin": Entry("cache.growth", "pin", "Keep a snapshot's data from `cache gc`."),
    "unpin": Entry("cache.growth", "unpin", "Give pins up; `cache gc` may then free what they kept."),
    "merge": Entry("cache.growth", "merge", "Unite two stores by tile and array without running a teacher."),
    "diff": Entry("cache.growth", "diff", "Show what two stores differ in: tiles, arrays, features."),
    "push": Entry("cache.share", "push", "Publish STORE at URL; a second push continues or adds."),
    "pull": Entry("cache.share", "pull", "Copy the store at URL, or a part of it."),
    "list": Entry("cache.catalogue", "list_", "List the stores that were built or pulled here."),
    "register": Entry("cache.catalogue", "register", "Put a store into the catalogue as it is."),
    "forget": Entry("cache.catalogue", "forget", "Take a store out of the catalogue; its files stay."),
}

app: typer.Typer = new_app("Build, describe, verify, grow and share stores of teacher features.", lazy_group(COMMANDS))


@app.callback()
def _group() -> None:
    """Make typer build a group though no command is registered."""
