"""The gradient audit of a round: its tokens and their weights, what is measured of them, and the figures of that."""
