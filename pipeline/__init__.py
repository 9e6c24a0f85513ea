"""What happens to a row, and why."""
