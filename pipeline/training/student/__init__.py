"""The student in the trainer: its weights or its adapter, its output head, and the folder that leaves."""
