"""For every test: OpenMP threads that wait give the core away, so the suite does not hang on what else runs; and no
example fails for being slow, which on a busy machine says nothing about it. Triton kernels run in Triton's interpreter:
it looks for that when a kernel is defined, its own ones among them, so before anything imports it, as torch may. And
no test sees what the operator of this machine has set."""

import os

from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the other workers have the other cores
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is imported

for name in [name for name in os.environ if name.upper().startswith("KEYPAST_")]:
    del os.environ[name]

settings.register_profile("keypast", deadline=None)
settings.load_profile("keypast")
