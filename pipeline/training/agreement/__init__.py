"""Do trainer and engines compute the same model? The base and teachers before round 0, policies at their steps."""
