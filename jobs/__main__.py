"""`python -m jobs VERB ...` does the same as `egrsd VERB ...`. A Ray job uses it, since `egrsd` may not be installed there."""

from jobs.cli import main

main()
