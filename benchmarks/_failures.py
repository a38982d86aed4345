"""A plugin of pytest that prints each failure as it happens: `pytest -p benchmarks._failures`."""

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = f"{crash.path}:{crash.lineno}: {crash.message.splitlines()[0]}" if crash else ""
        print(f"\nFAILED {report.nodeid} ({report.when}) {reason}", flush=True)
