"""One contestant's process, as the referee starts it: `python -m agrpo.benchmark NAME WORK OPTIONS`."""

from __future__ import annotations

import json
import sys

from agrpo.benchmark.work import Work
from agrpo.launch import use_huge_pages


def main() -> None:
    name, work, options = sys.argv[1], Work(**json.loads(sys.argv[2])), json.loads(sys.argv[3])
    if name == "ours":
        use_huge_pages()  # as the launcher does
    import torch

    torch.set_num_threads(work.threads)
    if name == "roofline":
        from agrpo.benchmark.roofline import matmul_roofline

        print(json.dumps({"kind": "roofline", "rate": matmul_roofline(work.dtype)}))
    elif name == "ours":
        from agrpo.benchmark.ours import run

        run(work)
    else:
        from agrpo.benchmark.trl import run as run_trl

        run_trl(work, **options)


if __name__ == "__main__":
    main()
