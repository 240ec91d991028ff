"""What wires the networks: configuration, weights, pipelines, commands, data, trainings, scenes, family."""

import os

# torch's threads (OpenMP) wait for one another some thousand times in an update, in a loop that turns for
# milliseconds before they sleep. Beside another busy process, two of them may come to share a core, where
# the one that waits keeps the other from it: an update of 0.06 s took 8 s. So they turn for microseconds.
# Only what is set before torch is imported counts; all scripts import this package before.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # the same of other OpenMP libraries than GNU's
