"""Checkpoints as graphs for other runtimes: `export_checkpoint` and its report."""

from mra_hf.deployment.export import DTYPES, FORMATS, export_checkpoint
from mra_hf.deployment.report import ExportReport

__all__ = ["DTYPES", "FORMATS", "ExportReport", "export_checkpoint"]
