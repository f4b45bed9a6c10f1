"""Prove that an artifact equals the reference: metrics, ways of feeding a text, policies, reports."""

from l4convert.parity.by_length import LengthRow
from l4convert.parity.metrics import Comparison, Metrics
from l4convert.parity.outcome import REPORT_FILE, ParityReport, SplitRow, TextUsed, write_report
from l4convert.parity.policy import Policy, Thresholds, default_policy, load_policy
from l4convert.parity.reference import Reference, TransformersReference
from l4convert.parity.report import headline, render, write_html, write_junit
from l4convert.parity.validate import compare, validate

__all__ = [
    "REPORT_FILE",
    "Comparison",
    "LengthRow",
    "Metrics",
    "ParityReport",
    "Policy",
    "Reference",
    "SplitRow",
    "TextUsed",
    "Thresholds",
    "TransformersReference",
    "compare",
    "default_policy",
    "headline",
    "load_policy",
    "render",
    "validate",
    "write_html",
    "write_junit",
    "write_report",
]
