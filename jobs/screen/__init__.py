"""What a verb shows: the terminal's two streams, progress, tables, and one envelope for --json."""
