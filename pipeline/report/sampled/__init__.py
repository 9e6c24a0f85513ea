"""The sample of traces on a page: which groups are drawn, their texts, the signals of every token, and the room for all that."""
