"""`python -m jobs VERB ...`: the same as `egrsd VERB ...`, for `ray job submit --working-dir . -- python -m jobs VERB ...`."""

from jobs.cli import main

main()
