"""``rsmtdf cache``: build, describe, verify, grow and share stores of teacher features. One file = one kind of work."""

from __future__ import annotations

from rsmtdf_cli.cache.audit import verify
from rsmtdf_cli.cache.build import build
from rsmtdf_cli.cache.catalogue import forget, list_, register
from rsmtdf_cli.cache.fidelity import fidelity
from rsmtdf_cli.cache.growth import diff, drop, gc, merge, pin, unpin
from rsmtdf_cli.cache.look import info, preview
from rsmtdf_cli.cache.plan import plan
from rsmtdf_cli.cache.share import pull, push
from rsmtdf_cli.cache.tune import tune
from rsmtdf_cli.console import new_app

__all__ = ["app"]

app = new_app("Build, describe, verify, grow and share stores of teacher features.")

for _command in (plan, tune, build, info, verify, preview, fidelity, drop, gc, pin, unpin, merge, diff, push, pull):
    app.command()(_command)
app.command("list")(list_)
app.command()(register)
app.command()(forget)
