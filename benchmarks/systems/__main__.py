"""Whether what acts while a chunk is made does what it claims: a row a system.

    python -m benchmarks.systems                         every row, at most five minutes each
    python -m benchmarks.systems --only cache guard      some of them
    python -m benchmarks.systems --json [FILE]           what was measured, as JSON (benchmarks/results/systems.json)
    python -m benchmarks.systems --seed 1                another seed

Rows that act on a PushT policy train it first, in two minutes of one core, and keep it in the user's cache folder. Exit
code: 0, 1 where a row does not pass, 2 for bad input, 130 after Ctrl-C, which keeps the rows that are done.
"""

import sys

from benchmarks.rows.command import main

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:], "benchmarks.systems", __doc__))
