"""The exit codes of every recipe. docs/cluster.md tells users and schedulers what to do about each."""

EXIT_DONE = 0
EXIT_MISTAKE = 2  # a UserError, printed as one line by rank 0
EXIT_PREEMPTED = 85  # preempted, saved if there was time; rerun the same command to resume
# 128 + N: ended by signal N before training, when there was nothing to save.
# Any other exception is a bug of ours: Python prints its traceback and exits with 1. So does the watchdog on a hang.
