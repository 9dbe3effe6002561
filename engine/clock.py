"""Seconds since 1970 that never jump: what the machine's clock said when this was loaded, and what has passed since.

Sessions expire, works are given up and steps wait for their mates by it. A machine whose clock is set right while they
do, as one may be soon after its start, would drop sessions at once or hold steps for as long as it was wrong.
"""

import time

_BEGAN = time.time() - time.monotonic()


def now() -> float:
    return _BEGAN + time.monotonic()
