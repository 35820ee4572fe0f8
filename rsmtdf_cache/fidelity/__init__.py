"""Fidelity: how far what a store returns is from what the live teacher gives for the very same pixels.

Flow: ``sample.py`` (stores, arrays, tiles) → ``questions.py`` (what the teacher is shown, what is read instead) →
``measure.py`` → ``agreement.py`` (numbers) → ``report.py`` (rows, summary) → ``picture.py``.
"""

from __future__ import annotations

from rsmtdf_cache.fidelity.measure import TILES, measure_fidelity
from rsmtdf_cache.fidelity.report import FidelityReport, Line, summary

__all__ = ["FidelityReport", "Line", "TILES", "measure_fidelity", "summary"]
