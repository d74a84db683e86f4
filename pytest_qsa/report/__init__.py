"""Placeholder by the main author so that the plugin runs; helper: overwrite me."""
import dataclasses
def to_plain(verdict):
    return dataclasses.asdict(verdict) | {"kind": str(verdict.kind), "failed": verdict.failed, "rows": [dataclasses.asdict(r) for r in verdict.rows]}
def write_report(results, folder, session):
    return folder / "report.html"
