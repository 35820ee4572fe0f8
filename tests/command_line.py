"""``rsmtdf`` called within the test's own process."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner

from rsmtdf_cli.app import app

__all__ = ["call", "call_json"]


def call(*arguments: object) -> tuple[int, str, str]:
    """Return exit code, standard output and standard error."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.stdout, result.stderr


def call_json(*arguments: object) -> Any:
    """Return what a command that has to succeed prints with ``--json``, on the CPU."""
    code, out, err = call(*arguments, "--json", "-q", "--device", "cpu")
    assert code == 0, err
    return json.loads(out)
