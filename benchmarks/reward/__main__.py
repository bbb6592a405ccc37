"""Whether learning from reward makes policies better than what they began with: a row a method.

    python -m benchmarks.reward                         every row, at most twenty minutes each
    python -m benchmarks.reward --only bandit dsrl      some of them
    python -m benchmarks.reward --json [FILE]           what was measured, as JSON (benchmarks/results/reward.json)
    python -m benchmarks.reward --seed 1                another seed

Rows that begin with a PushT policy train it first, in some minutes of one core, and keep it in the user's cache folder.
Exit code: 0, 1 where a row does not pass, 2 for bad input, 130 after Ctrl-C, which keeps the rows that are done.
"""

import sys

from benchmarks.rows.command import main

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:], "benchmarks.reward", __doc__))
