"""One thread a process: the models are tiny, and OpenMP threads that spin on shared cores take minutes over seconds.

Ctrl-C is heard in every test: a shell that runs them in the background has it ignored, here and in what is started.
"""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
