"""minwurst: fine-tune Würstchen v2's prior with a training loop that fits on one page."""

import logging
import os

# Their warnings concern these libraries' own code, and would hide this project's lines. They read
# the variables when they are imported.
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# On a CPU, threads that have nothing to do spin for some microseconds and then sleep. By default
# they spin far longer, and where another process wants their core, everything takes several times
# as long; without spinning at all, a step of the miniature takes an eighth longer.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "30000")
