"""Conversion of existing checkpoints: `convert_checkpoint` and its report."""

from mra_hf.conversion.convert import DTYPES, REPORT_NAME, convert_checkpoint
from mra_hf.conversion.report import ConversionReport

__all__ = ["DTYPES", "REPORT_NAME", "ConversionReport", "convert_checkpoint"]
