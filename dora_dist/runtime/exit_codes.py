"""How a rank ends: what a launcher, a batch script or a person may conclude from its exit status."""

DONE = 0  # what was asked for is done
FAILED = 1  # an error of the program, with its traceback
USERS_MISTAKE = 2  # says what to change; the same command would fail again
STOPPED = 75  # asked to stop by a signal; saved, if training had begun. --resume goes on from there
LOST_RANK = 76  # another rank died or did not answer in time. --resume goes on from the newest checkpoint
INTERRUPTED = 130  # a second Ctrl-C during a run, or a Ctrl-C of any other command; nothing was saved
