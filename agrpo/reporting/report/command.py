"""`agrpo report RUN…`: the report of a run, or of several beside each other."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from agrpo.reporting.report.gather import runs_at
from agrpo.reporting.report.page import NAME, write_report
from agrpo.reporting.report.serve import server


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="agrpo report", description="A report in one HTML file: curves, findings, samples, configuration."
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run, such as runs/quickstart")
    parser.add_argument(
        "--out", type=Path, metavar="HTML", help=f"default: {NAME} in the run, or here when several are compared"
    )
    parser.add_argument("--serve", action="store_true", help="serve it on this machine, fresh while a run goes on")
    parser.add_argument("--port", type=int, default=0, metavar="N", help="of --serve; default: a free one")
    options = parser.parse_args(arguments)
    try:
        runs = runs_at(options.runs)
        if options.serve:
            return _serve(runs, options.port)
        print(write_report(runs, options.out or (runs[0] / NAME if len(runs) == 1 else Path(NAME))))
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _serve(runs: list[Path], port: int) -> int:
    found, address = server(runs, port)
    print(f"{address}\nCtrl-C ends it", flush=True)
    try:
        found.serve_forever()
    except KeyboardInterrupt:
        return 0
    finally:
        found.server_close()
