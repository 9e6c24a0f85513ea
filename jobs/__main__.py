"""`python -m jobs VERB ...` does the same as `egrsd VERB ...`. A Ray job uses it, since `egrsd` may not be installed there."""

import sys

try:
    from jobs.cli import main
except ModuleNotFoundError as lacking:  # a job runs with the `python` of its node, which may be another one
    remedy = "Install egrsd for it, or put the environment that has egrsd first on the PATH of the cluster's nodes"
    sys.stderr.write(f"error: {sys.executable} has no package {lacking.name}. {remedy}.\n")
    sys.exit(2)

main()
