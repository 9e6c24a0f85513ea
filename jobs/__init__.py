"""Thin entry points: parse, resolve, connect, call, exit code."""
