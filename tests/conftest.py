"""For every test: OpenMP threads that wait give the core away, so the suite does not hang on what else runs."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is imported
