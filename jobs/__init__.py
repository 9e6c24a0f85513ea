"""The command line, one thin module per verb: parse the arguments, open the run, connect to Ray, call, set the exit code."""
