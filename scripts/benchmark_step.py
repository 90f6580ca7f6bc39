"""A whole GRPO step beside TRL's, in one run on the same work: `agrpo benchmark step` with the same options.

python scripts/benchmark_step.py [--peer trl|trl-vllm|none] [--json FILE] [--plot FILE]
"""

import sys

from agrpo.benchmark.command import main

raise SystemExit(main(["step", *sys.argv[1:]]))
