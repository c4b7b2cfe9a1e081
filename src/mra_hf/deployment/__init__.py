"""Checkpoints as graphs for other runtimes: `export_checkpoint` and its report."""

from mra_hf.deployment.export import DTYPES, FORMATS, ExportReport, export_checkpoint

__all__ = ["DTYPES", "FORMATS", "ExportReport", "export_checkpoint"]
