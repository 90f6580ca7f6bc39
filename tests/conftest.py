"""One thread a process: the models are tiny, and OpenMP threads that spin on shared cores take minutes over seconds."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
