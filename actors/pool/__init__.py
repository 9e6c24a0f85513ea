"""The pool of engine actors: the driver's handle, the dispatcher that owns the engines, and one engine as an actor."""
