"""For every test: OpenMP threads that wait give the core away, so the suite does not hang on what else runs; and no
example fails for being slow, which on a busy machine says nothing about it."""

import os

from hypothesis import settings

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is imported

settings.register_profile("keypast", deadline=None)
settings.load_profile("keypast")
