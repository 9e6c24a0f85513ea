"""Is an answer right? Texts decide first, and mathematics in child processes that may be killed at any moment."""
