"""Looks at a run or a source without changing it: what remains, what is proven, what a new grader would change."""
