"""What a run in motion leaves on the disk: its lease, questions to its driver, and the lock of a shared card."""
